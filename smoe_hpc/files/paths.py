"""Paths as people write them: ``~`` is their home folder wherever no shell has put it in already.

A shell replaces ``~`` at the start of a word alone: not behind ``data.store=`` or ``--json=``, in quotes, or in a recipe.
"""

from __future__ import annotations

import os

from smoe_hpc.errors import ConfigError


def expanded(path: str | os.PathLike[str]) -> str:
    """The path with ``~`` or ``~user`` at its start replaced by that home folder. A folder of that name is ``./~``.

    Raises:
        ConfigError: there is no such user, or this one has no home folder.

    >>> expanded("data/~heat"), expanded("./~")
    ('data/~heat', './~')
    """
    text = os.fspath(path)
    found = os.path.expanduser(text)
    if text.startswith("~") and found == text:
        raise ConfigError(f"{text}: there is no home folder of {text.partition('/')[0]!r}; write the path out, or ./{text}")
    return found
