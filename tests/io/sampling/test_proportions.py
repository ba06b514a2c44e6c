"""Days are shared out in order, whole, without a gap and without an overlap."""

import numpy as np
import pytest

from smoe_hpc.errors import DataError
from smoe_hpc.io.sampling.proportions import proportional_splits


def test_drawn_by_hand() -> None:
    # 10 days 03..12: train 03-08, validation 09-10, test 11-12
    splits = proportional_splits(np.datetime64("2019-02-03T06"), np.datetime64("2019-02-12T18"), (0.2, 0.2))
    assert splits == {
        "train": "2019-02-03/2019-02-08",
        "validation": "2019-02-09/2019-02-10",
        "test": "2019-02-11/2019-02-12",
    }


@pytest.mark.parametrize("days", [3, 4, 7, 40, 365, 1461])
def test_every_day_once(days: int) -> None:
    first = np.datetime64("2015-12-31T12")
    splits = proportional_splits(first, first + np.timedelta64(days - 1, "D"))
    edges = [np.datetime64(day) for text in splits.values() for day in text.split("/")]
    assert edges[0] == np.datetime64("2015-12-31")
    assert edges[-1] == np.datetime64("2015-12-31") + np.timedelta64(days - 1, "D")
    assert all(end >= begin for begin, end in zip(edges[::2], edges[1::2], strict=True))
    assert [edges[2] - edges[1], edges[4] - edges[3]] == [np.timedelta64(1, "D")] * 2


def test_what_cannot_be_split() -> None:
    first = np.datetime64("2019-01-01")
    with pytest.raises(DataError, match="cannot be split in three"):
        proportional_splits(first, first + np.timedelta64(1, "D"))
    with pytest.raises(DataError, match="both together below 1"):
        proportional_splits(first, first + np.timedelta64(100, "D"), (0.5, 0.5))
