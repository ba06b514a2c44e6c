from pathlib import Path

import pytest

from smoe_hpc.config import Gate, RoutingLoss, Splits, load_recipe, to_yaml
from smoe_hpc.errors import ConfigError


def test_values_are_yaml():
    recipe = load_recipe(
        "uk_t2m_smoe",
        ["data.inputs=[-6,0]", "optimizer.lr=1e-4", "optimizer.clip=2", "training.deterministic=true", "name=trial-1"],
    )
    assert recipe.data.inputs == [-6, 0]
    assert recipe.optimizer.lr == 1e-4
    assert isinstance(recipe.optimizer.clip, float)  # a whole number is a number
    assert recipe.training.deterministic is True
    assert recipe.name == "trial-1"


def test_nested_optional_sections():
    nothing = ["model.weighted=true", "model.routing_loss=null", "model.damping=null"]
    assert load_recipe("heat_smoe", nothing).model.routing_loss is None
    damping = load_recipe("heat_smoe_oracle", ["model.damping.factor=0.1", "model.damping.quantile=.5"]).model.damping
    assert damping is not None
    assert damping.factor == 0.1
    again = load_recipe("heat_smoe", ["model.routing_loss=null", "model.routing_loss.importance=0.5"])
    assert again.model.routing_loss == RoutingLoss(importance=0.5), "begins anew from the defaults"
    assert load_recipe("heat_smoe", ["model.routing_loss={}"]) == load_recipe("heat_smoe"), "{} changes nothing"


def test_a_section_in_one_override():
    gate = load_recipe("heat_smoe", ["model.gate={kind: conv, softmax: true}"]).model.gate
    assert gate == Gate(kind="conv", softmax=True)


@pytest.mark.parametrize(("text", "value"), [("balanced", "balanced"), ("0.4", 0.4)])
def test_quantile_is_a_word_or_a_number(text: str, value: str | float):
    loss = load_recipe("heat_smoe", [f"model.routing_loss.quantile={text}"]).model.routing_loss
    assert loss is not None
    assert loss.quantile == value


def test_the_last_override_wins():
    assert load_recipe("heat_smoe", ["training.seed=1", "training.seed=2"]).training.seed == 2


def test_environment_variables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert load_recipe("heat_smoe", ["data.store=${oc.env:SCRATCH}/heat"]).data.store == "/scratch/me/heat"


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("data/heat #1", "data/heat #1"),  # a comment
        ("/scratch/#2/a #3", "/scratch/#2/a #3"),
        ("data: heat", "data: heat"),  # a mapping
        ("[1979].h5", "[1979].h5"),  # a list, and something behind it
        ("data/era5_19[78]*.h5", "data/era5_19[78]*.h5"),
        ("[a] #1", "[a] #1"),
        ("true #1", "true #1"),
        ("@here", "@here"),  # reserved
        ("&here there", "&here there"),  # an anchor
        ("*", "*"),  # an alias
        ("!heat data", "!heat data"),  # a tag
        ("{a}", "{a}"),
        ("007", "007"),
        ("1e3", "1e3"),
        ("2019-03-01", "2019-03-01"),
        (" data/heat ", "data/heat"),
        ("'data/heat #1'", "data/heat #1"),  # as YAML quotes
        ('"data/heat"', "data/heat"),
        ("'", "'"),
        ("a=b", "a=b"),
    ],
)
def test_text_is_taken_as_it_stands(text: str, path: str, tmp_path: Path):
    recipe = load_recipe("heat_smoe", [f"data.store={text}", f"run.root={text}"])
    assert (recipe.data.store, recipe.run.root) == (path, path)
    (tmp_path / "written.yaml").write_text(to_yaml(recipe))
    assert load_recipe(tmp_path / "written.yaml") == recipe


def test_an_interpolation_is_text_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert load_recipe("heat_smoe", ["data.store=${oc.env:SCRATCH}/heat #1"]).data.store == "/scratch/me/heat #1"


def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """In overrides, in a file, in the file's own name; never a folder that is called ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("name: mine\ntask: heat\ndata: {store: ~/heat}\nrun: {root: '~'}\n")
    recipe = load_recipe("~/mine.yaml")
    assert (recipe.data.store, recipe.run.root) == (f"{tmp_path}/heat", str(tmp_path))
    recipe = load_recipe("heat_smoe", ["data.store=~/heat #1", "run.root=~"])
    assert (recipe.data.store, recipe.run.root) == (f"{tmp_path}/heat #1", str(tmp_path))
    assert load_recipe("heat_smoe", ["data.store=./~"]).data.store == "./~"
    for override in ("data.store=~no_such_user/heat", "run.root=~no_such_user"):
        with pytest.raises(ConfigError, match=r"there is no home folder of '~no_such_user'; write the path out, or \./~"):
            load_recipe("heat_smoe", [override])


def test_splits_by_name():
    splits = Splits(train="0:10", validation="10:20")
    assert (splits["train"], splits["test"]) == ("0:10", "")
    with pytest.raises(ConfigError, match=r"no split 'tets'; did you mean test\?"):
        splits["tets"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys: nearest in the section, under the same name elsewhere, anywhere
        ("model.num_expert=3", r"no key 'model.num_expert' in a recipe; did you mean model.num_experts\?"),
        ("model.damping.facter=1", r"did you mean model.damping.factor\?"),
        ("lr=1", r"did you mean optimizer.lr\?"),
        ("gate.kind=conv", r"did you mean model.gate.kind\?"),
        ("batchs=1", r"did you mean training.batch\?"),
        ("data={store: x, leed: 3}", r"no key 'data.leed' .* did you mean data.lead\?"),
        ("data.splits.january=1", "data.splits: train, validation, test"),
        ("xyzzy=1", "its sections: name, task, data, model"),
        # wrong types: key, value, expected, example
        ("training.batch=many", r"training.batch='many': expected a whole number; e.g. training.batch=32"),
        ("training.batch=1.5", r"training.batch=1.5: expected a whole number"),
        ("training.batch=null", r"training.batch=null: expected a whole number"),
        ("training.batch=true", r"training.batch=true: expected a whole number"),
        ("optimizer.lr=fast", r"optimizer.lr='fast': expected a number; e.g. optimizer.lr=0.001"),
        ("optimizer.gate_lr=[1]", r"optimizer.gate_lr=\[1\]: expected a number or null; e.g. optimizer.gate_lr=0.01"),
        ("model.channels=4", r"model.channels=4: expected a list, each a whole number; e.g. model.channels=\[1\]"),
        ("model.channels=[a]", r"model.channels=\[a\]: expected a list, each a whole number"),
        ("data.normalize=maybe", "data.normalize='maybe': expected true or false"),
        ("model.kind=smoee", r"model.kind='smoee': expected one of smoe, conv.*; did you mean smoe\?"),
        ("training.precision=fp16", "training.precision='fp16': expected one of float32, bf16, float64"),
        ("training.zero_stage=3", "training.zero_stage=3: expected one of 0, 1, 2"),
        ("model=3", "model=3: expected a section .*; e.g. model.kind=smoe"),
        ("model.gate=null", "model.gate=null: expected a section"),
        ("model.routing_loss.quantile=[1]", "expected balanced or a number; e.g. model.routing_loss.quantile=0.5"),
        ("data.store=[a]", r"data.store=\[a\]: expected text; e.g. data.store=data/heat"),
        # not key=value
        ("training.batch", "an override is key=value"),
        ("=3", "an override is key=value"),
        ("+training.batch=3", "an override is key=value"),
        ("~model.damping=", "an override is key=value"),
        ("model.channels=[1", r"model.channels=\[1: not a YAML value"),
        ("data.store=${oops", "not a YAML value"),
        ("data.store=${oc.env:NO_SUCH_VARIABLE}", "NO_SUCH_VARIABLE"),
    ],
)
def test_bad_overrides(override: str, message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe("heat_smoe", [override])
    assert "\n" not in str(caught.value), "one line"


def test_unknown_recipe():
    with pytest.raises(ConfigError, match=r"no recipe 'heat_smo'; did you mean heat_smoe\? there are: heat_cond_conv"):
        load_recipe("heat_smo")
    with pytest.raises(ConfigError, match=r"did you mean heat_smoe\?"):
        load_recipe("heat_smoe.yaml")  # a name, taken for a file
    with pytest.raises(ConfigError, match=r"mine/heat.yaml: no such file; .* recipes: heat_cond_conv"):
        load_recipe("mine/heat.yaml")


def test_a_run_is_no_recipe(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match=r"is the folder of a run; its recipe is .*config.yaml"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name: a\nname: b\n", r"line 2: not valid YAML \(found duplicate key name\)"),
        ("name: [a\n", "not valid YAML"),
        ("- a\n- b\n", "must hold keys and values"),
        ("", "name is missing; add it, e.g. name=my_experiment"),
        ("name: x\ntask: heat\n", "data is missing; add it, e.g. data.store=data/heat"),
        ("name: x\ntask: heat\ndata: {lead: 1}\n", "data.store is missing; add it, e.g. data.store=data/heat"),
        ("name: 3\ntask: heat\ndata: {store: x}\n", "name=3: expected text"),
        ("name: x\ntask: heat\ndata: {store: x, splits: {train: 10:20}}\n", "data.splits.train=620: expected text"),
        ("name: x\ntask: heat\ndata: {store: x}\nmodel: {chanels: [1]}\n", r"did you mean model.channels\?"),
        ("name: x\ntask: heat\ndata: {store: x}\n1: 2\n", "no key '1'"),
    ],
)
def test_bad_files(content: str, message: str, tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_recipe(path)


def test_a_file_that_is_no_text(tmp_path: Path):
    (tmp_path / "r.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(ConfigError, match=r"r\.yaml"):
        load_recipe(tmp_path / "r.yaml")


def test_a_small_file_is_enough(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntask: heat\ndata: {store: data/heat}\n")
    assert load_recipe(path).model.kind == "smoe"
