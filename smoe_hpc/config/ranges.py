"""The ranges of runs and dates that make up splits: parsed, and compared with each other.

Heat's splits are files of their own, so each is a range of run numbers in its file. A regional store is one file, so
its splits are ranges of dates that must not overlap: a test day that was trained on is no test.
"""

from __future__ import annotations

from datetime import date
from itertools import combinations

from smoe_hpc.errors import ConfigError


def run_range(key: str, text: str) -> tuple[int, int]:
    """First run and the end, which is not part.

    >>> run_range("data.splits.train", "0:1000")
    (0, 1000)
    """
    parts = text.split(":")
    if len(parts) != 2 or not all(part.strip().isdecimal() for part in parts):
        raise ConfigError(f'{key}={text!r}: must be run numbers "first:end" such as "0:1000", or "" for all runs')
    first, end = int(parts[0]), int(parts[1])
    if first >= end:
        raise ConfigError(f"{key}={text!r}: holds no run; the end must be above the first, such as {first}:{first + 1}")
    return first, end


def date_range(key: str, text: str) -> tuple[date, date]:
    """First and last day, both part of the range.

    >>> date_range("data.splits.test", "2019-03-27/2019-03-31")[1].day
    31
    """
    try:
        first, last = (date.fromisoformat(part.strip()) for part in text.split("/"))
    except ValueError:
        rule = 'must be two existing days "first/last" such as "2019-03-01/2019-03-23", or "" for all times'
        raise ConfigError(f"{key}={text!r}: {rule}") from None
    if first > last:
        raise ConfigError(f"{key}={text!r}: the first day lies after the last; write {last}/{first}")
    return first, last


def check_splits(task: str, train: str, validation: str, test: str) -> None:
    """Refuse invalid ranges, and splits of one store that share a day."""
    texts = {"train": train, "validation": validation, "test": test}
    if task == "heat":
        for split, text in texts.items():
            if text:
                run_range(f"data.splits.{split}", text)
        return
    days = {split: date_range(f"data.splits.{split}", text) if text else (date.min, date.max) for split, text in texts.items()}
    for one, other in combinations(days, 2):
        if days[one][0] <= days[other][1] and days[other][0] <= days[one][1]:
            raise ConfigError(
                f"data.splits.{other}={texts[other]!r}: shares days with data.splits.{one}={texts[one]!r}; splits of "
                'one store must lie apart ("" is every time in it)'
            )
