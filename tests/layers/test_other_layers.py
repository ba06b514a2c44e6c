"""The rows of the table beside the spatial mixture of experts, each against a slow and obvious form."""

import math

import pytest
import torch

from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.layers.convolutions.cond_conv import CondConv2d
from smoe_hpc.layers.convolutions.convolution import ChannelBias, Conv2d, GridLayer
from smoe_hpc.layers.convolutions.coord_conv import CoordConv2d, coordinate_channels
from smoe_hpc.layers.convolutions.locally_connected import LocallyConnected2d
from smoe_hpc.layers.convolutions.low_rank import LowRankLocallyConnected2d

LAYERS = (Conv2d, CoordConv2d, CondConv2d, LocallyConnected2d, LowRankLocallyConnected2d)
PADDINGS = ("zeros", "periodic_longitude", "sphere")
GRID = (3, 4)


def beyond(x: torch.Tensor, c: int, i: int, j: int, padding: str) -> torch.Tensor:
    """Value [B] of channel c at row i and column j, which may lie outside the grid."""
    height, width = x.shape[2:]
    if padding != "zeros":
        if padding == "sphere" and not 0 <= i < height:
            i, j = (-1 - i if i < 0 else 2 * height - 1 - i), j + width // 2
        j %= width
    inside = 0 <= i < height and 0 <= j < width
    return x[:, c, i, j] if inside else x.new_zeros(len(x))


def slow(x: torch.Tensor, kernel_at, out: int, k: int, padding: str) -> torch.Tensor:
    """``kernel_at(b, i, j)`` -> [out, C, k, k]; a sum over everything, one place after the other."""
    batch, channels, height, width = x.shape
    y = x.new_zeros(batch, out, height, width)
    for i in range(height):
        for j in range(width):
            for c in range(channels):
                for di in range(k):
                    for dj in range(k):
                        value = beyond(x, c, i + di - k // 2, j + dj - k // 2, padding)
                        for b in range(batch):
                            y[b, :, i, j] += kernel_at(b, i, j)[:, c, di, dj] * value[b]
    return y


def slow_form(layer: GridLayer, x: torch.Tensor) -> torch.Tensor:
    out, k, padding = layer.out_channels, layer.kernel_size, layer.padding
    if isinstance(layer, Conv2d):
        return slow(x, lambda b, i, j: layer.weight, out, k, padding) + layer.bias[:, None, None]
    if isinstance(layer, CoordConv2d):
        coordinates = coordinate_channels(layer.grid, padding).to(x.dtype)
        both = torch.cat([x, coordinates.expand(len(x), -1, -1, -1)], dim=1)
        return slow(both, lambda b, i, j: layer.weight, out, k, padding) + layer.bias[:, None, None]
    if isinstance(layer, CondConv2d):
        means = x.flatten(2).mean(2)
        mixture = 1 / (1 + (-(means @ layer.routing.weight.T + layer.routing.bias)).exp())
        kernels = [sum(m * w for m, w in zip(row, layer.weight, strict=True)) for row in mixture]
        biases = torch.stack([sum(m * b for m, b in zip(row, layer.bias, strict=True)) for row in mixture])
        return slow(x, lambda b, i, j: kernels[b], out, k, padding) + biases[:, :, None, None]
    if isinstance(layer, LocallyConnected2d):
        return slow(x, lambda b, i, j: layer.weight[..., i, j], out, k, padding) + layer.bias
    assert isinstance(layer, LowRankLocallyConnected2d)
    raw = (layer.row_logits + layer.column_logits).exp()
    mixture = raw / raw.sum(0)
    kernels = torch.einsum("qij,qocuv->ijocuv", mixture, layer.weight)
    y = slow(x, lambda b, i, j: kernels[i, j], out, k, padding)
    return y + layer.bias.view(-1, 1, 1) + layer.row_bias.view(-1, 1) + layer.column_bias


def scatter(layer: torch.nn.Module, seed: int = 0) -> None:
    """Move every parameter away from its start, where zeros would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize(("channels", "out", "k"), [(1, 1, 3), (3, 2, 3), (2, 3, 1), (2, 1, 5)])
def test_equals_the_slow_form(layer_type, padding: str, channels: int, out: int, k: int):
    layer = layer_type(channels, out, GRID, kernel_size=k, padding=padding).double()
    scatter(layer)
    x = torch.randn(2, channels, *GRID, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), slow_form(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [2, 7])
def test_many_and_few_channels_of_a_locally_connected_layer_agree(channels: int):
    layer = LocallyConnected2d(channels, 6, GRID).double()  # 12 and 42 filters: either side of FEW_CHANNELS
    x = torch.randn(2, channels, *GRID, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), slow_form(layer, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer_type", LAYERS)
def test_gradients(layer_type, padding: str):
    layer = layer_type(2, 2, (2, 4), padding=padding).double()
    scatter(layer)
    names = [name for name, _ in layer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in layer.parameters()]
    x = torch.randn(2, 2, 2, 4, dtype=torch.float64, requires_grad=True)

    def forward(x, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *values))


def test_gradients_of_a_locally_connected_layer_with_many_channels():
    layer = LocallyConnected2d(6, 6, (2, 2), bias=False).double()
    x = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)

    def forward(x, weight):
        return torch.func.functional_call(layer, {"weight": weight}, (x,))

    assert torch.autograd.gradcheck(forward, (x, layer.weight.detach().clone().requires_grad_()))


@pytest.mark.parametrize("layer_type", LAYERS)
def test_without_bias_nothing_in_gives_nothing_out(layer_type):
    layer = layer_type(2, 3, GRID, bias=False)
    y = layer(torch.zeros(1, 2, *GRID))
    if layer_type is not CoordConv2d:  # whose coordinates are never nothing
        assert (y == 0).all()
    assert not [name for name, _ in layer.named_parameters() if name.endswith("bias") and "routing" not in name]


@pytest.mark.parametrize("layer_type", LAYERS)
def test_the_generator_alone_decides_the_start(layer_type):
    def start(seed: int) -> list[torch.Tensor]:
        torch.manual_seed(seed + 100)  # must not matter
        return list(layer_type(2, 3, GRID, generator=torch.Generator().manual_seed(0)).parameters())

    assert all(torch.equal(a, b) for a, b in zip(start(1), start(2), strict=True))


@pytest.mark.parametrize("layer_type", [Conv2d, CoordConv2d, CondConv2d])
@pytest.mark.parametrize("padding", ["periodic_longitude", "sphere"])
def test_turning_the_globe_turns_the_answer(layer_type, padding: str):
    # Layers without a place of their own do not see the seam of longitude: turned input, turned output.
    layer = layer_type(2, 3, GRID, padding=padding).double()
    if layer_type is CoordConv2d:  # its places turn with the input
        layer.weight.data[:, -2:] = 0  # all but the rows
    x = torch.randn(2, 2, *GRID, dtype=torch.float64)
    torch.testing.assert_close(layer(x.roll(2, -1)), layer(x).roll(2, -1))


def test_coordinates_have_no_seam_where_longitude_wraps():
    coordinates = coordinate_channels((3, 8), "periodic_longitude")
    assert coordinates.shape == (3, 3, 8)
    steps = (coordinates[1:] - coordinates[1:].roll(1, -1)).norm(dim=0)
    torch.testing.assert_close(steps, torch.full_like(steps, 2 * math.sin(math.pi / 8)))
    flat = coordinate_channels((3, 5), "zeros")
    assert flat[:, 0, 0].tolist() == [-1, -1]
    assert flat[:, 2, 4].tolist() == [1, 1]
    assert coordinate_channels((1, 1), "zeros").isfinite().all()


def test_low_rank_starts_as_the_mean_of_its_banks_and_counts_few_parameters():
    layer = LowRankLocallyConnected2d(2, 3, (20, 30), rank=4)
    torch.testing.assert_close(layer.mixture(), torch.full((4, 20, 30), 0.25))
    filters = 4 * 3 * 2 * 9
    assert sum(p.numel() for p in layer.parameters()) == filters + 4 * (20 + 30) + (20 + 30 + 3)


@pytest.mark.parametrize("layer_type", LAYERS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_channels": 0}, "in_channels=0"),
        ({"out_channels": -1}, "out_channels=-1"),
        ({"grid": (0, 4)}, r"grid=\(0, 4\)"),
        ({"kernel_size": 2}, "odd size"),
        ({"padding": "mirror"}, "periodic_longitude"),
        ({"padding": "sphere", "grid": (4, 5)}, "even number of columns"),
    ],
)
def test_arguments_that_cannot_be(layer_type, arguments: dict, message: str):
    arguments = {"in_channels": 2, "out_channels": 3, "grid": GRID, **arguments}
    with pytest.raises(ConfigError, match=message):
        layer_type(**arguments)


@pytest.mark.parametrize(("layer_type", "name"), [(CondConv2d, "num_experts"), (LowRankLocallyConnected2d, "rank")])
def test_no_experts(layer_type, name: str):
    with pytest.raises(ConfigError, match=f"{name}=0"):
        layer_type(1, 1, GRID, **{name: 0})


@pytest.mark.parametrize("layer_type", LAYERS)
def test_input_that_does_not_fit(layer_type):
    layer = layer_type(2, 3, GRID, padding="sphere")
    with pytest.raises(SmoeError, match=r"takes \[batch, 2, rows, columns\]"):
        layer(torch.zeros(1, 3, *GRID))
    with pytest.raises(SmoeError, match="make it with"):
        layer(torch.zeros(2, *GRID))
    if layer.any_grid:
        assert layer(torch.zeros(1, 2, 6, 8)).shape == (1, 3, 6, 8)
        with pytest.raises(SmoeError, match="even number of columns"):
            layer(torch.zeros(1, 2, 6, 7))
    else:
        with pytest.raises(SmoeError, match="made for grid"):
            layer(torch.zeros(1, 2, 6, 8))


def test_channel_bias():
    bias = ChannelBias(2)
    bias.bias.data = torch.tensor([1.0, -2.0])
    assert bias(torch.zeros(1, 2, 1, 1)).flatten().tolist() == [1, -2]
