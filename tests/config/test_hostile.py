"""Recipes from elsewhere: none runs anything, grows without bound or ends in anything but one line."""

import os
from pathlib import Path

import pytest

from smoe_hpc.config import load_recipe
from smoe_hpc.config.bounded_yaml import NotPlainError, require_small
from smoe_hpc.errors import ConfigError

BOMB = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, r"recipe\.yaml: stands for more than 20,000 values; give a recipe such as"),
        (BOMB.replace("[", "{<<: [").replace("]", "]}"), "stands for more than 20,000 values"),
        ("a: &a [*a]", r"an alias \*a without a value, or within its own"),
        ("a: " + "[" * 5000, "nested more than 20 deep"),
        ("a: " + "[" * 15, "not valid YAML"),
        ("name: " + "${run.root}" * 17, "more than 16 interpolations"),
        ("name: ${name}", "task is missing|Recursive interpolation"),
        ("x: " + "y" * (1 << 20), "more than 1 MiB"),
        ("name: !!python/object/apply:os.system ['touch touched']", "a value of the kind .*python/object/apply:os.system"),
        ("name: !!python/object/apply:pathlib.PosixPath ['/etc']", "a value of the kind .*PosixPath"),
        ("name: !!python/name:os.system", "a value of the kind"),
        ("!!set {a, b}", "a value of the kind .*set"),
        ("name: 2020-13-45", "task is missing"),
        ("training: {seed: " + "1" * 5000 + "}", "cannot be read .*4300"),
        ("training: {seed: 0x" + "f" * 5000 + "}", r"training\.seed=0xffff.*\.\.\.: expected a whole number"),
        ("optimizer: {lr: " + "1" * 400 + "}", r"optimizer\.lr=0x.*\.\.\.: expected a number"),
        ('data: {store: "a\\0b"}', "data.store='a.x00b': expected text"),
        ("name: ../../elsewhere\ntask: heat", "missing|names a folder"),
        ("[1, 2]", "must hold keys and values"),
    ],
)
def test_a_hostile_recipe_is_one_line(text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["recipe.yaml"]


def test_a_recipe_that_is_no_text_or_no_file(tmp_path: Path) -> None:
    (tmp_path / "bytes.yaml").write_bytes(b"name: \xff")
    with pytest.raises(ConfigError, match=r"cannot be read .*utf-8"):
        load_recipe(tmp_path / "bytes.yaml")
    os.mkfifo(tmp_path / "fifo.yaml")
    with pytest.raises(ConfigError, match="is no regular file"):
        load_recipe(tmp_path / "fifo.yaml")


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000, "!!python/name:os.system", "&a [*a]", "${x}" * 17])
def test_a_hostile_override_is_one_line(value: str) -> None:
    with pytest.raises(ConfigError, match=r"training\.batch=") as caught:
        load_recipe("heat_smoe", [f"training.batch={value}"])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_aliases_of_ordinary_size_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\ntask: weather\ndata: {store: d, leads: &leads [72, 120], validation_leads: *leads}\n")
    require_small(path.read_text())
    with pytest.raises(NotPlainError, match=r"alias \*leads"):
        require_small("a: *leads")
