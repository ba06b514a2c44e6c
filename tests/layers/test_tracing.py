"""torch.export and torch.compile take the layer; what cannot says so in a line."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from smoe_hpc.errors import ConfigError
from smoe_hpc.layers import SpatialMoE2d, end_step

GRID = (4, 6)
X = torch.randn(2, 3, *GRID, generator=torch.Generator().manual_seed(0))


def reloaded(model: nn.Module, **options: object) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(torch.export.export(model, (X,), **options), file)
    file.seek(0)
    return torch.export.load(file).module()


@pytest.mark.parametrize(("gate", "weighted"), [("latent", False), ("latent", True), ("conv", False), ("coordconv", True)])
def test_an_exported_layer_is_the_layer_when_it_is_loaded_again(gate: str, weighted: bool):
    layer = SpatialMoE2d(3, 8, 4, GRID, gate=gate, weighted=weighted)
    end_step(layer, 0)
    assert torch.equal(reloaded(layer.eval())(X), layer(X))


def test_an_exported_layer_is_loaded_by_a_process_that_knows_the_operation(tmp_path: Path):
    layer, file = SpatialMoE2d(3, 8, 4, GRID).eval(), tmp_path / "layer.pt2"
    torch.export.save(torch.export.export(layer, (X,)), file)
    torch.save([X, layer(X)], tmp_path / "expected.pt")
    program = (
        "import sys, torch, smoe_hpc.kernels\n"
        "x, y = torch.load(sys.argv[2])\n"
        "assert torch.equal(torch.export.load(sys.argv[1]).module()(x), y)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", program, str(file), str(tmp_path / "expected.pt")]
    subprocess.run(command, check=True, env=environment, timeout=120)


def test_an_exported_layer_takes_any_batch():
    layer = SpatialMoE2d(3, 8, 4, GRID).eval()
    program = reloaded(layer, dynamic_shapes=({0: torch.export.Dim("batch")},))
    more = torch.cat([X, X, X])
    assert torch.equal(program(more), layer(more))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("how", "message"),
    [
        (torch.jit.script, "torch.jit.script cannot compile SpatialMoE2d"),
        (lambda model: torch.jit.trace(model, X), "torch.jit.trace and ONNX have no form for SpatialMoE2d"),
        (lambda model: torch.onnx.export(model, (X,), io.BytesIO(), dynamo=False), "ONNX have no form for SpatialMoE2d"),
    ],
    ids=["script", "trace", "onnx"],
)
def test_tracers_that_have_no_form_for_it_are_refused(how, message: str):
    model = nn.Sequential(SpatialMoE2d(3, 8, 4, GRID), nn.ReLU()).eval()
    with pytest.raises(ConfigError, match=message) as caught:
        how(model)
    assert "\n" not in str(caught.value)
    assert "use torch.export" in str(caught.value)
    assert model(X).shape == (2, 4, *GRID)


def test_an_export_under_autocast_is_refused():
    layer = SpatialMoE2d(3, 8, 4, GRID).eval()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError, match=r"export outside of torch\.autocast"):
        torch.export.export(layer, (X,))
    half = layer.bfloat16()
    program = torch.export.export(half, (X.bfloat16(),)).module()
    assert torch.equal(program(X.bfloat16()), half(X.bfloat16()))


def test_a_compiled_layer_under_autocast_is_the_layer():
    layer = SpatialMoE2d(3, 8, 4, GRID).eval()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(X), layer(X))
