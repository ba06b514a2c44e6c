"""Scores against numpy in float64, in pieces and over regions."""

import numpy as np
import pytest
import torch

from smoe_hpc.errors import SmoeError
from smoe_hpc.io.grids import Grid
from smoe_hpc.scores import Mse, PointSums, Rmse, Within, area_weights, region_masks

H, W = 5, 7
REGION = np.random.default_rng(0).integers(0, 3, (H, W))


def fields(seed: int, samples: int = 11, channels: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(samples, channels, H, W, generator=generator)
    return target * (1 + 0.02 * torch.randn(target.shape, generator=generator)), target


def feed(score, output, target, batches) -> None:
    """Batches of 4, the last filled up with samples that do not count and hold rubbish."""
    for rows in batches:
        x, y = output[rows], target[rows]
        rubbish = torch.full((4 - len(rows), *x.shape[1:]), float("nan"))
        valid = torch.arange(4) < len(rows)
        score.update(torch.cat([x, rubbish]), torch.cat([y, rubbish]), valid)


def test_within_counts_the_points():
    output, target = fields(0)
    score = Within(2, (H, W), regions=region_masks(REGION, (H, W)))
    feed(score, output, target, [range(4), range(4, 8), range(8, 11)])
    x, y = output.numpy().astype(np.float64), target.numpy().astype(np.float64)
    hit = np.abs(x - y) <= 1e-8 + 0.01 * np.abs(y)
    assert 20 < 100 * hit.mean() < 80
    result = score.result()
    assert set(result) == {"all", "region_0", "region_1", "region_2"}
    assert result["all"]["within_1pct"] == pytest.approx(100 * hit.mean(), rel=1e-12)
    for r in range(3):
        expected = 100 * hit[:, :, r == REGION].mean()
        assert result[f"region_{r}"]["within_1pct"] == pytest.approx(expected, rel=1e-12)


def test_within_at_the_edge():
    score = Within(1, (1, 4))
    target = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 1, 4).double()
    output = torch.tensor([1e-8, 1.1e-8, 1.0099, float("nan")]).view(1, 1, 1, 4).double()
    score.update(output, target, torch.tensor([True]))
    assert score.result()["all"]["within_1pct"] == 50.0


@pytest.mark.parametrize("weighted", [False, True])
def test_squared_errors_equal_numpy(weighted: bool):
    output, target = fields(1)
    grid = Grid("latlon", np.linspace(40, 70, H), np.linspace(0, 30, W))
    weights = grid.cos_latitude_weights() if weighted else np.ones((H, W))
    arguments = {"weights": weights if weighted else None, "regions": region_masks(REGION, (H, W))}
    mse = Mse(2, (H, W), name="loss", **arguments)
    rmse = Rmse(2, (H, W), name="rmse", per_channel=["a", "b"], **arguments)
    for score in (mse, rmse):
        feed(score, output, target, [range(3), range(3, 7), range(7, 11)])
    square = (output.numpy().astype(np.float64) - target.numpy().astype(np.float64)) ** 2
    assert mse.result()["all"]["loss"] == pytest.approx((square * weights).mean() / weights.mean(), rel=1e-12)
    for c, name in enumerate("ab"):
        expected = np.sqrt((square[:, c] * weights).mean())
        assert rmse.result()["all"][f"rmse_{name}"] == pytest.approx(expected, rel=1e-12)
        here = REGION == 1
        expected = np.sqrt((square[:, c] * weights)[:, here].mean() / weights[here].mean())
        assert rmse.result()["region_1"][f"rmse_{name}"] == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(mse.sums.total / mse.sums.count, torch.from_numpy(square.mean(0)))


def test_processes_add_up_to_one():
    output, target = fields(2, samples=12)
    whole = Rmse(2, (H, W), name="rmse")
    feed(whole, output, target, [range(4), range(4, 8), range(8, 12)])
    ranks = [Rmse(2, (H, W), name="rmse") for _ in range(3)]
    for rank, score in enumerate(ranks):
        feed(score, output, target, [range(rank, 12, 3)])
    for key, total in ranks[0].state().items():  # what an all-reduce does: in place
        for other in ranks[1:]:
            total += other.state()[key]
    assert ranks[0].result()["all"]["rmse"] == pytest.approx(whole.result()["all"]["rmse"], rel=1e-14)


def test_large_fields_lose_nothing_in_float32():
    # Temperatures near 280 K with an error of 1 mK: squares are formed in float64.
    target = torch.full((3, 1, H, W), 280.0)
    score = Rmse(1, (H, W), name="rmse")
    score.update(target + 0.0009765625, target, torch.ones(3, dtype=torch.bool))
    assert score.result()["all"]["rmse"] == pytest.approx(0.0009765625, rel=1e-12)


def test_nothing_added_is_not_a_number():
    assert np.isnan(Rmse(1, (H, W), name="rmse").result()["all"]["rmse"])
    sums = PointSums(1, (H, W))
    sums.add(torch.ones(2, 1, H, W), torch.tensor([False, False]))
    assert np.isnan(sums.mean(torch.ones(H, W)))


def test_shapes_that_do_not_fit():
    score = Within(1, (H, W))
    with pytest.raises(SmoeError, match="differ"):  # would broadcast
        score.update(torch.zeros(2, 1, H, W), torch.zeros(2, 2, H, W), torch.ones(2, dtype=torch.bool))
    with pytest.raises(SmoeError, match="region map"):
        region_masks(REGION, (H, W + 1))
    with pytest.raises(SmoeError, match="weights of rmse"):
        Rmse(1, (H, W), name="rmse", weights=np.ones(H))


def test_area_weights_of_a_global_grid_are_weatherbench_2s():
    # WeatherBench 2 sets the outermost bounds to the poles; 5.625 degrees has cell centres half a cell from them.
    lat = np.linspace(-90 + 2.8125, 90 - 2.8125, 32)
    bounds = np.deg2rad([-90, *(lat[:-1] + lat[1:]) / 2, 90])
    expected = np.sin(bounds[1:]) - np.sin(bounds[:-1])
    weights = area_weights(Grid("latlon", lat, np.arange(64) * 5.625))
    np.testing.assert_allclose(weights[:, 3], expected / expected.mean(), rtol=1e-12)
    with_poles = area_weights(Grid("latlon", np.linspace(-90, 90, 7), [0, 180]))
    assert (with_poles > 0).all()


def test_area_weights_of_a_region_and_a_plane():
    grid = Grid("latlon", np.arange(50, 58.1, 0.25), np.arange(350, 362.1, 0.25))
    weights = area_weights(grid)
    assert weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(weights, grid.cos_latitude_weights(), rtol=1e-4)  # small cells: the cosine again
    assert (area_weights(Grid.plane(3, 4)) == 1).all()
    with pytest.raises(SmoeError, match="two latitude rows"):
        area_weights(Grid("latlon", [50.0], [0, 1]))
