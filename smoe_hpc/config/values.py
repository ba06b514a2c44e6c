"""Values as YAML gives them, fitted to the declared types of the recipe's fields.

Strict where leniency hides mistakes (1.5 epochs, "yes" for text, a number where a list belongs), lenient where nothing
is lost: a whole number is a number. Every refusal is one line: key, value, what is expected, an example to copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from smoe_hpc.config import checks
from smoe_hpc.config.schema import Recipe
from smoe_hpc.errors import ConfigError

_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}

# What an error shows where the default would teach nothing.
_EXAMPLES: dict[str, Any] = {
    "name": "my_experiment",
    "task": "heat",
    "data.store": "data/heat",
    "data.leads": [72, 120],
    "data.validation_leads": [72, 120],
    "data.constants": ["orography"],
    "data.variables": ["t2m"],
    "data.targets": ["t2m"],
    "data.splits.train": "2019-03-01/2019-03-23",
    "data.splits.validation": "2019-03-24/2019-03-26",
    "data.splits.test": "2019-03-27/2019-03-31",
    "model.routing_loss.quantile": 0.5,
    "model.damping.quantile": 0.5,
    "optimizer.gate_lr": 0.01,
    "optimizer.clip": 1.0,
    "schedule.early_stop": 30,
    "training.max_steps": 10000,
    "training.deterministic": True,
    "training.validate_every": 1000,
    "training.stop_at_score": 100.0,
    "training.threads": 2,
    "run.checkpoint_every": 1000,
    "run.checkpoint_seconds": 600.0,
}


@dataclass(frozen=True)
class Known:
    """A key that a recipe may hold: dotted name, declared type, default, and its dataclass if it is a section."""

    key: str
    hint: Any
    default: Any
    section: type | None


@cache
def known() -> dict[str, Known]:
    """Every key that a recipe may hold, by its dotted name, sections included."""
    return {found.key: found for found in _walk(Recipe, "")}


def _walk(section: type, prefix: str) -> Iterator[Known]:
    hints = get_type_hints(section)
    for entry in fields(section):
        hint = hints[entry.name]
        inner = next((m for m in members(hint) if isinstance(m, type) and is_dataclass(m)), None)
        default = entry.default_factory() if callable(entry.default_factory) and inner is None else entry.default
        yield Known(f"{prefix}{entry.name}", hint, default, inner)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{entry.name}.")


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def expected(wanted: Known) -> str:
    """The declared type in words: ``a list, each a whole number``, ``one of zeros, sphere``, ``a number or null``."""
    return _words(wanted.hint, "balanced" if wanted.key == "model.routing_loss.quantile" else "text")


def _words(hint: Any, text: str = "text") -> str:
    words: list[str] = []
    for member in members(hint):
        if get_origin(member) is Literal:
            words.append(f"one of {', '.join(map(str, get_args(member)))}")
        elif get_origin(member) is list:
            words.append(f"a list, each {_words(get_args(member)[0])}")
        elif is_dataclass(member):
            words.append("a section (keys below it)")
        elif member is str:
            words.append(text)
        else:
            words.append(_NAMES[member])
    return " or ".join(words)


def example(wanted: Known) -> str:
    """A line to copy, ``training.batch=32``."""
    if wanted.section is not None:
        return example(known()[f"{wanted.key}.{fields(wanted.section)[0].name}"])
    return f"{wanted.key}={shown(_EXAMPLES.get(wanted.key, wanted.default))}"


def shown(value: Any) -> str:
    """A value as one writes it in an override."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(shown(item) for item in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def parse(key: str, text: str) -> Any:
    """The YAML value of an override's right side."""
    try:
        content: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)
        return content["value"]
    except (YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{key}={text}: not a YAML value ({problem}); quote it if it is text") from None


def fit(hint: Any, value: Any) -> Any:
    """The value as its declared type, nothing lost; ValueError if it is of none of them.

    >>> fit(float | None, 3)
    3.0
    """
    for member in members(hint):
        if get_origin(member) is list:
            if isinstance(value, list):
                return [fit(get_args(member)[0], item) for item in value]
        elif get_origin(member) is Literal:
            if any(value == choice and type(value) is type(choice) for choice in get_args(member)):
                return value
        elif type(value) is member:
            return value
    if float in members(hint) and type(value) is int:
        return float(value)
    raise ValueError(value)


def unknown(key: str) -> ConfigError:
    """The error for a key that no recipe has.

    The nearest key is sought beside it in its own section, then under the same last name in others, then anywhere.
    """
    names = list(known())
    section, _, last = key.rpartition(".")
    beside = [name for name in names if name.rpartition(".")[0] == section]
    same_last = [name for name in names if name.rpartition(".")[2] == last]
    guess = checks.nearest(key, same_last) or next(iter(same_last), None)
    if section and beside:
        near = checks.nearest(last, [name.rpartition(".")[2] for name in beside])
        guess = f"{section}.{near}" if near else guess
    if guess is None and not (section and beside):
        near = checks.nearest(last, [name.rpartition(".")[2] for name in names])
        guess = next((name for name in names if name.rpartition(".")[2] == near), None)
    listed = ", ".join(name.rpartition(".")[2] for name in beside or [name for name in names if "." not in name])
    hint = f"did you mean {guess}?" if guess else f"{section if beside and section else 'its sections'}: {listed}"
    return ConfigError(f"no key {key!r} in a recipe; {hint}")
