"""A writer takes times that say what they are, and nothing that could be mistaken for them."""

import datetime
from dataclasses import dataclass

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Grid, Store, StoreWriter
from smoe_hpc.io.store.times import as_times, written_coords

EXPECTED = np.array(["2000-01-01T00", "2000-01-01T06"], "datetime64[s]")


@pytest.mark.parametrize("unit", ["h", "m", "s", "ms", "us", "ns"])
def test_any_unit_is_taken(unit):
    found = as_times(EXPECTED.astype(f"datetime64[{unit}]"))
    assert found.dtype == np.dtype("datetime64[s]")
    np.testing.assert_array_equal(found, EXPECTED)


def test_days_months_years_and_objects_are_taken():
    for unit in ("D", "M", "Y"):
        np.testing.assert_array_equal(as_times(np.array(["2000"], f"datetime64[{unit}]")), EXPECTED[:1])
    naive = [datetime.datetime(2000, 1, 1), datetime.datetime(2000, 1, 1, 6)]
    np.testing.assert_array_equal(as_times(naive), EXPECTED)
    np.testing.assert_array_equal(as_times(np.array(naive, object)), EXPECTED)
    east = datetime.timezone(datetime.timedelta(hours=2))
    np.testing.assert_array_equal(as_times([datetime.datetime(2000, 1, 1, 2, tzinfo=east)]), EXPECTED[:1])
    np.testing.assert_array_equal(as_times(np.array([EXPECTED[0], EXPECTED[1]], object)), EXPECTED)


def test_pandas_times_are_taken():
    pandas = pytest.importorskip("pandas")
    np.testing.assert_array_equal(as_times(pandas.DatetimeIndex(EXPECTED)), EXPECTED)
    np.testing.assert_array_equal(as_times(list(pandas.DatetimeIndex(EXPECTED))), EXPECTED)
    for missing in ([pandas.NaT], pandas.DatetimeIndex([EXPECTED[0], pandas.NaT])):
        with pytest.raises(DataError, match=r"missing \(NaT\)"):
            as_times(missing)


HOURS_SINCE_1900 = np.array([876576, 876582])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (HOURS_SINCE_1900, r"times are of type int64: numbers do not say what they count; give datetime64, e\.g\. np"),
        (HOURS_SINCE_1900.astype(float), "times are of type float64: numbers do not say"),
        (np.array([True]), "times are of type bool"),
        (np.array([1, 2], object), "time 1 is of type int: numbers do not say"),
        (np.array(["2000-01-01"]), "times are of type <U10"),
        (np.array([6], "timedelta64[h]"), "times are of type timedelta64.h."),
        (np.array(["2000-01-01", "NaT"], "datetime64[s]"), r"time NaT \(row 1\) is missing \(NaT\); leave that sample out"),
        (np.array(["NaT"], "datetime64"), "missing"),
        (np.array([None, EXPECTED[0]], object), "a time is missing"),
        (np.array([0.5], object), "time 0.5 is of type float"),
        (np.array([np.nan], object), "a time is missing"),
        (np.array(["2000-01-01T00:00:00.5"], "datetime64[ms]"), "has a fraction of a second, which a store does not keep"),
        (np.array([876576], "datetime64[Y]"), r"time 878546 \(row 0\) is a year outside 1 to 9999; check the unit"),
        (np.array([-(2**62)], "datetime64[s]"), "is a year outside"),
        (np.array(["0000-12-31"], "datetime64[D]"), "time 0 .* is a year outside"),
    ],
)
def test_what_is_no_time_is_refused(values, words, tmp_path):
    with pytest.raises(DataError, match=words):
        as_times(values)
    with pytest.raises(DataError, match=words):
        StoreWriter(tmp_path / "x.h5", Grid.plane(1, 1), ["t"], ["K"], coords={"time": values})
    assert list(tmp_path.iterdir()) == []


@dataclass(frozen=True)
class Day:
    """A time of another calendar, as the package cftime has them."""

    text: str
    calendar: str

    def __str__(self) -> str:
        return self.text


@pytest.mark.parametrize("calendar", ["360_day", "noleap", "julian"])
def test_other_calendars_are_named(calendar):
    days = [Day("2000-02-28 00:00:00", calendar), Day("2000-02-29 00:00:00", calendar)]
    with pytest.raises(DataError, match=rf"time 2000-02-28 .* is of the calendar '{calendar}'; a store's .*convert_calendar"):
        as_times(days)


def test_runs_steps_and_members_are_whole_numbers():
    found = written_coords({"run": [0, 0], "step": np.array([1, 2], np.uint8), "member": np.arange(2)})
    assert {name: str(values.dtype) for name, values in found.items()} == {"run": "int64", "step": "int64", "member": "int64"}
    for values in ([0.5, 1.5], [0.0, np.nan], ["1"], [True], np.array([2**64 - 1], np.uint64), EXPECTED):
        with pytest.raises(DataError, match=r"coordinate 'run' is of type .*, but must hold whole numbers; cast it to int64"):
            written_coords({"run": values})


def test_the_year_2000_stays_in_the_store(tmp_path):
    times = np.datetime64("1900-01-01") + HOURS_SINCE_1900 * np.timedelta64(1, "h")
    with StoreWriter(tmp_path / "x.h5", Grid.plane(1, 1), ["t"], ["K"], coords={"time": times}) as writer:
        writer.write(0, np.zeros((2, 1, 1, 1)))
    np.testing.assert_array_equal(Store(tmp_path / "x.h5").coords["time"], EXPECTED)
