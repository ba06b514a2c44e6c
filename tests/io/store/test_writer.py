"""What a writer refuses, and that it leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io import Grid, Store, StoreWriter

from ..conftest import hourly


def test_a_store_is_not_overwritten_unasked(make_store, tmp_path):
    make_store()
    with pytest.raises(DataError, match="exists already"):
        make_store()
    make_store(count=3, overwrite=True)
    assert Store(tmp_path / "store.h5").num_samples == 3


def open_writer(path: Path, count: int = 4, **options: object) -> StoreWriter:
    arguments: dict = {"coords": {"time": hourly(count)}, "constants": None, **options}
    return StoreWriter(path, Grid.plane(2, 3), ["t2m", "z500"], ["K", "m2 s-2"], **arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_values_that_are_not_finite_are_named_and_nothing_is_left(tmp_path, bad):
    fields = np.zeros((4, 2, 2, 3))
    fields[2, 1, 0, 2] = bad
    with pytest.raises(DataError, match=r"2019-03-01T02:00:00, channel 'z500', lat 0, lon 2"):  # noqa: SIM117
        with open_writer(tmp_path / "a.h5") as writer:
            writer.write(0, fields)
    assert list(tmp_path.iterdir()) == []


def test_large_values_whose_sum_overflows_are_fine(tmp_path):
    with open_writer(tmp_path / "a.h5") as writer:
        writer.write(0, np.full((4, 2, 2, 3), 3e38))
    assert (Store(tmp_path / "a.h5").read([0]) == np.float32(3e38)).all()


def test_samples_never_written_and_failures_inside_leave_nothing(tmp_path):
    with pytest.raises(DataError, match="2 of 4 samples were never written, the first is time 2019-03-01T02"):  # noqa: SIM117
        with open_writer(tmp_path / "a.h5") as writer:
            writer.write(0, np.zeros((2, 2, 2, 3)))
    with pytest.raises(KeyboardInterrupt), open_writer(tmp_path / "a.h5"):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("row", "shape"), [(3, (2, 2, 2, 3)), (-1, (1, 2, 2, 3)), (0, (4, 2, 3, 3)), (0, (2, 2, 3))])
def test_slabs_that_do_not_fit_are_refused(tmp_path, row, shape):
    with pytest.raises(DataError, match=r"slab has shape|not all within"), open_writer(tmp_path / "a.h5") as writer:
        writer.write(row, np.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coords": {}}, "needs coordinates"),
        ({"coords": {"tme": np.arange(3)}}, "did you mean 'time'"),
        ({"coords": {"run": np.arange(3), "step": np.arange(4)}}, "of one length"),
        ({"coords": {"time": hourly(4)[[0, 1, 1, 2]]}}, "2019-03-01T01:00:00 appears twice"),
        ({"coords": {"time": hourly(4)[[0, 2, 1, 3]]}}, "2019-03-01T02:00:00 is followed by 2019-03-01T01:00:00"),
        ({"constants": {"region": np.zeros((3, 3))}}, "grid's shape"),
        ({"attributes": {"grid": "x"}}, "belong to the store itself"),
    ],
)
def test_impossible_stores_are_refused(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        open_writer(tmp_path / "a.h5", **options)
