"""Values as YAML gives them, fitted to the declared types of the recipe's fields.

Strict where leniency hides mistakes (1.5 epochs, "yes" for text, a number where a list belongs), lenient where nothing
is lost: a whole number is a number. Every refusal is one line: key, value, what is expected, an example to copy.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from smoe_hpc.config import bounded_yaml
from smoe_hpc.config.keys import LARGEST, Key, as_override, members
from smoe_hpc.errors import ConfigError
from smoe_hpc.text import nearest

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def parse(key: str, text: str) -> Any:
    """The YAML value of an override's right side."""
    try:
        bounded_yaml.require_small(f"value: {text}")
        content: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)
        return content["value"]
    except bounded_yaml.NotPlainError as error:
        raise ConfigError(f"{key}={text:.40}...: the value {error}; give a text, a number, a list or a section") from None
    except (YAMLError, OmegaConfBaseException) as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{key}={text}: not a YAML value ({problem}); quote it if it is text") from None
    except ValueError as error:  # a number of thousands of digits, a day that no month has
        raise ConfigError(f"{key}={text:.40}: cannot be read ({error}); quote it if it is text") from None


def parse_text(key: str, text: str) -> Any:
    """The value of an override of a key that is text: the text as it stands, unless it is quoted as YAML quotes.

    YAML would make 620 of the range ``10:20``, cut ``data/heat #1`` at its comment, and take ``a: b`` for a mapping. What it
    takes for null (but for ``~``), a truth value or a list is more likely a mistake, and stays what it is.
    """
    stripped = text.strip()
    if stripped[:1] in ("'", '"') and len(stripped) > 1 and stripped[-1] == stripped[0]:
        return parse(key, stripped)
    try:
        value = parse(key, stripped)
    except ConfigError:
        if "${" in stripped:
            raise
        return stripped
    mistaken = (value is None and stripped not in ("", "~")) or isinstance(value, (bool, list))
    return value if mistaken and "#" not in stripped else stripped


def fitted(key: Key, value: Any) -> Any:
    """The value as the key's declared type; ConfigError if it is of another."""
    if isinstance(value, str) and "${" in value:
        return value  # an interpolation: its type shows when it is resolved
    if key.section is not None and value == {}:
        return {}
    try:
        return fit(key.hint, value)
    except ValueError:
        pass
    quoted = repr(value) if isinstance(value, str) else as_override(value)
    guess = nearest(value, map(str, key.choices)) if isinstance(value, str) else None
    hinted = f"did you mean {guess}?" if guess else f"e.g. {key.example}"
    raise ConfigError(f"{key.name}={quoted}: expected {key.allowed}; {hinted}")


def fit(hint: Any, value: Any) -> Any:
    """The value as its declared type, nothing lost.

    Raises:
        ValueError: it is of none of the types, a whole number that nothing can hold, or a text with control characters.

    >>> fit(float | None, 3)
    3.0
    """
    if (type(value) is int and abs(value) > LARGEST) or (type(value) is str and _CONTROL.search(value)):
        raise ValueError(value)
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
