from dataclasses import replace

import pytest

from smoe_hpc.config import Damping, Gate, Model, RoutingLoss, load_recipe
from smoe_hpc.errors import ConfigError

BLIND = "equal for a latent gate; set model.routing_loss.spatial_agreement=0 or a gate that reads its input"
TWO_MEANS = "model.routing_loss.error_scale=running_mean: with model.weighted=true .* a mean of its own; set .*=none"


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        # nothing teaches the gate
        ("heat_smoe", ["model.routing_loss=null"], "model.routing_loss=null: the gate would never learn; .* model.weighted"),
        ("heat_smoe_conv_gate", ["model.routing_loss=null", "model.damping=null"], "the gate would never learn"),
        ("uk_t2m_smoe", ["model.weighted=false"], "the gate would never learn"),
        ("heat_smoe", ["model={channels: [3, 1], routing_loss: null}"], "the gate would never learn"),  # of layer 1
        # losses that are always 0
        ("heat_smoe", ["model.routing_loss.spatial_agreement=1"], BLIND),
        ("heat_smoe", ["model.routing_loss.spatial_agreement=1", "model.gate.noise=shared"], BLIND),
        ("heat_smoe_oracle", ["model.routing_loss={spatial_agreement: 1}"], "equal for a fixed gate"),
        ("heat_smoe_oracle", ["model.routing_loss={importance: 1}"], "importance=1.0: a fixed gate learns nothing"),
        # scales of the error
        ("heat_smoe", ["model.routing_loss.error_scale=loss_weight"], "heat's loss has no weight .*; set .*=none or running"),
        ("heat_noisy", ["model.weighted=true"], TWO_MEANS),
        ("uk_t2m_smoe", ["model.routing_loss={error_scale: running_mean}"], TWO_MEANS),
        # layers of another kind
        ("heat_conv2", ["model.gate.kind=linear"], "model.gate.kind=linear has no effect with model.kind=conv; set .*=latent"),
        ("heat_conv2", ["model.gate.softmax=true"], "model.gate.softmax=true has no effect .*; set model.gate.softmax=false"),
        ("heat_conv2", ["model.weighted=true"], "set model.weighted=false, or model.kind to smoe"),
        ("heat_lcn", ["model.expert_order=id"], "model.expert_order=id has no effect with model.kind=lcn"),
        ("heat_cond_conv", ["model.filters_per_expert=2"], "model.filters_per_expert=2 has no effect"),
        ("heat_conv2", ["model.routing_loss.quantile=0.5"], "quantile=0.5 has no effect .*; set model.routing_loss=null, or"),
        ("heat_low_rank_lcn", ["model.damping.factor=0"], "factor=0.0 has no effect .*; set model.damping=null, or"),
        ("heat_conv2", ["model.num_experts=5"], "set model.num_experts=3, or model.kind to smoe, cond_conv, low_rank_lcn"),
        ("heat_smoe", ["model.kind=conv"], "model.routing_loss.quantile=0.3 has no effect with model.kind=conv"),
        # the other network
        ("heat_smoe", ["model.width=64"], "model.width=64: has no effect with model.network=stack; set model.width=128, or"),
        ("heat_smoe", ["model.dropout=0"], "set model.dropout=0.1, or model.network=resnet"),
        ("heat_smoe", ["model.ghost_batch=8"], "or a gate of kind coordconv_multi"),
        ("heat_conv2", ["model.ghost_batch=8"], "set model.ghost_batch=32, or model.network=resnet"),
        ("weather_smoe_1p4deg", ["model.channels=[3]"], "model.channels=.*: has no effect with model.network=resnet"),
        ("weather_resnet_1p4deg", ["model.activation=relu"], "set model.activation=none, or model.network=stack"),
        ("weather_resnet_1p4deg", ["model.num_experts=256"], "model.num_experts=256 has no effect with model.kind=conv"),
        # other tasks
        ("heat_smoe", ["data.constants=[region]"], r"data.constants=.* has no effect with task=heat; set data.constants=\[\]"),
        ("heat_smoe", ["data.leads=[1,2]"], "has no effect with task=heat; set data.leads=null"),
        ("heat_smoe", ["data.gaps=refuse"], "set data.gaps=skip"),
        ("uk_t2m_smoe", ["data={lead: 1, leads: [6, 24]}"], "has no effect with task=regional"),
        ("weather_smoe_1p4deg", ["data.noise_ratio=2"], "data.noise_ratio=2.0: has no effect with task=weather"),
    ],
)
def test_settings_that_do_nothing(recipe: str, overrides: list[str], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe, overrides)
    assert "\n" not in str(caught.value), "one line"


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("heat_smoe", ["model={channels: [3], routing_loss: null, damping: null}"]),  # K = N: nothing to choose
        ("heat_smoe", ["model.weighted=true", "model.routing_loss=null"]),
        ("heat_smoe_conv_gate", ["model.routing_loss.spatial_agreement=1"]),
        ("uk_t2m_smoe", ["model.weighted=false", "model.routing_loss={error_scale: running_mean}"]),
        ("uk_t2m_smoe", ["model.routing_loss={error_scale: loss_weight}"]),
        ("heat_cond_conv", ["model.num_experts=5"]),
        ("heat_low_rank_lcn", ["model.num_experts=5"]),
        ("heat_conv2", ["model.routing_loss=null", "model.damping=null"]),  # asks for nothing
        ("heat_smoe", ["model={kind: conv, routing_loss: null, damping: null}"]),
        ("heat_smoe_coordconv_multi_gate", ["model.ghost_batch=8"]),
        ("heat_smoe", ["model={network: resnet, width: 1, blocks: 1}"]),
        ("uk_t2m_smoe", ["data={order: blocks, block: 8, gaps: refuse}", "loader={backend: dali, workers: 4}"]),
        ("weather_smoe_5p625deg", ["data.order=global"]),  # the recipe's block waits for data.order=blocks
    ],
)
def test_settings_that_do_something(recipe: str, overrides: list[str]):
    load_recipe(recipe, overrides)


def test_python_code_is_checked_like_yaml():
    recipe = load_recipe("heat_smoe")
    with pytest.raises(ConfigError, match="has no effect"):
        replace(recipe, model=Model(kind="conv", gate=Gate(kind="conv")))
    with pytest.raises(ConfigError, match="would never learn"):
        replace(recipe, model=Model(routing_loss=None))
    explicit = Model(kind="conv", gate=Gate(), routing_loss=RoutingLoss(), damping=Damping())
    assert replace(recipe, model=explicit).model.kind == "conv"
