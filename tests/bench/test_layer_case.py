"""Cases of the benchmark of the layer: how they are named, and the work and bytes that they need."""

from __future__ import annotations

from dataclasses import replace

import pytest

from smoe_hpc.bench.layer.case import Case, Shape, cases_of, chosen_cases, parse_shape
from smoe_hpc.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("128x256 N1024", Shape(8, 128, (128, 256), 1024, 128)),
        ("B32 32x64 N512 F16", Shape(32, 128, (32, 64), 512, 8, 16)),
        ("B2, C3, 6x8, N5, K2, F2, k1", Shape(2, 3, (6, 8), 5, 2, 2, 1)),
        ("4x4 N3", Shape(8, 128, (4, 4), 3, 3)),
    ],
)
def test_a_text_names_a_shape(text: str, meant: Shape):
    assert parse_shape(text) == meant == parse_shape(str(meant))


@pytest.mark.parametrize("text", ["N4", "4x4", "4x4 N4 Z3", "4x4 N4 K5", "4x4 N4 k2", "0x4 N4", "4x4 N4 F0"])
def test_a_text_that_names_none_is_refused(text: str):
    with pytest.raises(ConfigError):
        parse_shape(text)


def test_the_selections_cover_what_is_to_be_shown():
    full = cases_of("full")
    assert len(set(full)) == len(full)
    assert set(cases_of("quick")) < set(full)
    shapes = {case.shape for case in full}
    assert {shape.filters for shape in shapes} == {1, 8, 16}
    assert all((shape.out_channels, shape.channels) == (128, 128) for shape in shapes)
    assert {(s.grid, s.num_experts) for s in shapes if s.filters == 1} >= {
        (grid, experts) for grid in ((32, 64), (128, 256)) for experts in (128, 256, 1024, 4096, 8192)
    }
    assert {(s.grid, s.num_experts) for s in shapes if s.filters == 16} == {
        (grid, experts) for grid in ((32, 64), (128, 256)) for experts in (64, 512)
    }
    assert {case.routing for case in full} == {"smooth", "random", "learned"}
    assert chosen_cases("quick", ["4x4 N3"], ["random", "learned"]) == tuple(
        Case(parse_shape("4x4 N3"), kind) for kind in ("random", "learned")
    )
    with pytest.raises(ConfigError, match="'rough' is not known"):
        chosen_cases("quick", [], ["rough"])
    with pytest.raises(ConfigError, match="'fast' is not known"):
        cases_of("fast")


def test_useful_work_and_least_bytes_by_hand():
    shape = Shape(batch=2, channels=4, grid=(3, 5), num_experts=7, selected=2, filters=3)
    assert shape.useful_flop("forward") == 2 * (2 * 15) * 6 * (4 * 9)
    assert shape.useful_flop("step") == shape.useful_flop("backward") == 3 * shape.useful_flop("forward")
    assert shape.useful_flop("select") == 0
    x, y, weight, index = 2 * 15 * 4 * 2, 2 * 15 * 6 * 2, 7 * 3 * 4 * 9 * 4, 15 * 2 * 4
    assert shape.least_bytes("forward", 2, 4) == x + weight + index + y
    assert shape.least_bytes("backward", 2, 4) == 3 * x + 3 * weight + 2 * index + 2 * y
    assert shape.least_bytes("step", 2, 4) - shape.least_bytes("backward", 2, 4) == 2 * 7 * 15 * 4
    assert shape.least_bytes("select", 2, 4) == 7 * 15 * 4 + index
    plain = replace(shape, num_experts=2)  # a plain convolution with as many outputs, which reads no index
    assert plain.least_bytes("forward", 2, 2, indexed=False) == x + 2 * 3 * 4 * 9 * 2 + y
