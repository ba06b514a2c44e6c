"""Keys and values of recipes that were written before a key got its present name: still read, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

KEYS = {"loader.front": "loader.backend"}
"""Present name of each earlier one."""

VALUES: dict[str, dict[str, Any]] = {"loader.backend": {"plain": "threads"}}
"""By key (its present name), present value of each earlier one."""


def present(assignments: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """(key, value) of a recipe or of overrides, each under its present name.

    Warns:
        UserWarning: one for each that had another; it says what to write.
    """
    for key, value in assignments:
        name = KEYS.get(key, key)
        earlier = VALUES.get(name, {})
        new = earlier.get(value, value) if isinstance(value, str) else value
        if name != key or new is not value:
            warnings.warn(f"{key}={value} has another name now; write {name}={new}", UserWarning, stacklevel=3)
        yield name, new
