import numpy as np
import pytest
import torch

from smoe_hpc.errors import DataError
from smoe_hpc.io import Store
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.sampling.windows import Window
from smoe_hpc.io.synthetic import heat


def true_stencils() -> torch.Tensor:
    """[3, 1, 3, 3] float32: the filters a model is to find."""
    filters = [[[0, d, 0], [d, 1 - 4 * d, d], [0, d, 0]] for d in heat.DIFFUSIVITIES]
    return torch.tensor(filters, dtype=torch.float64)[:, None].float()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> dict[str, Store]:
    folder = tmp_path_factory.mktemp("heat")
    paths = heat.make_heat(folder, runs=(6, 2, 2), grid=(24, 20), steps=100, seed=3)
    return {split: Store(path) for split, path in paths.items()}


def test_runs_are_numbered_through_the_splits(small):
    assert {split: len(store) for split, store in small.items()} == {"train": 606, "validation": 202, "test": 202}
    assert [sorted(set(store.coords["run"].tolist())) for store in small.values()] == [
        [0, 1, 2, 3, 4, 5],
        [6, 7],
        [8, 9],
    ]
    assert small["test"].coords["step"].tolist() == [*range(101), *range(101)]
    assert len(Samples(small["train"], Window((0,), 1), Split("0:6"))) == 600


@pytest.mark.parametrize("split", heat.SPLITS)
def test_the_true_filters_predict_every_stored_state(small, split):
    store = small[split]
    samples = Samples(store, Window((0,), 1))
    batch = samples.fetch(np.arange(len(samples)))
    region = torch.from_numpy(store.constants["region"])
    forecasts = torch.nn.functional.conv2d(batch.inputs, true_stencils(), padding=1)
    forecast = forecasts.gather(1, region.expand(len(samples), 1, -1, -1))
    assert ((forecast - batch.targets).abs() <= 1e-8 + 0.01 * batch.targets.abs()).all()  # 100.000 % within 1 %
    torch.testing.assert_close(forecast, batch.targets, rtol=2e-6, atol=0)  # and far closer than that


def test_a_state_equals_the_plain_recipe(small):
    store = small["validation"]
    region, diffusivity = store.constants["region"], store.constants["diffusivity"]
    assert diffusivity.dtype == np.float64
    np.testing.assert_array_equal(diffusivity, np.array(heat.DIFFUSIVITIES)[region])
    now, then = store.read([40])[0, 0].astype(np.float64), store.read([41])[0, 0]
    for i, j in [(0, 0), (0, 7), (23, 19), (11, 5)]:
        near = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
        around = sum(now[a, b] for a, b in near if 0 <= a < 24 and 0 <= b < 20)
        d = diffusivity[i, j]
        assert then[i, j] == pytest.approx((1 - 4 * d) * now[i, j] + d * around, rel=1e-7)


def test_starts_are_uniform_with_the_same_sources_in_each_region():
    region = heat.region_map((64, 64), 0)
    most = []
    for run in range(60):
        state = heat.start_state(region, 0, run)
        hot = state == 1
        assert state[~hot].min() >= 0
        assert state[~hot].max() <= np.float32(0.1)
        per_region = [int(hot[region == r].sum()) for r in range(3)]
        assert 1 <= min(per_region) <= max(per_region) <= 3
        most.append(max(per_region))
        assert sum(count < max(per_region) for count in per_region) <= 1  # fewer only where a cell was drawn twice
    assert set(most) == {1, 2, 3}


def test_a_run_does_not_depend_on_its_company(tmp_path):
    region = heat.region_map((16, 16), 1)
    diffusivity = np.array(heat.DIFFUSIVITIES)[region]
    many = heat.simulate(region, diffusivity, 9, 1, np.arange(300))
    alone = heat.simulate(region, diffusivity, 9, 1, np.array([257]))
    np.testing.assert_array_equal(alone[0], many[257])
    few = heat.make_heat(tmp_path / "few", (2, 1, 1), (16, 16), 9, seed=1, noise=1.0)
    more = heat.make_heat(tmp_path / "more", (3, 1, 1), (16, 16), 9, seed=1, noise=1.0)
    np.testing.assert_array_equal(Store(few["train"]).read(range(20)), Store(more["train"]).read(range(20)))
    np.testing.assert_array_equal(Store(few["validation"]).read(range(10)), Store(more["train"]).read(range(20, 30)))
    np.testing.assert_array_equal(Store(few["train"]).read([3], ["heat"])[0, 0], many[0, 3])


def test_seeds_differ_and_repeat():
    maps = [heat.region_map((32, 32), seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(maps[0], maps[1])
    assert (maps[0] != maps[2]).mean() > 0.3


@pytest.mark.parametrize("seed", range(5))
def test_regions_are_coherent_and_none_is_small(seed):
    region = heat.region_map((64, 64), seed)
    assert np.bincount(region.ravel(), minlength=3).min() >= 1024
    assert (region[:, 1:] == region[:, :-1]).mean() > 0.7  # a third at random
    assert (region[1:] == region[:-1]).mean() > 0.7  # a third at random


def test_noise_is_in_the_target_only_and_larger_in_the_west(tmp_path):
    paths = heat.make_heat(tmp_path, (10, 1, 1), (32, 32), 50, seed=0, noise=2.0, noise_ratio=10.0)
    store = Store(paths["train"])
    assert store.channels == ["heat", "observed"]
    clean = Store(heat.make_heat(tmp_path / "clean", (10, 1, 1), (32, 32), 50, seed=0)["train"])
    rows = np.arange(len(store))
    np.testing.assert_array_equal(store.read(rows, ["heat"]), clean.read(rows))
    noise = np.subtract(*store.read(rows, ["observed", "heat"]).swapaxes(0, 1)).astype(np.float64)
    std = store.constants["noise_std"]
    assert std[0, 15] == pytest.approx(10 * std[0, 16])
    region, diffusivity = store.constants["region"], store.constants["diffusivity"]
    assert std[0, 31] == pytest.approx(2 * heat.noise_unit(region, diffusivity, 50, 0))
    np.testing.assert_allclose(noise.std(axis=0), std, rtol=0.2)
    assert abs((noise / std).mean()) < 0.01
    samples = Samples(store, Window((0,), 1), None, ["heat"], ["observed", "heat"])
    batch = samples.fetch([7])
    np.testing.assert_array_equal(batch.inputs[0, 0].numpy(), store.read([7])[0, 0])
    np.testing.assert_array_equal(batch.targets[0].numpy(), store.read([8])[0, ::-1])


def test_the_unit_of_noise_is_what_separates_the_most_alike_filters(small):
    store = small["train"]
    region, diffusivity = store.constants["region"], store.constants["diffusivity"]
    states = torch.from_numpy(heat.simulate(region, diffusivity, 100, 3, np.arange(8))).reshape(-1, 1, 24, 20)
    forecasts = torch.nn.functional.conv2d(states.double(), true_stencils().double(), padding=1)
    apart = (forecasts[:, 1] - forecasts[:, 0]).square().mean().sqrt().item()
    assert heat.noise_unit(region, diffusivity, 100, 3) == pytest.approx(apart, rel=1e-6)


def test_the_same_data_are_not_made_twice_and_others_not_replaced_unasked(tmp_path):
    arguments = {"runs": (2, 1, 1), "grid": (16, 16), "steps": 5}
    paths = heat.make_heat(tmp_path, **arguments)
    stamps = {split: path.stat().st_mtime_ns for split, path in paths.items()}
    calls = []
    heat.make_heat(tmp_path, **arguments, progress=lambda done, total: calls.append((done, total)))
    assert stamps == {split: path.stat().st_mtime_ns for split, path in paths.items()}
    assert calls == []
    paths["test"].unlink()
    heat.make_heat(tmp_path, **arguments, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 1)]  # only what was missing
    assert paths["train"].stat().st_mtime_ns == stamps["train"]
    with pytest.raises(DataError, match=r"heat_train.h5 holds other data .*another folder, or .*`smoe-hpc data heat .*--overw"):
        heat.make_heat(tmp_path, **arguments, seed=1)
    heat.make_heat(tmp_path, **arguments, seed=1, overwrite=True)
    assert '"seed": 1' in Store(paths["train"]).attributes["recipe"]
    paths["train"].write_bytes(b"damaged")
    with pytest.raises(DataError, match="holds other data"):
        heat.make_heat(tmp_path, **arguments, seed=1)


@pytest.mark.parametrize(
    "arguments",
    [{"runs": (1, 1)}, {"runs": (0, 1, 1)}, {"steps": 0}, {"noise": -1.0}, {"noise_ratio": 0.0}, {"seed": -1}],
)
def test_impossible_data_are_refused(tmp_path, arguments):
    with pytest.raises(DataError, match="cannot be made"):
        heat.make_heat(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_files_are_found_by_split(small, tmp_path):
    folder = small["train"].path.parent
    assert heat.split_path(folder, "test") == folder / "heat_test.h5"
    with pytest.raises(DataError, match="did you mean 'train'"):
        heat.split_path(folder, "trian")
    with pytest.raises(DataError, match="smoe-hpc data heat"):
        heat.split_path(tmp_path, "train")
