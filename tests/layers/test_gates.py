import pytest
import torch

from smoe_hpc.errors import ConfigError, SmoeError
from smoe_hpc.layers import (
    AuxiliaryLosses,
    Damping,
    RoutingLoss,
    SpatialMoE2d,
    begin_step,
    end_step,
    hold_routing,
    load_routing_state,
    make_gate,
    release_routing,
    routing_loss,
    routing_metrics,
    routing_state,
)
from smoe_hpc.layers.gates.auxiliary import importance_loss, load_loss, spatial_agreement_loss

GRID = (4, 6)


def test_latent_gate_starts_in_the_published_range():
    logits = make_gate("latent", 8, 2, (40, 50), generator=torch.Generator().manual_seed(0)).logits
    bound = (3 * 8 / 2) ** 0.5
    assert bound * 0.99 < logits.abs().max() <= bound
    assert abs(logits.mean()) < 0.05


def test_fixed_gate_follows_its_map():
    region_map = torch.arange(24).view(GRID) % 3
    gate = make_gate("fixed", 3, 1, GRID, region_map=region_map)
    layer = SpatialMoE2d(1, 3, 1, GRID, gate=gate, routing_loss=None, damping=None)
    x = torch.randn(2, 1, *GRID)
    every = torch.nn.functional.conv2d(x, layer.weight[:, 0], padding=1)
    torch.testing.assert_close(layer(x), every.gather(1, region_map.expand(2, 1, -1, -1)))


def test_a_region_map_is_one_more_input_channel():
    region_map = torch.arange(24).view(GRID) % 3
    gate = make_gate("conv", 3, 1, GRID, in_channels=2, region_map=region_map)
    assert gate.network.weight.shape == (3, 3, 3, 3)
    x = torch.randn(2, 2, *GRID)
    joined = torch.cat([x, region_map.float().expand(2, 1, -1, -1)], 1)
    torch.testing.assert_close(gate(x)[0], torch.nn.functional.conv2d(joined, gate.network.weight, padding=1))


def test_noise_depends_on_step_and_sample_alone():
    gate = make_gate("latent", 3, 1, GRID, noise="per_sample", noise_seed=5)
    layer = SpatialMoE2d(1, 3, 1, GRID, gate=gate)
    x = torch.zeros(4, 1, *GRID)
    begin_step(layer, 7, torch.arange(4))
    whole, _ = gate(x)
    begin_step(layer, 7, torch.tensor([2, 3]))  # the second of two processes
    part, _ = gate(x[:2])
    assert torch.equal(part, whole[2:])
    assert torch.equal(gate(x[:2])[0], part)  # as when recomputed
    begin_step(layer, 8, torch.tensor([2, 3]))
    assert not torch.equal(gate(x[:2])[0], part)
    assert 0.8 < (whole - gate.logits).std() * 3 < 1.2  # standard deviation 1 / N
    gate.eval()
    assert torch.equal(gate(x)[0], gate.logits)


def test_shared_noise_is_one_draw_for_the_batch():
    gate = make_gate("conv", 3, 1, GRID, in_channels=1, noise="shared")
    gate.step = 0
    x = torch.randn(3, 1, *GRID)
    noise = gate(x)[0] - gate.raw_values(x)
    torch.testing.assert_close(noise[0], noise[1])
    assert noise.abs().max() > 0


def test_a_per_sample_noisy_latent_gate_trains():
    gate = make_gate("latent", 4, 2, GRID, noise="per_sample")
    layer = SpatialMoE2d(2, 4, 2, GRID, gate=gate)
    begin_step(layer, 0)
    y = layer(torch.randn(3, 2, *GRID))
    (y.square().mean() + routing_loss(layer)).backward()
    assert gate.logits.grad.abs().sum() > 0


@pytest.mark.parametrize("noise", ["shared", "per_sample"])
def test_noise_that_does_not_know_the_step_is_refused(noise: str):
    layer = SpatialMoE2d(1, 3, 1, GRID, gate=make_gate("latent", 3, 1, GRID, noise=noise))
    x = torch.zeros(2, 1, *GRID)
    with pytest.raises(SmoeError, match=r"the same numbers for ever; call smoe_hpc\.layers\.begin_step"):
        layer(x)
    layer.eval()
    layer(x)


def test_noise_of_other_samples_is_refused():
    layer = SpatialMoE2d(2, 4, 2, (3, 4), gate=make_gate("latent", 4, 2, (3, 4), noise="per_sample"))
    begin_step(layer, 0, torch.tensor([5, 6]))
    layer(torch.randn(2, 2, 3, 4))
    with pytest.raises(SmoeError, match="told of 2 samples but given 1"):
        layer(torch.randn(1, 2, 3, 4))


@pytest.mark.parametrize(("options", "learns"), [({}, False), ({"weighted": True}, True), ({"damping": None}, False)])
def test_a_gate_that_nothing_teaches_is_frozen(options: dict, learns: bool):
    options = {"damping": Damping(0.1, quantile=0.5), **options}
    layer = SpatialMoE2d(2, 4, 2, (3, 4), routing_loss=None, **options)
    assert [p.requires_grad for p in layer.gate.parameters()] == [learns]
    SpatialMoE2d(2, 4, 2, (3, 4), gate=layer.gate)
    assert [p.requires_grad for p in layer.gate.parameters()] == [True]


def test_a_loop_that_holds_the_choice_from_the_start_knows_the_step():
    layer = SpatialMoE2d(1, 3, 1, GRID, gate=make_gate("latent", 3, 1, GRID, noise="shared"))
    hold_routing(layer)
    seen = []
    for step in range(3):
        seen.append(layer.gate(torch.zeros(1, 1, *GRID))[0].detach())
        end_step(layer, step)
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def test_gates_with_the_default_seed_draw_by_their_place_in_the_model():
    def values(seed: int | None) -> list[torch.Tensor]:
        gates = [make_gate("latent", 3, 1, GRID, noise="shared", noise_seed=seed) for _ in range(2)]
        model = torch.nn.Sequential(*[SpatialMoE2d(1, 3, 1, GRID, gate=gate) for gate in gates])
        begin_step(model, 4)
        return [(gate(torch.zeros(1, 1, *GRID))[0] - gate.logits).detach() for gate in gates]

    first, second = values(None)
    assert (first - second).abs().max() > 0.1
    again, alike = values(0)
    torch.testing.assert_close(first, again)
    torch.testing.assert_close(again, alike)  # who gives seeds gives them


# -- routing as state --------------------------------------------------------------------------------------------------


def move(layer: SpatialMoE2d, winner: int) -> None:
    """Make one expert the best everywhere."""
    with torch.no_grad():
        layer.gate.logits[winner] = layer.gate.logits.max() + 1


def used(layer: SpatialMoE2d) -> int:
    """The expert that a forward of a one-selection layer uses at the first pixel."""
    values, _ = layer.gate(torch.zeros(1, 1, *GRID))
    return int(layer.gate.routing(values, "rank").indices[0, 0, 0])


def test_routing_is_renewed_every_so_many_steps_and_used_at_once_or_a_step_later():
    #            step:   0  1  2  3  4  5      winner set before the step's end: its number
    # refresh 1, delay 0: 0  1  2  3  4  5     used after the step
    # refresh 1, delay 1: 6  0  1  2  3  4     6 won before the first step
    # refresh 2, delay 0: 6  1  1  3  3  5
    expected = {(1, 0): [0, 1, 2, 3, 4, 5], (1, 1): [6, 0, 1, 2, 3, 4], (2, 0): [6, 1, 1, 3, 3, 5]}
    for (refresh, delay), uses in expected.items():
        layer = SpatialMoE2d(1, 7, 1, GRID)
        move(layer, 6)
        hold_routing(layer)
        seen = []
        for step in range(6):
            move(layer, step)
            end_step(layer, step, refresh=refresh, delay=delay)
            seen.append(used(layer))
        assert seen == uses, (refresh, delay)


def test_a_held_choice_stays_whole_numbers_whatever_the_layer_is_cast_to():
    layer = SpatialMoE2d(2, 4, 2, (4, 6))
    hold_routing(layer)
    before = layer.gate.held["rank"].choice
    layer.type(torch.float64).half()
    assert torch.equal(layer.gate.held["rank"].choice, before)
    assert layer.gate.held["rank"].choice.dtype == before.dtype


def test_state_goes_through_a_checkpoint_and_is_dropped_with_other_weights():
    layer = SpatialMoE2d(1, 6, 1, GRID)
    for step in range(3):
        move(layer, step)
        end_step(layer, step, delay=1)
    state = routing_state(layer)
    other = SpatialMoE2d(1, 6, 1, GRID)
    other.load_state_dict(layer.state_dict())
    assert used(other) == 2  # from the parameters
    load_routing_state(other, state)
    assert used(other) == 1 == used(layer)  # as held
    end_step(other, 3, delay=1)
    assert used(other) == 2
    other.load_state_dict(SpatialMoE2d(1, 6, 1, GRID).state_dict())
    assert routing_state(other) == {}


def test_evaluation_uses_the_present_gate():
    layer = SpatialMoE2d(1, 6, 1, GRID)
    end_step(layer, 0)
    move(layer, 4)
    layer.eval()
    assert used(layer) == 4
    layer.train()
    release_routing(layer)
    assert used(layer) == 4


def test_metrics():
    layer = SpatialMoE2d(1, 4, 1, GRID)
    assert routing_metrics(layer) == {}
    for winner in (0, 1):
        layer(torch.randn(2, 1, *GRID)).square().mean().backward()
        move(layer, winner)
        end_step(layer, winner)
    metrics = routing_metrics(layer)
    assert metrics["routing_loss"] > 0
    assert metrics["selections_changed"] == 1.0
    assert (metrics["load_min"], metrics["load_max"]) == (0.0, 4.0)


def test_state_of_another_model_is_refused():
    layer = SpatialMoE2d(1, 4, 1, GRID)
    end_step(layer, 0)
    with pytest.raises(SmoeError, match="does not fit the model"):
        load_routing_state(SpatialMoE2d(1, 4, 1, (5, 6)), routing_state(layer))


# -- auxiliary losses --------------------------------------------------------------------------------------------------


def test_importance_is_the_variation_of_summed_values():
    values = torch.zeros(2, 3, *GRID)
    values[:, 0], values[:, 1], values[:, 2] = 1.0, 2.0, 3.0
    sums = 48 * torch.tensor([1.0, 2.0, 3.0])
    assert importance_loss(values).item() == pytest.approx((sums.std() / sums.mean()).item() ** 2)


def test_load_counts_what_other_noise_would_select():
    values = torch.randn(2, 3, *GRID, dtype=torch.float64)
    noisy = values + 0.3 * torch.randn_like(values)
    least = noisy.topk(2, dim=1).values[:, -1:]
    chance = 1 - torch.distributions.Normal(0.0, 0.3).cdf(least - values)
    load = chance.sum(0)
    assert load_loss(values, noisy, 2, 0.3).item() == pytest.approx((load.std() / load.mean()).item() ** 2)


def test_spatial_agreement_is_zero_where_samples_agree():
    values = torch.randn(3, *GRID)
    assert spatial_agreement_loss(values) == 0
    assert spatial_agreement_loss(values.expand(4, -1, -1, -1)) == 0
    assert spatial_agreement_loss(torch.randn(4, 3, *GRID)) > 0


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("latent", {"noise": "loud"}, "choose one of none, shared, per_sample"),
        ("latent", {"auxiliary": AuxiliaryLosses(load=1.0)}, "set the gate's noise"),
        ("latent", {"region_map": torch.zeros(GRID)}, "no input that a region map could join"),
        ("conv", {"in_channels": None}, "give in_channels"),
        ("conv", {"region_map": torch.zeros(5, 5)}, "give a map of the same grid"),
        ("fixed", {}, "needs a region map"),
        ("fixed", {"region_map": torch.full(GRID, 3)}, "from 0 to num_experts - 1"),
    ],
)
def test_impossible_gates_are_refused(kind: str, options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        make_gate(kind, 3, 1, GRID, **{"in_channels": 1, **options})


def test_balanced_is_a_little_above_the_share_selected():
    for n, k in [(2, 1), (3, 1), (256, 128), (4096, 128)]:
        assert k / n < RoutingLoss().quantile_for(n, k) < 1.5 * k / n


# -- values that are not numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["latent", "conv"])
def test_a_gate_that_holds_a_nan_is_named(kind: str):
    model = torch.nn.Sequential(SpatialMoE2d(1, 4, 2, GRID), SpatialMoE2d(2, 4, 2, GRID, gate=kind))
    x = torch.randn(2, 1, *GRID)
    model(x)  # which has looked at the parameters as they were
    with torch.no_grad():
        next(model[1].gate.parameters()).view(-1)[3] = torch.nan
    if kind == "latent":
        with pytest.raises(SmoeError, match=r"gate '1\.gate'.*not numbers.*lower the gate's learning rate"):
            end_step(model, 0)
    for training in (True, False):
        with pytest.raises(SmoeError, match=r"Gate\(.*experts=4, selected=2, grid=\(4, 6\).* not numbers"):
            model.train(training)(x)


def test_infinite_values_are_numbers():
    layer = SpatialMoE2d(1, 4, 2, GRID)
    with torch.no_grad():
        layer.gate.logits[0], layer.gate.logits[1] = torch.inf, -torch.inf  # their sum is none
    end_step(layer, 0)
    layer.eval()(torch.randn(2, 1, *GRID))


def test_what_an_optimiser_writes_behind_the_back_is_seen():
    layer = SpatialMoE2d(1, 4, 2, GRID).eval()
    layer(torch.randn(2, 1, *GRID))
    layer.gate.logits.data.fill_(torch.nan)  # leaves no trace
    with pytest.raises(SmoeError, match="not numbers"):
        end_step(layer.train(), 0)
    with pytest.raises(SmoeError, match="not numbers"):
        layer.eval()(torch.randn(2, 1, *GRID))
