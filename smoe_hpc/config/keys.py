"""Every key that a recipe may hold: declared type, default, meaning, and a line to copy.

All of it is read off the dataclasses: types and defaults from their fields, the meaning from "Attributes:" in their docstrings.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from smoe_hpc.config.recipe import Recipe
from smoe_hpc.errors import ConfigError
from smoe_hpc.text import nearest

LARGEST = 2**63  # of a whole number
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", NoneType: "null"}

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
class Key:
    """A key that a recipe may hold.

    Attributes:
        name: with dots, ``model.gate.kind``.
        hint: declared type.
        default: ``dataclasses.MISSING`` where there is none, and for sections.
        meaning: in words, as the owner's docstring has it.
        section: its dataclass if it is a section.
    """

    name: str
    hint: Any
    default: Any
    meaning: str
    section: type | None

    @property
    def allowed(self) -> str:
        """The declared type in words: ``a list, each a whole number``, ``one of zeros, sphere``, ``a number or null``."""
        return _in_words(self.hint)

    @property
    def choices(self) -> list[Any]:
        """The values of a key that takes one of a few; empty for any other."""
        return [choice for member in members(self.hint) if get_origin(member) is Literal for choice in get_args(member)]

    @property
    def example(self) -> str:
        """A line to copy, ``training.batch=32``."""
        if self.section is not None:
            return all_keys()[f"{self.name}.{fields(self.section)[0].name}"].example
        return f"{self.name}={as_override(_EXAMPLES.get(self.name, self.default))}"


@cache
def all_keys() -> dict[str, Key]:
    """Every key that a recipe may hold, by its dotted name, sections included, each before what it holds."""
    return {found.name: found for found in _walk(Recipe, "")}


def _walk(section: type, prefix: str) -> Iterator[Key]:
    hints, meanings = get_type_hints(section), attributes(section)
    for entry in fields(section):
        hint = hints[entry.name]
        inner = next((m for m in members(hint) if isinstance(m, type) and is_dataclass(m)), None)
        made = entry.default_factory() if entry.default_factory is not MISSING and inner is None else entry.default
        yield Key(f"{prefix}{entry.name}", hint, made, meanings.get(entry.name, ""), inner)
        if inner is not None:
            yield from _walk(inner, f"{prefix}{entry.name}.")


def attributes(section: type) -> dict[str, str]:
    """Meaning of each field, from "Attributes:" in the docstring of a dataclass."""
    _, _, listed = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")
    block = re.split(r"\n\n", listed, maxsplit=1)[0]
    entries = re.split(r"^ {4}(\w+): ", block, flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the type alone."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _in_words(hint: Any) -> str:
    words: list[str] = []
    for member in members(hint):
        if get_origin(member) is Literal:
            choices = get_args(member)
            words.append(f"one of {', '.join(map(str, choices))}" if len(choices) > 1 else str(choices[0]))
        elif get_origin(member) is list:
            words.append(f"a list, each {_in_words(get_args(member)[0])}")
        elif is_dataclass(member):
            words.append("a section (keys below it)")
        else:
            words.append(_WORDS[member])
    return (", or " if any("list" in word for word in words) else " or ").join(words)


def as_override(value: Any) -> str:
    """A value as one writes it in an override."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{','.join(as_override(item) for item in value)}]"
    if isinstance(value, int) and abs(value) > LARGEST:  # Python refuses to write out the longest
        return f"{hex(value)[:20]}..."
    if isinstance(value, float) and float(f"{value:g}") == value:
        return f"{value:g}"
    return str(value)


def unknown(key: str) -> ConfigError:
    """The error for a key that no recipe has.

    The nearest key is sought beside it in its own section, then under the same last name in others, then anywhere.
    """
    names = list(all_keys())
    section, _, last = key.rpartition(".")
    beside = [name for name in names if name.rpartition(".")[0] == section]
    same_last = [name for name in names if name.rpartition(".")[2] == last]
    guess = nearest(key, same_last) or next(iter(same_last), None)
    if section and beside:
        near = nearest(last, [name.rpartition(".")[2] for name in beside])
        guess = f"{section}.{near}" if near else guess
    if guess is None and not (section and beside):
        near = nearest(last, [name.rpartition(".")[2] for name in names])
        guess = next((name for name in names if name.rpartition(".")[2] == near), None)
    listed = ", ".join(name.rpartition(".")[2] for name in beside or [name for name in names if "." not in name])
    hint = f"did you mean {guess}?" if guess else f"{section if beside and section else 'its sections'}: {listed}"
    return ConfigError(f"no key {key!r} in a recipe; {hint}")
