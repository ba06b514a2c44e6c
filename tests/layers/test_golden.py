"""The layer against vectors made with the authors' layer: plain ``loss.backward()``, float32."""

from pathlib import Path

import numpy as np
import pytest
import torch

from smoe_hpc.layers import Damping, RoutingLoss, SpatialMoE2d, routing_loss, routing_metrics

pytestmark = pytest.mark.golden


def relative(ours: torch.Tensor, theirs: np.ndarray) -> float:
    """Largest difference as a share of the largest value."""
    return float(np.abs(ours.detach().double().numpy() - theirs).max() / np.abs(theirs).max())


def layer_of(vectors: dict[str, np.ndarray]) -> SpatialMoE2d:
    layer = SpatialMoE2d(
        vectors["x"].shape[1],
        int(vectors["num_experts"]),
        int(vectors["selected_experts"]),
        vectors["x"].shape[2:],
        weighted=bool(vectors["weighted"]),
        routing_loss=RoutingLoss(float(vectors["quantile"])),
        damping=Damping(float(vectors["damping"])),
    )
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(vectors["weight"])[:, None])
        layer.gate.logits.copy_(torch.from_numpy(vectors["gate"]))
    return layer


@pytest.mark.parametrize("number", range(5))
@pytest.mark.parametrize("with_routing_loss", [False, True])
def test_layer_equals_the_published_one(number: int, with_routing_loss: bool, golden_dir: Path):
    vectors = dict(np.load(golden_dir / f"layer_{number}.npz"))
    layer = layer_of(vectors)
    x = torch.from_numpy(vectors["x"]).requires_grad_()
    y = layer(x)
    loss = (y - torch.from_numpy(vectors["target"])).square().mean()
    (loss + routing_loss(layer) if with_routing_loss else loss).backward()
    assert torch.equal(layer.gate.routing(layer.gate.logits, "rank").indices, torch.from_numpy(vectors["indices"]))
    pairs = {"output": y, "loss": loss, "grad_x": x.grad, "grad_weight": layer.weight.grad[:, 0]}
    if "routing_loss" in vectors:
        pairs |= {"routing_loss": routing_metrics(layer)["routing_loss"], "grad_gate": layer.gate.logits.grad}
    else:
        assert layer.gate.logits.grad is None
    for name, ours in pairs.items():
        assert relative(ours, vectors[name]) <= 1e-5, name
