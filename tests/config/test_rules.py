import pytest

from smoe_hpc.config import Gate, Model, check_world, load_recipe, recipe_names
from smoe_hpc.errors import ConfigError

HEAT = [
    # window
    ("data.store=' '", "data.store= : must be a path"),
    ("data.inputs=[0,-6]", r"data.inputs=\[0, -6\]: times must ascend .* e.g. \[-12,-6,0\]"),
    ("data.inputs=[0,6]", "end at or before 0"),
    ("data.inputs=[]", "data.inputs"),
    ("data.lead=0", "data.lead=0: the target must lie after the start"),
    ("data.variables=[]", "data.variables=null takes all"),
    ("data.targets=[a,a]", "each once"),
    ("data.noise=-1", "data.noise=-1.0: .* not negative"),
    ("data.noise_ratio=0", "data.noise_ratio=0.0: .* above 0, e.g. data.noise_ratio=10"),
    ("data.variables=[t2m]", "heat has one field.*set data.variables=null"),
    ("data.normalize=true", "heat is not normalised.*set data.normalize=false"),
    ("data.leads=[24,6]", r"data.leads=\[24, 6\]: times must be positive and ascend, e.g. data.leads=\[72,120\]"),
    ("data.leads=[]", "positive and ascend"),
    ("data={lead: 6, leads: [6, 24]}", r"data.lead=6: has no effect beside data.leads=\[6, 24\]; set data.leads=\[6\], or"),
    ("data.validation_leads=[24]", "set it to null, or data.lead_mode=continuous"),
    ("data.lead_mode=continuous", "data.lead_mode=continuous: needs leads to draw from"),
    ("data={lead_mode: continuous, leads: [24]}", "at least two"),
    ("data.constants=[a,a]", "each constant once"),
    ("data.block=0", "data.block=0: must be at least 1"),
    ("data.order=block", r"expected one of global, blocks; did you mean blocks\?"),
    ("data.splits.train=5:5", "holds no run; the end must be above the first, such as 5:6"),
    ("data.splits.train=2019-03-01/2019-03-02", 'run numbers "first:end"'),
    # model
    ("model.channels=[]", "at least one output channel"),
    ("model.channels=[0]", "at least one output channel"),
    ("model.kernel_size=4", "model.kernel_size=4: must be odd"),
    ("model.stem_kernel=4", "model.stem_kernel=4: must be odd"),
    ("model.width=0", "at least 1"),
    ("model.blocks=0", "at least 1"),
    ("model.ghost_batch=0", "model.ghost_batch=0: must be at least 1"),
    ("model.dropout=1", "model.dropout=1.0: must lie in 0 to below 1"),
    ("model={network: resnet, width: 5}", "model.width=5: 5 channels of 1 filters each select 5 experts, but there are only 3"),
    ("model={network: resnet, width: 3, filters_per_expert: 2}", "model.width=3: 3 channels are not whole experts"),
    ("model.num_experts=0", "model.num_experts=0: must be at least 1"),
    ("model.channels=[4]", "select 4 experts, but there are only 3; set model.num_experts to 4 or more, .* at most 3"),
    ("model={channels: [3], filters_per_expert: 2}", "not whole experts .*; take 2 or 4 channels"),
    ("model={channels: [1], filters_per_expert: 2}", "not whole experts .*; take 2 channels"),
    ("model.head=conv1x1", r'a "conv1x1" head is the last of several layers'),
    ("model={channels: [2, 1], gate: {share: true}}", "equally many selected experts in every layer"),
    ("model.gate={kind: conv, share: true}", "only a gate that reads none can be shared; set model.gate.kind=latent"),
    ("model.gate.region_map=true", "a latent gate reads no input"),
    ("model.gate={kind: fixed, noise: shared}", "set model.gate.noise=none"),
    ("model={channels: [2], gate: {kind: fixed}}", "selects one expert per pixel"),
    ("model.routing_loss.quantile=0", "must lie between 0 and 1"),
    ("model.routing_loss.quantile=1.5", "must lie between 0 and 1"),
    ("model.routing_loss.quantile=ballanced", r"expected balanced or a number; did you mean balanced\?"),
    ("model.routing_loss.tolerance=-1", "not negative"),
    ("model.routing_loss.load=0.1", "set model.gate.noise=shared"),
    ("model.damping.factor=2", "must lie in 0 to 1"),
    ("model.damping.quantile=0", "must lie between 0 and 1"),
    (
        "model={weighted: true, routing_loss: null, damping: {factor: 0.1}}",
        "set model.damping.quantile=0.5 or model.damping=null",
    ),
    # optimiser, schedule
    ("optimizer.lr=-1e-3", "optimizer.lr=-0.001: must be a finite number above 0, e.g. optimizer.lr=0.001"),
    ("optimizer.lr=.nan", "finite"),
    ("optimizer.lr=.inf", "finite"),
    ("optimizer.gate_lr=-1", "not negative"),
    ("optimizer.betas=[0.9]", "two numbers"),
    ("optimizer.betas=[0.9,1]", "below 1"),
    ("optimizer.eps=0", "above 0"),
    ("optimizer.weight_decay=-1", "not negative"),
    ("optimizer.clip=0", "above 0"),
    ("schedule.factor=0", "schedule.factor=0.0: must lie above 0"),
    ("schedule.patience=-1", "must not be negative"),
    ("schedule.early_stop=0", "at least 1"),
    ("schedule.min_lr=0.1", "schedule.min_lr=0.1: is above optimizer.lr=0.001"),
    ("schedule.min_delta=-1", "not negative"),
    # training, run
    ("training.epochs=0", "training.epochs=0: must be at least 1, e.g. training.epochs=150"),
    ("training.accumulation=5", r"training.batch=32: must be a multiple of 5 .*; set training.batch=30 or 35"),
    ("training.accumulation=64", "set training.batch=64"),
    ("training.seed=-1", "not be negative"),
    ("training.stop_at_score=.nan", "finite"),
    ("training={precision: float64, zero_stage: 1}", "ZeRO keeps its state in float32.*set training.zero_stage=0"),
    ("training.validate_every=0", "at least 1"),
    ("loader.workers=0", "loader.workers=0: must be at least 1, e.g. loader.workers=2"),
    ("loader.prefetch=0", "at least 1"),
    ("loader.backend=dalli", r"did you mean dali\?"),
    ("run.root=' '", "run.root"),
    ("run.keep=0", "at least 1"),
    ("run.checkpoint_seconds=0", "above 0"),
    ("name=a/b", "names a folder"),
    ("name=..", "names a folder"),
]
REGIONAL = [
    ("model={channels: [1], head: same, gate: {kind: fixed}}", "only the heat task has a true region map"),
    ("model.gate={kind: conv, region_map: true}", "only the heat task has a true region map"),
    ("data.noise=0.1", "only the heat task makes noise; set data.noise=0"),
    ("data.splits.test=2019-03-23/2019-03-31", "shares days with data.splits.train='2019-03-01/2019-03-23'"),
    ("data.splits.test=", 'shares days with data.splits.test|"" is every time'),
    ("data.splits.test=2019-02-30/2019-03-31", "two existing days"),
    ("data.splits.test=2019-03-31/2019-03-27", "write 2019-03-27/2019-03-31"),
    ("data.splits.test=0:10", "two existing days"),
]
WEATHER = [
    ("data.normalize=false", "differ in size by ten powers of ten; set data.normalize=true"),
    ("data.splits.test=2015-01-01/2016-12-31", "shares days"),
    ("data.lead=120", r"set data.leads=\[120\], or data.leads=null"),
    ("model.gate={kind: conv, region_map: true, share: false}", "only the heat task has a true region map"),
    ("model.num_experts=100", "model.width=128: 128 channels of 1 filters each select 128 experts, but there are only 100"),
]


@pytest.mark.parametrize(("override", "message"), HEAT)
def test_impossible_heat(override: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe("heat_smoe", [override])
    assert "\n" not in str(caught.value), "one line"


@pytest.mark.parametrize(("override", "message"), REGIONAL)
def test_impossible_regional(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_recipe("uk_t2m_smoe", [override])


@pytest.mark.parametrize(("override", "message"), WEATHER)
def test_impossible_weather(override: str, message: str):
    with pytest.raises(ConfigError, match=message):
        load_recipe("weather_smoe_1p4deg", [override])


def test_python_code_is_checked_like_yaml():
    with pytest.raises(ConfigError, match=r"model.kind=smeo: must be one of smoe, .*; did you mean smoe\?"):
        Model(kind="smeo")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"model\.gate\.noise=loud"):
        Gate(noise="loud")  # type: ignore[arg-type]


def test_selected_counts_only_layers_of_the_kind():
    model = Model(channels=[8, 1], head="conv1x1", num_experts=16, filters_per_expert=2)
    assert model.selected == [4]
    assert Model(channels=[6, 3], num_experts=6).selected == [6, 3]
    assert Model(network="resnet", width=6, blocks=2, num_experts=6, filters_per_expert=2).selected == [3] * 4


def test_all_experts_may_be_selected():
    assert Model(channels=[3], num_experts=3).selected == [3]


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16, 32])
def test_worlds_that_share_a_batch_of_32(world: int):
    check_world(load_recipe("heat_smoe"), world)


def test_a_world_that_cannot_share_the_batch():
    recipe = load_recipe("heat_smoe", ["training.accumulation=2"])
    message = r"training.batch=32: must be a multiple of 6 \(3 ranks x training.accumulation=2\); set training.batch=30 or 36"
    with pytest.raises(ConfigError, match=message):
        check_world(recipe, 3)
    with pytest.raises(ConfigError, match=r"set training\.batch=128"):
        check_world(recipe, 64)


SHARED = "where the gate's values depend on the sample"


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("heat_smoe_coordconv_multi_gate", [], r"model\.ghost_batch=32: must divide the micro-batch of .* set model\.ghost"),
        ("weather_resnet_5p625deg", [], r"model\.ghost_batch=32: must divide the micro-batch of .* set model\.ghost_batch="),
        ("heat_smoe_conv_gate", ["model.routing_loss.importance=0.1"], f"model.routing_loss.importance=0.1: .* {SHARED}"),
        ("heat_smoe_conv_gate", ["model.routing_loss.spatial_agreement=1"], "set model.routing_loss.spatial_agreement=0"),
        (
            "heat_smoe",
            ["model.gate.noise=per_sample", "model.routing_loss.load=0.1"],
            f"model.routing_loss.load=0.1: is not linear in the batch {SHARED}",
        ),
    ],
)
def test_what_depends_on_how_a_batch_is_shared(recipe: str, overrides: list[str], message: str):
    check_world(load_recipe(recipe, overrides), 1)
    for accumulation, world, shared in ((1, 2, "2 processes x .*=1"), (2, 1, "1 process x .*=2"), (2, 4, "4 processes")):
        loaded = load_recipe(recipe, [*overrides, f"training.accumulation={accumulation}"])
        with pytest.raises(ConfigError, match=message) as caught:
            check_world(loaded, world)
        assert "\n" not in str(caught.value), "one line"
        with pytest.raises(ConfigError, match=shared):
            check_world(loaded, world)


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("heat_smoe_conv_gate", []),
        ("heat_smoe", ["model.routing_loss.importance=0.1"]),
        ("heat_smoe", ["model.gate.noise=shared", "model.routing_loss.load=0.1"]),
        ("heat_smoe", ["model.gate.noise=per_sample"]),
        ("heat_noisy", []),
        ("heat_conv2", []),
        ("uk_t2m_smoe", []),
    ],
)
def test_what_a_shared_batch_leaves_as_it_is(recipe: str, overrides: list[str]):
    check_world(load_recipe(recipe, [*overrides, "training.accumulation=2"]), 2)


@pytest.mark.parametrize(
    ("recipe", "world", "accumulation", "group"),
    [
        ("weather_smoe_1p4deg", 8, 1, 8),
        ("weather_smoe_1p4deg", 2, 4, 8),
        ("weather_smoe_1p4deg", 16, 1, 4),
        ("weather_smoe_5p625deg", 2, 1, 32),
        ("weather_smoe_5p625deg", 4, 2, 8),
        ("heat_smoe_coordconv_multi_gate", 4, 1, 8),
    ],
)
def test_groups_that_fit_are_shared(recipe: str, world: int, accumulation: int, group: int):
    overrides = [f"training.accumulation={accumulation}", f"model.ghost_batch={group}"]
    check_world(load_recipe(recipe, overrides), world)
    with pytest.raises(ConfigError, match=f"set model.ghost_batch={group} "):
        check_world(load_recipe(recipe, [overrides[0], f"model.ghost_batch={2 * group}"]), world)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_for_one_process(name: str):
    check_world(load_recipe(name), 1)
