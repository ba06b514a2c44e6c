"""A user's own network becomes an SMoE network."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from smoe_hpc.compat import module_hooks
from smoe_hpc.errors import ConfigError
from smoe_hpc.layers import Damping, SpatialMoE2d, routing_loss, spatial_layers
from smoe_hpc.layers.replacing.calls import find_grids
from smoe_hpc.layers.replacing.replace import replace_convolutions


class Network(nn.Module):
    """Two stages, the second on half the grid; something of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.ModuleList([nn.Conv2d(8, 8, 3, padding="same") for _ in range(2)])
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(12, 12, 5, padding=2)
        self.twice = nn.Conv2d(12, 12, 3, padding=1)
        self.again = self.twice
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        for layer in self.block:
            x = x + torch.relu(layer(x))
        return self.head(self.again(self.twice(self.deep(self.down(x)))))


EXAMPLE = torch.zeros(2, 3, 8, 12)


def double(selected: int) -> int:
    return 2 * selected


def test_what_is_replaced_and_what_is_left():
    before = Network()
    bias = before.block[1].bias.detach().clone()
    model, report = replace_convolutions(before, EXAMPLE, num_experts=double)
    assert model is before
    assert report.replaced == ["stem", "block.0", "block.1", "deep", "twice"]
    assert report.left == {"down": "stride (2, 2) changes the grid", "head": "kernel 1x1 is smaller than 3"}
    assert "block.0: 8 of 16 experts on 8x12, gate 1" in str(report)
    assert "head: left, kernel 1x1" in str(report)
    assert model.again is model.twice
    stem, (layer, kept) = model.stem, model.block[1]
    assert isinstance(stem, SpatialMoE2d)
    assert (stem.num_experts, stem.selected, stem.grid, stem.expert_order) == (16, 8, (8, 12), "id")
    assert layer.in_channels == 8
    assert torch.equal(kept.bias, bias)
    assert model.deep[0].grid == (4, 6)
    assert model.deep[0].kernel_size == 5
    assert model(torch.randn(2, 3, 8, 12)).shape == (2, 2, 4, 6)


def test_it_learns():
    torch.manual_seed(0)
    model, _ = replace_convolutions(Network(), EXAMPLE, num_experts=double, gate_sharing=True)
    x, y = torch.randn(4, 3, 8, 12), torch.randn(4, 2, 4, 6)
    loss = (model(x) - y).square().mean()
    (loss + routing_loss(model)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert model.stem.gate.logits.grad.abs().max() > 0


def test_gates_of_equal_sizes_are_shared():
    model, report = replace_convolutions(Network(), EXAMPLE, num_experts=double, gate_sharing=True)
    assert model.stem.gate is model.block[0][0].gate is model.block[1][0].gate
    assert model.deep[0].gate is model.twice[0].gate  # a kernel of another size is no obstacle
    assert [layer.gate for layer in report.layers if layer.reason is None] == [0, 0, 0, 1, 1]
    assert sum(layer.gate is model.stem.gate for layer in spatial_layers(model)) == 3
    _, report = replace_convolutions(Network(), EXAMPLE, num_experts=double)
    assert [layer.gate for layer in report.layers if layer.reason is None] == [0, 1, 2, 3, 4]


def test_filters_per_expert_and_layer_options():
    model, report = replace_convolutions(
        Network(), EXAMPLE, num_experts=6, filters_per_expert=4, damping=Damping(factor=0.1), expert_order="rank"
    )
    assert (model.deep[0].selected, model.deep[0].filters_per_expert) == (3, 4)
    assert model.stem.damping == Damping(factor=0.1)
    assert model.stem.expert_order == "rank"
    _, report = replace_convolutions(Network(), EXAMPLE, num_experts=2, filters_per_expert=8)
    assert report.left["deep"] == "12 channels are not a multiple of filters_per_expert=8"


def test_exclude_leaves_a_whole_branch():
    _, report = replace_convolutions(Network(), EXAMPLE, num_experts=double, exclude=("block", "deep"))
    assert report.replaced == ["stem", "twice"]
    assert report.left["block.1"] == report.left["deep"] == "excluded"


def test_grids_given_by_name():
    _, report = replace_convolutions(Network(), grid_of={"stem": (8, 12)}, num_experts=16)
    assert report.replaced == ["stem"]
    assert "no grid is known" in report.left["block.0"]


def test_finding_grids_changes_nothing():
    model = Network().train()
    model.norm.eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    grids = find_grids(model, (torch.randn(2, 3, 8, 12),))
    assert grids["down"] == {(4, 6)}
    assert model.training
    assert not model.norm.training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not module_hooks(model.stem)


@pytest.mark.parametrize(
    ("convolution", "reason"),
    [
        (nn.Conv2d(4, 4, (3, 5), padding="same"), "kernel 3x5 is not odd and square"),
        (nn.Conv2d(4, 4, 3, padding=1, groups=2), "2 groups"),
        (nn.Conv2d(4, 4, 3, padding=2, dilation=2), r"dilation \(2, 2\)"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding mode 'circular'"),
        (nn.Conv2d(4, 4, 3), r"padding \(0, 0\) changes the grid"),
    ],
)
def test_convolutions_that_no_layer_can_stand_for(convolution: nn.Conv2d, reason: str):
    with pytest.raises(ConfigError, match=reason):
        replace_convolutions(nn.Sequential(convolution), torch.zeros(1, 4, 8, 8), num_experts=8)


def test_a_convolution_on_several_grids_is_left():
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.same = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return self.same(self.same(self.first(x))[..., ::2, ::2])

    _, report = replace_convolutions(Pyramid(), torch.zeros(1, 4, 8, 8), num_experts=8)
    assert report.left == {"same": "it works on several grids [(4, 4), (8, 8)]"}


def test_a_model_that_is_one_convolution_in_float64():
    model, report = replace_convolutions(
        nn.Conv2d(2, 4, 3, padding=1).double(), torch.zeros(1, 2, 4, 4).double(), num_experts=8
    )
    assert report.replaced == [""]
    assert model(torch.zeros(1, 2, 4, 4).double()).dtype == torch.float64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 8}, "'deep' selects 12 experts but num_experts=8"),
        ({"num_experts": 32, "grid_of": {}}, "either an example_input or grid_of"),
        ({"num_experts": 32, "exclude": ("blocks",)}, "exclude names 'blocks'"),
        ({"num_experts": 32, "gate_sharing": True, "gate": "conv"}, "share only latent gates"),
        ({"num_experts": 32, "exclude": ("",)}, "no convolution of the model can"),
    ],
)
def test_requests_that_cannot_be_met(arguments: dict, message: str):
    model = Network()
    with pytest.raises(ConfigError, match=message):
        replace_convolutions(model, EXAMPLE, **arguments)
    assert not any(isinstance(module, SpatialMoE2d) for module in model.modules())  # as it was


def test_the_example_of_the_documentation_says_what_stands_there(capsys: pytest.CaptureFixture[str]):
    page = (Path(__file__).parents[2] / "docs" / "layer.md").read_text(encoding="utf-8")
    ((example, said),) = re.findall(r"```python\n(.*?)```\n\n((?:    [^\n]*\n)+)", page, re.DOTALL)
    exec(compile(example, "layer.md", "exec"), {})
    assert capsys.readouterr().out == textwrap.dedent(said)


def test_a_model_without_convolutions():
    with pytest.raises(ConfigError, match=r"no torch\.nn\.Conv2d"):
        replace_convolutions(nn.Linear(2, 2), torch.zeros(1, 2), num_experts=4)
