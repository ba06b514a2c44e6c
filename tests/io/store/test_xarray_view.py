"""Stores in xarray: decoded and physical through open_dataset, as they are stored through h5netcdf."""

import os

import h5py
import numpy as np
import pytest
import xarray

from smoe_hpc.io import Encoding, Grid, StoreWriter, open_dataset

from ..conftest import hourly

GRID = Grid("latlon", [50, 51, 52, 53], [350, 355, 360, 365, 370])
TYPES = ("float32", "float16", "int16")


@pytest.fixture(params=TYPES)
def rainy(tmp_path, request):
    """A folder of two years of t2m (K) and rain (m, stored as its logarithm), and the fields [6, 2, 4, 5]."""
    rng = np.random.default_rng(0)
    fields = np.stack([rng.normal(285, 5, (6, 4, 5)), rng.gamma(0.2, 0.01, (6, 4, 5))], axis=1)
    for part, year in enumerate((2018, 2019)):
        options = {"transforms": ["none", "log:0.001"], "dtype": request.param, "attributes": {"sources": "made up"}}
        with StoreWriter(
            tmp_path / f"a_{year}.h5",
            GRID,
            ["t2m", "tp"],
            ["K", "m"],
            coords={"time": hourly(3, f"{year}-03-01")},
            constants={"orography": np.arange(20.0).reshape(4, 5)},
            **options,
        ) as writer:
            writer.write(0, fields[3 * part : 3 * part + 3])
    return tmp_path, fields, request.param


def test_decoded_and_physical(rainy):
    folder, fields, dtype = rainy
    tolerance = {"float32": 1e-6, "float16": 1e-3, "int16": 2e-4}[dtype]
    for path, rows in ((folder, slice(0, 6)), (folder / "a_2019.h5", slice(3, 6)), (folder / "a_*.h5", slice(0, 6))):
        with open_dataset(path) as decoded:
            assert decoded["fields"].dims == ("time", "channel", "lat", "lon")
            assert decoded["fields"].dtype == np.float32
            np.testing.assert_allclose(decoded["fields"].values[:, 0], fields[rows, 0], rtol=tolerance)
            np.testing.assert_allclose(decoded["fields"].values[:, 1], fields[rows, 1], rtol=tolerance, atol=tolerance / 100)
            chosen = decoded["fields"].sel(channel="tp", lat=51, time="2019-03-01T02")
            np.testing.assert_allclose(chosen.values.squeeze(), fields[5, 1, 1], rtol=tolerance, atol=tolerance / 100)
            assert decoded["units"].sel(channel="t2m") == "K"
            assert decoded.attrs["sources"] == "made up"
            assert decoded["lat"].attrs["units"] == "degrees_north"
            assert float(decoded["constants"].sel(constant="orography", lat=53, lon=370)) == 19


def test_any_index_gives_what_numpy_would(rainy):
    folder, _, _ = rainy
    with open_dataset(folder) as decoded:
        everything = decoded["fields"].values
    for index in [
        np.s_[1], np.s_[-1, 0], np.s_[::2, :, ::-1], np.s_[4, 1, 2, 3], np.s_[:, 1:, 1:3, 2], np.s_[2:2], np.s_[[5, 0, 5]],
        np.s_[[0, 3], :, :, [4, 1]],
    ]:  # fmt: skip
        with open_dataset(folder) as decoded:
            outer = dict(zip(decoded["fields"].dims, index if isinstance(index, tuple) else (index,), strict=False))
            expected = everything
            for axis, part in reversed(list(enumerate(outer.values()))):
                expected = expected[(slice(None),) * axis + (part,)]
            np.testing.assert_array_equal(decoded["fields"].isel(outer).values, expected)


def test_nothing_is_read_before_it_is_looked_at(rainy):
    folder, _, _ = rainy
    with h5py.File(folder / "a_2018.h5") as file:
        offset = file["fields"].id.get_chunk_info(0).byte_offset
    with open_dataset(folder) as decoded:
        lazy = decoded["fields"].sel(channel="t2m").isel(lat=0, lon=0)
        before = (folder / "a_2018.h5").stat()
        with (folder / "a_2018.h5").open("r+b") as file:
            file.seek(offset)
            file.write(bytes(4))
        os.utime(folder / "a_2018.h5", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert lazy.values[0] < 260, "the first value was overwritten after opening, and is seen"


def test_raw_through_h5netcdf(rainy):
    folder, fields, dtype = rainy
    with xarray.open_dataset(folder / "a_2019.h5", engine="h5netcdf") as raw:
        assert raw["fields"].dims == ("time", "channel", "lat", "lon")
        assert raw["fields"].dtype == dtype
        assert (raw["time"].values == hourly(3, "2019-03-01")).all()
        assert raw["transform"].values.tolist() == ["none", "log:0.001"]
        decoded = raw["fields"].astype("f8") * raw["scale"] + raw["offset"]
        tolerance = {"float32": 1e-6, "float16": 1e-3, "int16": 2e-4}[dtype]
        np.testing.assert_allclose(decoded.sel(channel="t2m").values, fields[3:, 0], rtol=tolerance)
        np.testing.assert_allclose(decoded.sel(channel="tp").values, np.log1p(fields[3:, 1] / 0.001), atol=10 * tolerance)


def test_runs_open_too(make_store):
    coords = {"run": np.repeat([4, 5], 6), "step": np.tile(np.arange(6), 2)}
    store, fields = make_store(coords=coords, constants={"region": np.ones((4, 5), int)})
    with open_dataset(store.path) as decoded:
        assert decoded["fields"].dims == ("sample", "channel", "lat", "lon")
        np.testing.assert_array_equal(decoded["fields"].values[decoded["run"].values == 5], fields[6:])
        assert decoded["constants"].sel(constant="region").values.sum() == 20


@pytest.mark.parametrize("compression", ["gzip", "zstd"])
def test_compressed_stores_open_in_both_ways(make_store, compression):
    pytest.importorskip("hdf5plugin")
    encoding = Encoding.of_bounds("int16", [-8.0] * 2, [8.0] * 2)
    store, fields = make_store(compression=compression, encoding=encoding)
    with open_dataset(store.path) as decoded:
        np.testing.assert_allclose(decoded["fields"].values, fields, atol=2e-4)
    with xarray.open_dataset(store.path, engine="h5netcdf") as raw:
        assert raw["fields"].dtype == np.int16
        np.testing.assert_array_equal(raw["fields"].values, encoding.encode(fields))
