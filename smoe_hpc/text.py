"""Text for people: what comes from outside made harmless for a terminal, and the name that somebody may have meant.

Names, attributes, channels and messages may hold anything: an escape sequence moves the cursor, hides text or renames the
window, a newline forges a line of ours. :func:`printable` is the one place where such characters become visible.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

_HARMFUL = ("Cc", "Cf", "Cs", "Zl", "Zp")  # control, format (direction of writing), half of a pair, ends of lines


def printable(text: object) -> str:
    r"""Text in one line, with characters that are not printable written as Python escapes them.

    >>> printable("a\x1b[31mb\nerror: c")
    'a\\x1b[31mb\\nerror: c'
    >>> printable("Zürich 2 °C")
    'Zürich 2 °C'
    """
    words = str(text)
    if words.isascii() and words.isprintable():
        return words
    return "".join(_escaped(letter) if unicodedata.category(letter) in _HARMFUL else letter for letter in words)


def _escaped(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The valid name that is most like a wrong one, None if none is.

    >>> nearest("trian", ["train", "test"]), nearest("xyz", ["train", "test"])
    ('train', None)
    """
    found = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    return found[0] if found else None
