"""Which of this project's requirements an interpreter does not meet.

Run as a script by the interpreter in question, ``python launch/requirements.py EXTRA ...`` prints the missing ones, one
a line, and nothing where all is there. It needs neither this package nor torch.
"""

from __future__ import annotations

import configparser
import importlib.metadata
import sys
from collections.abc import Iterable
from pathlib import Path

try:
    from packaging.requirements import Requirement
except ImportError:  # an interpreter with pip and nothing else
    from pip._vendor.packaging.requirements import Requirement  # type: ignore[assignment]


def declared(setup_cfg: Path, extras: Iterable[str]) -> list[str]:
    """Requirements of the package and of the extras, as setup.cfg states them.

    Raises:
        KeyError: an extra that setup.cfg does not have.
    """
    parser = configparser.ConfigParser()
    parser.read(setup_cfg)
    blocks = [parser["options"]["install_requires"]]
    blocks += [parser["options.extras_require"][extra] for extra in extras]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def unmet(requirements: Iterable[str]) -> list[str]:
    """Those that are not installed for this interpreter, or in another version."""
    missing = []
    for text in requirements:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(text)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            missing.append(text)
    return missing


if __name__ == "__main__":
    print("\n".join(unmet(declared(Path(__file__).resolve().parent.parent / "setup.cfg", sys.argv[1:]))))
