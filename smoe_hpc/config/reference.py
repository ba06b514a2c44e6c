"""Every key of a recipe explained, for a terminal and as the page docs/recipes.md, from one source: `keys.py`.

The page is written by ``python -m smoe_hpc.config.reference > docs/recipes.md``.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any

from smoe_hpc.config.keys import Key, all_keys, as_override
from smoe_hpc.config.reading import recipe_names, recipe_summary
from smoe_hpc.config.recipe import Recipe

_PAGE = """\
# Recipes and their keys

A recipe is one YAML file that says everything about an experiment. `smoe-hpc train RECIPE key=value` changes any key of it;
`smoe-hpc recipes RECIPE` prints these explanations beside the recipe's own values. A recipe of your own is a file with the
keys that differ from the defaults:

    name: mine
    task: heat
    data:
      store: data/heat

This page is written by `python -m smoe_hpc.config.reference > docs/recipes.md` from the docstrings in `smoe_hpc/config`.

N is the number of experts, K the number of selected experts, F the number of filters of each.

## Recipes that come with the package

"""


def explained(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """By key: ``value`` of this recipe, ``default`` (absent where there is none), ``allowed``, ``meaning``.

    Sections are left out; a key of a section that is null has no ``value``.
    """
    found: dict[str, dict[str, Any]] = {}
    for key in all_keys().values():
        if key.section is not None:
            continue
        entry: dict[str, Any] = {"allowed": key.allowed, "meaning": _text(key)}
        if key.default is not MISSING:
            entry["default"] = key.default
        there, value = _value(recipe, key.name)
        if there:
            entry["value"] = value
        found[key.name] = entry
    return found


def lines(recipe: Recipe, width: int) -> Iterator[str]:
    """The recipe for a terminal: each key with its value, its default, what it may hold and what it means.

    Args:
        recipe: the experiment.
        width: columns of the terminal.
    """
    for section, keys in _by_section():
        if section is not None:
            there, value = _value(recipe, section.name)
            null = "=null" if there and value is None else ""
            yield ""
            yield from _wrap(f"{section.name}{null}: {_text(section)}", width, 0, 4)
        for key in keys:
            there, value = _value(recipe, key.name)
            shown = f"={as_override(value)}" if there else ""
            default = "no default" if key.default is MISSING else f"default {_default(key)}"
            yield from _wrap(f"{key.name}{shown}  ({default}; {key.allowed})", width, 2, 6)
            yield from _wrap(_text(key), width, 6, 6)


def page() -> str:
    """The page of the reference, in Markdown."""
    parts = [_PAGE]
    parts += [f"- `{name}`: {recipe_summary(name)}\n" for name in recipe_names()]
    for section, keys in _by_section():
        if section is None:
            parts.append("\n## At the top\n\n" + _table(keys))
        else:
            text = _text(section)
            parts.append(f"\n## `{section.name}`\n\n{text[:1].upper()}{text[1:]}.\n\n" + _table(keys))
    return "".join(parts)


def _by_section() -> Iterator[tuple[Key | None, list[Key]]]:
    """Sections in order, None for the top, each with the keys that stand in it."""
    every = list(all_keys().values())
    for section in (None, *(key for key in every if key.section is not None)):
        name = "" if section is None else section.name
        yield section, [key for key in every if key.section is None and key.name.rpartition(".")[0] == name]


def _table(keys: list[Key]) -> str:
    rows = ["| key | default | may be | meaning |", "|---|---|---|---|"]
    for key in keys:
        default = "" if key.default is MISSING else f"`{_default(key)}`"
        cells = (f"`{key.name}`", default, key.allowed, _text(key))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _wrap(text: str, width: int, indent: int, further: int) -> list[str]:
    """Lines of a text; what has no space stays whole, to be copied."""
    first, others = " " * indent, " " * further
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def _default(key: Key) -> str:
    return '""' if key.default == "" else as_override(key.default)


def _text(key: Key) -> str:
    """The meaning, with Markdown's quotes in place of a docstring's."""
    return key.meaning.replace("``", "`").removesuffix(".")


def _value(recipe: Recipe, name: str) -> tuple[bool, Any]:
    """Whether the recipe has a value of that name, and which; a section that is null has none below it."""
    owner: Any = recipe
    for part in name.split("."):
        if owner is None:
            return False, None
        owner = getattr(owner, part)
    return True, owner


if __name__ == "__main__":
    sys.stdout.write(page())
