"""What the doctor finds, and how it asks other programs, in bounded time."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

from smoe_hpc.errors import SmoeError

SECONDS_PER_LOOK = 20
STATES = ("used", "present", "absent", "problem")


@dataclass(frozen=True)
class Finding:
    """One thing looked for.

    Args:
        name: what was looked for, e.g. "GPU".
        state: "used" by training as it stands, "present" but used only on demand, "absent", or "problem".
        value: what is there, e.g. "NVIDIA H200, 139.8 GiB".
        use: what it will be used for and why; what to do where it is absent or a problem.
    """

    name: str
    state: str
    value: str
    use: str

    def __post_init__(self) -> None:
        if self.state not in STATES:
            raise SmoeError(f"a finding's state is one of {', '.join(STATES)}, not {self.state!r}")


def lines_of(*command: str) -> list[str] | None:
    """What the command prints, or None where it does not exist, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS_PER_LOOK, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return None if done.returncode else [line.strip() for line in done.stdout.splitlines() if line.strip()]


def first_line(*command: str) -> str | None:
    """The first of `lines_of`; None too where there is none."""
    lines = lines_of(*command)
    return lines[0] if lines else None


def match(pattern: str, text: str) -> str:
    """The pattern's group in the text.

    Raises:
        SmoeError: it is not there.
    """
    found = re.search(pattern, text)
    if found is None:
        raise SmoeError(f"{pattern!r} is not in {text[:80]!r}; another system than this was written for")
    return found[1]
