"""How the command reads every path that it takes."""

from __future__ import annotations

import os
from pathlib import Path

from smoe_hpc.files.paths import expanded


def user_path(text: str | os.PathLike[str]) -> Path:
    """The ``parser`` of every path: ``~`` is the home folder, also where no shell replaced it (``--json=~/x``).

    Raises:
        ConfigError: there is no such home folder.
    """
    return Path(expanded(text))
