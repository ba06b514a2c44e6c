"""YAML that may come from anybody: its size is bounded before anything is built from it.

A few lines of YAML can stand for billions of values, by aliases of aliases, or by interpolations of interpolations; a
thousand brackets overflow the stack of whoever builds them. A recipe has some hundred values, three deep.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from smoe_hpc.files.regular import NotPlainError, read_bytes

MOST_BYTES = 1 << 20
MOST_VALUES = 20_000  # keys, values, lists and mappings, those of aliases included
MOST_DEPTH = 20
MOST_INTERPOLATIONS = 16
TAGS = {f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null", "seq", "map")}


def read_text(path: Path) -> str:
    """A regular file of at most ``MOST_BYTES`` in UTF-8.

    Raises:
        OSError: it cannot be read.
        NotPlainError: no regular file, or a larger one.
        UnicodeDecodeError: other bytes.
    """
    return read_bytes(path, MOST_BYTES).decode()


def require_small(text: str) -> None:
    """Raise unless the text, with its aliases written out, is small.

    Raises:
        NotPlainError: more values, deeper, an alias within itself, more interpolations than any recipe has, or a tag.
        yaml.YAMLError: no YAML.
    """
    if text.count("${") > MOST_INTERPOLATIONS:
        raise NotPlainError(f"has more than {MOST_INTERPOLATIONS} interpolations (${{...}}); write their values out")
    whole: dict[str, int] = {}  # values that an anchor stands for
    open_nodes: list[tuple[str | None, int]] = []  # anchor and values so far of each list and mapping that has not ended
    total = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        added = 0
        tag = getattr(event, "tag", None)
        if tag not in (None, "!") and tag not in TAGS:
            raise NotPlainError(f"has a value of the kind {tag!r:.60}; a recipe has texts, numbers, lists and sections")
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in whole:
                raise NotPlainError(f"has an alias *{event.anchor} without a value, or within its own; write the value out")
            added = whole[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            added = 1
            if event.anchor is not None:
                whole[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, total))
            added = 1
            if event.anchor is not None:
                whole.pop(event.anchor, None)
            if len(open_nodes) > MOST_DEPTH:
                raise NotPlainError(f"is nested more than {MOST_DEPTH} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            if anchor is not None:
                whole[anchor] = total - before
        total += added
        if total > MOST_VALUES:
            raise NotPlainError(f"stands for more than {MOST_VALUES:,} values")
