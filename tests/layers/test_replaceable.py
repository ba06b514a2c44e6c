"""Convolutions that are more than they look stay as they are, and a model is replaced as a whole or not at all."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from smoe_hpc.compat import module_hooks
from smoe_hpc.errors import ConfigError
from smoe_hpc.layers import SpatialMoE2d, make_gate, replace_convolutions, routing_loss

X = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))


def conv(**options: object) -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1, **options)


class Periodic(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), self.weight, self.bias)


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(x, weight, self.bias, padding=1)


def changed(change: Callable[[nn.Conv2d], object]) -> nn.Conv2d:
    made = conv()
    change(made)
    return made


def with_forward(module: nn.Conv2d) -> None:
    module.forward = lambda x: -F.conv2d(x, module.weight, module.bias, padding=1)  # type: ignore[method-assign]


def noted(module: nn.Module, *ignored: object) -> None:
    pass


HOOKED: dict[str, Callable[[nn.Conv2d], object]] = {
    "forward hook, noted": lambda m: m.register_forward_hook(noted),
    "forward pre-hook, noted": lambda m: m.register_forward_pre_hook(noted),
    "backward hook, noted": lambda m: m.register_full_backward_hook(noted),
    "backward pre-hook, noted": lambda m: m.register_full_backward_pre_hook(noted),
    "state-dict hook, noted": lambda m: m.register_state_dict_post_hook(noted),
    "it has a state-dict hook, noted": lambda m: m.register_load_state_dict_pre_hook(noted),
    "its weight has a hook": lambda m: m.weight.register_hook(lambda g: 2 * g),
    "its bias has a hook": lambda m: m.bias.register_post_accumulate_grad_hook(noted),
    "its forward has been replaced": with_forward,
    "more than a weight and a bias: mask": lambda m: m.register_buffer("mask", torch.ones(4)),
    "its weight is frozen": lambda m: m.weight.requires_grad_(False),
    "its bias is frozen": lambda m: m.bias.requires_grad_(False),
    "WeightNorm": weight_norm,
    "SpectralNorm": spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reason", HOOKED)
def test_what_is_hooked_or_frozen_is_left(reason: str):
    model = nn.Sequential(conv(), changed(HOOKED[reason]))
    before = model[1].eval()  # spectral normalisation moves on in training
    expected = before(X)
    model, report = replace_convolutions(model, X, num_experts=8)
    assert report.replaced == ["0"]
    assert reason in report.left["1"]
    assert model[1] is before
    assert torch.equal(before(X), expected)


def test_a_convolution_whose_own_way_was_patched_is_left():
    model = nn.Sequential(conv(), conv())
    patched = model[1]
    patched._conv_forward = lambda x, weight, bias: nn.functional.conv2d(  # type: ignore[method-assign]
        nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias
    )
    _, report = replace_convolutions(model, X, num_experts=8)
    assert (report.replaced, report.left) == (["0"], {"1": "its _conv_forward has been replaced"})
    assert model[1] is patched


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (Periodic(4, 4, 3, padding=1), "a Periodic may do more than the torch.nn.Conv2d it is derived from"),
        (Standardised(4, 4, 3, padding=1), "a Standardised may do more"),
        (parametrizations.weight_norm(conv()), "its weight is parametrised"),
        (parametrizations.spectral_norm(conv()), "its weight is parametrised"),
        (nn.ConvTranspose2d(4, 4, 3, padding=1), "a ConvTranspose2d is no torch.nn.Conv2d"),
        (nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 4, 3, padding=1), nn.Unflatten(2, (8, 12))), "a Conv1d is no"),
        (nn.Sequential(nn.Unflatten(1, (4, 1)), nn.Conv3d(4, 4, 1), nn.Flatten(1, 2)), "a Conv3d is no"),
        (SpatialMoE2d(4, 8, 4, (8, 12)), "it is an SMoE layer already"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_is_no_plain_convolution_is_left(layer: nn.Module, reason: str):
    model = nn.Sequential(conv(), layer)
    model.eval()  # spectral normalisation moves on in training
    expected = layer(X)
    _, report = replace_convolutions(model, X, num_experts=8)
    assert report.replaced == ["0"]
    assert len(report.left) == 1
    assert reason in next(iter(report.left.values()))
    assert torch.equal(layer(X), expected)


def test_convolutions_inside_an_smoe_layer_are_left():
    class OwnGate(type(make_gate("conv", 8, 4, (8, 12), in_channels=4))):  # type: ignore[misc]
        def make_network(self, in_channels: int, **options: object) -> nn.Module:
            return nn.Conv2d(in_channels, self.num_experts, 3, padding=1)

    gate = OwnGate(8, 4, (8, 12), in_channels=4)
    _, report = replace_convolutions(nn.Sequential(conv(), SpatialMoE2d(4, 8, 4, (8, 12), gate=gate)), X, num_experts=8)
    assert report.replaced == ["0"]
    assert report.left["1.gate.network"] == "it is a part of an SMoE layer"


def test_tied_parameters_are_left():
    model = nn.Sequential(conv(), conv(), conv(), nn.Conv2d(4, 4, 3, padding=1, bias=False))
    model[1].weight = model[0].weight
    model[3].weight = nn.Parameter(model[2].weight.detach())  # two parameters, one memory
    model.append(conv())
    both = torch.randn(6, 4, 3, 3)
    model.append(nn.Sequential(conv(), conv()))
    model[5][0].weight, model[5][1].weight = nn.Parameter(both[:4]), nn.Parameter(both[2:])  # which overlap
    model.append(conv())
    model.register_buffer("average", model[6].weight.detach())
    _, report = replace_convolutions(model, X, num_experts=8)
    assert report.replaced == ["4"]
    assert report.left["0"] == "its weight is tied to a parameter or buffer of 1"
    assert report.left["3"] == "its weight is tied to a parameter or buffer of 2"
    assert report.left["5.0"] == "its weight is tied to a parameter or buffer of 5.1"
    assert report.left["6"] == "its weight is tied to a parameter or buffer of the model itself"
    assert model[1].weight is model[0].weight


def test_lazy_convolutions_are_replaced_once_they_have_weights():
    def lazy() -> nn.Module:
        return nn.Sequential(nn.LazyConv2d(4, 3, padding=1), conv())

    _, report = replace_convolutions(lazy(), X, num_experts=8)
    assert report.replaced == ["0", "1"]
    _, report = replace_convolutions(lazy(), grid_of={"0": (8, 12), "1": (8, 12)}, num_experts=8)
    assert report.replaced == ["1"]
    assert "a LazyConv2d has no weights before the model has run once" in report.left["0"]


# -- what runs -----------------------------------------------------------------------------------------------------------


class Listed(nn.Module):
    """Convolutions in a list of modules, and the last of them in a plain list besides."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([conv() for _ in range(3)])
        self.plain = [self.layers[2]]
        self.both = both

    def forward(self, x: Tensor) -> Tensor:
        for layer in [*self.layers[:2], *self.plain, *(self.layers[2:] if self.both else [])]:
            x = torch.relu(layer(x))
        return x


@pytest.mark.parametrize("both", [False, True])
def test_a_layer_that_the_model_calls_from_a_plain_list_is_left(both: bool):
    model, report = replace_convolutions(Listed(both), X, num_experts=8, gate_sharing=True)
    assert report.replaced == ["layers.0", "layers.1"]
    assert "calls it by another way than its modules" in report.left["layers.2"]
    assert type(model.layers[2]) is nn.Conv2d
    assert model.plain[0] is model.layers[2]
    assert model.layers[0][0].gate is model.layers[1][0].gate
    (model(X).square().mean() + routing_loss(model)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_model_of_which_nothing_is_called_by_its_modules_is_refused_and_left():
    model = Listed(False)
    model.layers = model.layers[2:]
    model.forward = lambda x: model.plain[0](x)  # type: ignore[method-assign]
    kept = model.layers[0]
    with pytest.raises(ConfigError, match=r"no convolution of the model can become an SMoE layer.*plain list"):
        replace_convolutions(model, X, num_experts=8)
    assert model.layers[0] is kept


class Nosy(nn.Module):
    """Looks into its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = conv(), conv()
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).to(self.second.weight.dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"does not run on the example input \(AttributeError: .*'weight'\); exclude those"),
        ({"num_experts": 3}, "'first' selects 4 experts but num_experts=3"),
        ({"num_experts": lambda selected: next(counts)}, "'second' selects 4 experts but num_experts=3"),
        ({"damping": None, "routing_loss": None, "gate": "no such gate"}, "no such gate"),
        ({"weighted": True, "unknown": 1}, "unknown"),
    ],
)
def test_a_refusal_leaves_the_model_as_it_was(options: dict, message: str):
    global counts
    counts = iter([8, 3])
    model = Nosy().train()
    model.second.eval()
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    with pytest.raises((ConfigError, TypeError), match=message):
        replace_convolutions(model, X, **{"num_experts": 8, **options})
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert model.again is model.first
    assert (model.training, model.second.training) == (True, False)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(module_hooks(m) for m in model.modules())


def test_a_wrapped_model_is_refused():
    class DistributedDataParallel(nn.Sequential):
        pass

    with pytest.raises(ConfigError, match=r"the model is in DistributedDataParallel.*then wrap"):
        replace_convolutions(DistributedDataParallel(conv()), X, num_experts=8)


# -- the start -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [None, nn.init.kaiming_normal_, nn.init.xavier_uniform_, nn.init.zeros_])
@pytest.mark.parametrize("order", ["id", "rank"])
def test_what_comes_out_is_as_large_as_before(start: Callable | None, order: str):
    torch.manual_seed(0)
    layer = nn.Conv2d(24, 32, 3, padding=1)
    if start is nn.init.kaiming_normal_:
        start(layer.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's ResNets start
        nn.init.zeros_(layer.bias)
    elif start is not None:
        start(layer.weight)
    x = torch.randn(8, 24, 16, 16)
    before = layer(x).std().item()
    options = {"num_experts": 64, "expert_order": order, "generator": torch.Generator().manual_seed(0)}
    model, _ = replace_convolutions(nn.Sequential(layer), x, **options)
    assert model(x).std().item() == pytest.approx(before, rel=0.05)
    assert math.isfinite(before)


def test_all_experts_selected_is_warned_of():
    with pytest.warns(UserWarning, match="layer '0' selects 4 of 4 experts: all of them"):
        replace_convolutions(nn.Sequential(conv()), X, num_experts=4)
