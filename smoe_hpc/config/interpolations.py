"""What ``${...}`` in a recipe may stand for: another key of the recipe, or one of a few variables of the environment.

What is resolved goes into the names of folders, into config.yaml and into weights, and a recipe may come from anybody: a
variable that holds a secret must not be copied there. So only variables that say where and who are resolved, and no other
function of OmegaConf's.
"""

from __future__ import annotations

import re
from typing import Any

from smoe_hpc.errors import ConfigError

_PREFIX = "SMOE_"
_VARIABLES = (
    *("USER", "LOGNAME", "HOME", "TMPDIR", "SCRATCH", "WORK", "PROJECT"),
    *("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_SUBMIT_DIR", "SLURM_TMPDIR"),
)
_KEY = re.compile(r"\$\{\s*[\w.\[\]]+\s*\}")
_VARIABLE = re.compile(r"\$\{\s*oc\.env\s*:\s*(\w+)\s*(?:,[^{}$]*)?\}")


def refuse_others(key: str, value: Any) -> None:
    """Refuse what is not resolved, in a value, its lists and its mappings.

    Raises:
        ConfigError: the value names a variable that is not resolved, or another function.
    """
    if isinstance(value, dict):
        for name, inner in value.items():
            refuse_others(key, name)
            refuse_others(key, inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            refuse_others(key, inner)
    elif isinstance(value, str) and "${" in value:
        _refuse_others(key, value)


def _refuse_others(key: str, text: str) -> None:
    for name in _VARIABLE.findall(text):
        if name not in _VARIABLES and not name.startswith(_PREFIX):
            raise ConfigError(
                f"{key}: the variable {name} is not looked up, for what it holds would stand in folders, config.yaml and "
                f"weights; write the value out, or set a variable {_PREFIX}... to it (also looked up: {', '.join(_VARIABLES)})"
            )
    left = _KEY.sub("", _VARIABLE.sub("", text))
    if "${" in left:
        raise ConfigError(
            f"{key}={text!r}: ${{...}} may hold another key, e.g. ${{name}}, or a variable, e.g. ${{oc.env:SCRATCH}}, and "
            "nothing else; write the value out"
        )
