import os
from pathlib import Path

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Store
from smoe_hpc.io.convert import convert
from smoe_hpc.io.convert.grib import arrange
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.splits import Split
from smoe_hpc.io.sampling.windows import Window

from .grib_files import write_grib

eccodes = pytest.importorskip("eccodes")



def test_rows_are_flipped_and_greenwich_is_crossed(tmp_path):
    (tmp_path / "in").mkdir()
    source = write_grib(tmp_path / "in" / "a.grib", [0, 1, 2])
    calls = []
    store = Store(convert(source, tmp_path / "a.h5", progress=lambda done, total: calls.append((done, total))))
    assert store.grid.lat.tolist() == [52, 52.5, 53]
    assert store.grid.lon.tolist() == [359, 359.5, 360, 360.5]
    assert (store.channels, store.units) == (["t2m"], ["K"])
    assert (store.coords["time"] == np.datetime64("2019-03-01T00") + np.arange(3) * np.timedelta64(1, "h")).all()
    expected = 280 + np.arange(3)[:, None, None] + 0.1 * np.array([2, 1, 0])[:, None] + 0.01 * np.arange(4)
    np.testing.assert_allclose(store.read(range(3))[:, 0], expected, atol=1e-4)
    assert store.attributes["sources"] == "a.grib"
    assert store.attributes["converter"].startswith("smoe-hpc grib")
    assert calls == [(3, 3)]
    assert [path.name for path in source.parent.iterdir()] == ["a.grib"]  # no index file beside the source


def test_several_variables_become_channels(tmp_path):
    source = write_grib(tmp_path / "a.grib", [0, 1], (("2t", 280.0), ("sp", 1e5)))
    store = Store(convert(source, tmp_path / "a.h5"))
    assert dict(zip(store.channels, store.units, strict=True)) == {"t2m": "K", "sp": "Pa"}
    np.testing.assert_allclose(store.read([1], ["sp"])[0, 0, 2, 0], 1e5 + 1, atol=0.1)


def test_a_single_time_is_a_store_too(tmp_path):
    store = Store(convert(write_grib(tmp_path / "a.grib", [7]), tmp_path / "a.h5"))
    assert store.coords["time"].tolist() == [np.datetime64("2019-03-01T07:00:00").item()]
    np.testing.assert_allclose(store.read([0])[0, 0, 2, 0], 287, atol=1e-4)


def test_a_missing_hour_stays_a_gap_and_order_does_not_matter(tmp_path):
    source = write_grib(tmp_path / "a.grib", [5, 6, 0, 1, 2, 4])
    store = Store(convert(source, tmp_path / "a.h5"))
    hours = (store.coords["time"] - np.datetime64("2019-03-01")) / np.timedelta64(1, "h")
    assert hours.tolist() == [0, 1, 2, 4, 5, 6]
    np.testing.assert_allclose(store.read(range(6))[:, 0, 2, 0], 280 + hours, atol=1e-4)
    samples = Samples(store, Window((0,), 1))
    assert samples.input_rows.ravel().tolist() == [0, 1, 3, 4]  # 2 -> 4 h is never a sample


def test_a_missing_value_is_named_and_nothing_is_left(tmp_path):
    source = write_grib(tmp_path / "a.grib", [0, 1, 2], missing=(1, 5))
    with pytest.raises(DataError, match=r"time 2019-03-01T01:00:00, channel 't2m', lat 52.5, lon 359.5"):
        convert(source, tmp_path / "a.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["a.grib"]


def test_what_is_no_surface_field_is_refused(tmp_path):
    levels = write_grib(tmp_path / "a.grib", [0], (("t", 250.0),), typeOfLevel="isobaricInhPa", level=500)
    more = write_grib(tmp_path / "b.grib", [0], (("t", 250.0),), typeOfLevel="isobaricInhPa", level=850)
    (tmp_path / "c.grib").write_bytes(levels.read_bytes() + more.read_bytes())
    with pytest.raises(DataError, match="2 of isobaricInhPa beside time, latitude and longitude"):
        convert(tmp_path / "c.grib", tmp_path / "c.h5")


def test_a_truncated_or_foreign_file_is_refused(tmp_path):
    source = write_grib(tmp_path / "a.grib", [0, 1, 2])
    with pytest.raises(DataError, match="does not exist"):
        convert(tmp_path / "none.grib", tmp_path / "a.h5")
    (tmp_path / "cut.grib").write_bytes(source.read_bytes()[:-40])
    with pytest.raises(DataError, match="is it complete"):
        convert(tmp_path / "cut.grib", tmp_path / "cut.h5")
    (tmp_path / "a.nc").write_bytes(b"CDF\x01" + bytes(100))
    with pytest.raises(DataError, match="is netCDF; there are converters for GRIB"):
        convert(tmp_path / "a.nc", tmp_path / "a.h5")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(DataError, match="of an unknown format"):
        convert(tmp_path / "a.txt", tmp_path / "a.h5")
    with pytest.raises(DataError, match="is a directory"):
        convert(tmp_path, tmp_path / "a.h5")
    assert not list(tmp_path.glob("*.h5*"))


@pytest.mark.parametrize(
    ("longitude", "expected"),
    [
        ([-180, -90, 0, 90], [0, 90, 180, 270]),
        ([0, 90, 180, 270], [0, 90, 180, 270]),
        ([350, 355, 0, 5], [350, 355, 360, 365]),
        ([-10, -5, 0, 5], [350, 355, 360, 365]),
        ([10, 20, 30], [10, 20, 30]),
        ([170, 180, -170], [170, 180, 190]),
        ([-20, -10], [340, 350]),
    ],
)
def test_longitudes_keep_neighbours_side_by_side(longitude, expected):
    rows, columns, grid = arrange(np.array([1.0, 0.0]), np.array(longitude, float))
    assert grid.lon.tolist() == expected
    assert (np.mod(np.array(longitude)[columns], 360) == np.mod(expected, 360)).all()
    assert rows.tolist() == [1, 0]


@pytest.mark.real_data
def test_a_real_era5_file(tmp_path):
    folder = Path(os.environ.get("SMOE_REAL_DATA", Path(__file__).parents[4] / "shared" / "data"))
    source = folder / "era5-2mt-2019-03-uk.grib"
    if not source.exists():
        pytest.skip(f"no {source}; set SMOE_REAL_DATA")
    before = sorted(folder.iterdir())
    store = Store(convert(source, tmp_path / "uk.h5"))
    assert sorted(folder.iterdir()) == before
    assert store.num_samples == 744
    assert store.grid.describe() == "33 x 49 latlon, lat 50..58, lon 350..362, regional"
    assert store.units == ["K"]
    samples = Samples(store, Window((-12, -6, 0), 6), Split("2019-03-01/2019-03-23"))
    assert len(samples) == 23 * 24 - 18
    hours = store.read(np.arange(744))[:, 0].astype(np.float64)
    for lead, published in ((1, 0.467), (3, 1.189), (6, 1.957), (12, 2.599), (24, 1.869)):
        persistence = np.sqrt(np.square(hours[lead:] - hours[:-lead]).mean())
        assert persistence == pytest.approx(published, abs=1e-3)
