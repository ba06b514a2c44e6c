"""What is done to a channel's physical values before they are stored, and undone for people.

Precipitation is stored, and given to models, as ``u = log(1 + x / 0.001)`` (written ``log:0.001``), which spreads the
many small amounts (Rasp and Thuerey 2021). The model takes stored space; ``open_dataset`` gives physical units.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smoe_hpc.errors import DataError

NONE = "none"
_LOG = "log:"


def threshold(transform: str) -> float | None:
    """The amount e of a transform ``log:e``, None for ``none``.

    Raises:
        DataError: any other text.

    >>> threshold("log:0.001"), threshold("none")
    (0.001, None)
    """
    if transform == NONE:
        return None
    try:
        amount = float(transform.removeprefix(_LOG)) if transform.startswith(_LOG) else 0.0
    except ValueError:
        amount = 0.0
    if not (amount > 0 and np.isfinite(amount)):
        raise DataError(f"transform {transform!r} is unknown; it is none, or log:AMOUNT as in log:0.001")
    return amount


def apply(transform: str, values: np.ndarray) -> np.ndarray:
    """Physical values to stored space, float64; not finite at and below minus the threshold, where the logarithm ends.

    >>> apply("log:0.001", np.array([0.0, 0.001])).round(4).tolist()
    [0.0, 0.6931]
    """
    amount = threshold(transform)
    values = np.asarray(values, dtype=np.float64)
    if amount is None:
        return values
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.log1p(values / amount)


def undo(transform: str, values: np.ndarray) -> np.ndarray:
    """Stored space to physical values, float64."""
    amount = threshold(transform)
    values = np.asarray(values, dtype=np.float64)
    return values if amount is None else amount * np.expm1(values)


def slope(transform: str, values: np.ndarray) -> np.ndarray:
    """How much the physical value changes with the stored one, at stored values: what turns small errors into units."""
    amount = threshold(transform)
    values = np.asarray(values, dtype=np.float64)
    return np.ones_like(values) if amount is None else amount * np.exp(values)


def check_transforms(transforms: Sequence[str], channels: Sequence[str]) -> list[str]:
    """The transforms as a list, one known text a channel.

    Raises:
        DataError: another number of them, or an unknown one.
    """
    if len(transforms) != len(channels):
        raise DataError(f"{len(transforms)} transforms for {len(channels)} channels; give one text a channel")
    for transform in transforms:
        threshold(transform)
    return list(transforms)
