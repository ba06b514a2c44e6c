"""What an error says of a name that is not known."""

from __future__ import annotations

from collections.abc import Iterable

from smoe_hpc.text import nearest

_MOST = 40  # names in a message


def known_names(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: what may have been meant, and what there is.

    >>> known_names("t2n", ["t2m", "z500"])
    "did you mean 't2m'? Known: t2m, z500"
    """
    known = list(known)
    close = nearest(name, known)
    listing = ", ".join(known[:_MOST]) + (", ..." if len(known) > _MOST else "")
    return (f"did you mean {close!r}? " if close else "") + f"Known: {listing}"
