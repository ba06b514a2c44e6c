"""The kernels' sources: all of them are part of the package, and every include names a file that is there."""

import configparser
import re
from pathlib import Path

import pytest

from smoe_hpc.kernels.build import places

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(path for path in places.SOURCES.rglob("*") if path.is_file())


def test_every_source_is_packaged():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    patterns = [pattern.strip() for pattern in parser["options.package_data"]["*"].split(",")]
    packaged = {path for pattern in patterns for path in places.SOURCES.parent.glob(pattern)}
    assert FILES
    assert packaged.issuperset(FILES)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(places.SOURCES).as_posix())
def test_every_include_is_there(path: Path):
    """Beside the file or, as the compiler is told, below the folder of its device."""
    device = places.SOURCES / path.relative_to(places.SOURCES).parts[0]
    for name in re.findall(r'^#include "(.+)"$', path.read_text(), re.MULTILINE):
        assert (path.parent / name).exists() or (device / name).exists(), name
