"""Every example in a docstring holds."""

import doctest
import importlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "smoe_hpc"


def examples() -> list[str]:
    """Modules whose text has an example; links to io and launch are followed."""
    folders = [PACKAGE, PACKAGE / "io", PACKAGE / "launch"]
    found = {path for folder in folders for path in folder.rglob("*.py") if ">>> " in path.read_text()}
    return sorted(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in found)


@pytest.mark.parametrize("name", examples())
def test_examples_in_docstrings_hold(name: str):
    result = doctest.testmod(importlib.import_module(name.removesuffix(".__init__")))
    assert result.attempted > 0
    assert result.failed == 0
