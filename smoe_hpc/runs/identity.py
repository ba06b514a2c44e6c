"""Which recipes are the same experiment, and so may share a run's folder."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from smoe_hpc.config import Recipe
from smoe_hpc.files import writing

# A change of these does not make it another experiment: it may go on longer, be written down otherwise, or find its data
# elsewhere (what these hold is compared, wherever they lie).
_FREE = ("run.", "loader.", "data.store", "training.epochs", "training.max_steps", "training.stop_at_score", "training.threads")


def differences(old: Recipe, new: Recipe) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of what makes two recipes different experiments."""
    before, after = dict(_flat(asdict(old))), dict(_flat(asdict(new)))
    keys = [*before, *(key for key in after if key not in before)]
    return [
        (key, before.get(key), after.get(key))
        for key in keys
        if before.get(key) != after.get(key) and not key.startswith(_FREE)
    ]


def identity_of(recipe: Recipe) -> str:
    """Hash of what makes the recipe this experiment."""
    return writing.sha256_of_json([pair for pair in _flat(asdict(recipe)) if not pair[0].startswith(_FREE)])


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
