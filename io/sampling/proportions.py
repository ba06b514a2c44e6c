"""Splits for data whose years are not the recipe's: consecutive days, shared out by proportion."""

from __future__ import annotations

import numpy as np

from smoe_hpc.errors import DataError

NAMES = ("train", "validation", "test")
_DAY = np.timedelta64(1, "D")


def proportional_splits(
    first: np.datetime64, last: np.datetime64, shares: tuple[float, float] = (0.15, 0.15)
) -> dict[str, str]:
    """Days first/last of each split, as recipes have them; pure, and the last day of the data ends the last split.

    >>> proportional_splits(np.datetime64("2019-01-01T00"), np.datetime64("2019-02-09T18"))["train"]
    '2019-01-01/2019-01-28'

    Args:
        first: time of the first field.
        last: time of the last one.
        shares: of all days, how many validate and how many test; at least one day each. The rest trains.

    Raises:
        DataError: shares that leave nothing to train on, or fewer than three days.
    """
    begin, days = first.astype("datetime64[D]"), int((last.astype("datetime64[D]") - first.astype("datetime64[D]")) / _DAY) + 1
    if min(shares) <= 0 or sum(shares) >= 1:
        raise DataError(f"shares {shares} for validation and test: each must be above 0, and both together below 1")
    counts = [max(round(days * share), 1) for share in shares]
    if days - sum(counts) < 1:
        raise DataError(f"{days} day(s) from {first} to {last} cannot be split in three; take more data")
    splits = {}
    for name, count in zip(NAMES, (days - sum(counts), *counts), strict=True):
        splits[name] = f"{begin}/{begin + (count - 1) * _DAY}"
        begin = begin + count * _DAY
    return splits
