"""The ground of `config`: checks of single values, and the one form that all its errors have.

Each section of a recipe keeps its own rules beside its dataclass (`data.py`, `model.py`, ...); rules between sections stand
in `recipe.py`, settings without effect in `idle.py`, a batch shared by processes in `sharing.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal, get_args, get_origin, get_type_hints

from smoe_hpc.errors import ConfigError
from smoe_hpc.text import nearest


def require(holds: bool, key: str, value: object, rule: str) -> None:
    """One form for all errors: ``key=value: rule and remedy``."""
    if not holds:
        raise ConfigError(f"{key}={shown(value)}: {rule}")


def shown(value: object) -> str:
    """A value as YAML writes it, as far as that differs from Python."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def one_of(what: str, name: str, names: Iterable[str]) -> str:
    """``name`` if it is one of ``names``; otherwise a ConfigError with the nearest and all of them."""
    names = list(names)
    if name in names:
        return name
    guess = nearest(name, names)
    hint = f"did you mean {guess}? " if guess else ""
    raise ConfigError(f"no {what} {name!r}; {hint}there are: {', '.join(names)}")


def check_choices(section: object, prefix: str) -> None:
    """Fields that take one of a few values hold one of them, also when Python code made the section."""
    for key, hint in get_type_hints(type(section)).items():
        if get_origin(hint) is Literal:
            value = getattr(section, key)
            if value not in get_args(hint):
                allowed = [str(choice) for choice in get_args(hint)]
                guess = nearest(str(value), allowed)
                hinted = f"; did you mean {guess}?" if guess else ""
                require(False, f"{prefix}{key}", value, f"must be one of {', '.join(allowed)}{hinted}")


def check_count(key: str, value: int | None, example: int) -> None:
    """At least 1, or None."""
    require(value is None or value >= 1, key, value, f"must be at least 1, e.g. {key}={example}")


def check_not_negative(key: str, value: float) -> None:
    """Finite, at least 0."""
    require(math.isfinite(value) and value >= 0, key, value, "must be a finite number that is not negative")


def check_positive(key: str, value: float | None, example: float) -> None:
    """Finite and above 0, or None."""
    holds = value is None or (math.isfinite(value) and value > 0)
    require(holds, key, value, f"must be a finite number above 0, e.g. {key}={example:g}")


def check_quantile(key: str, value: float) -> None:
    """Between 0 and 1, both excluded."""
    rule = "must lie between 0 and 1, both excluded; a little above selected / experts is the natural one"
    require(0 < value < 1, key, value, rule)
