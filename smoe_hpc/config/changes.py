"""Changes to a recipe as Python gives them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any


def as_overrides(changes: Mapping[str, Any]) -> list[str]:
    """``key=value`` texts for `load_recipe`: text and paths as they are, everything else as JSON, which YAML reads.

    >>> as_overrides({"data.inputs": [-6, 0], "model.damping": None, "name": "a"})
    ['data.inputs=[-6, 0]', 'model.damping=null', 'name=a']
    """
    return [
        f"{key}={os.fspath(value) if isinstance(value, (str, os.PathLike)) else json.dumps(value)}"
        for key, value in changes.items()
    ]
