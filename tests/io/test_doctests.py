import doctest
import importlib

import pytest

MODULES = [
    "convert.grib", "encoding", "fields", "gaps", "grids", "layout", "order", "reading", "samples", "store", "store_writer",
    "synthetic.heat", "team", "transforms",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_hold(name):
    result = doctest.testmod(importlib.import_module(f"smoe_hpc.io.{name}"))
    assert result.attempted > 0
    assert result.failed == 0
