"""What a shell completes, and what it costs a user who does not ask for it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smoe_hpc.cli.completion import override_argument, recipe_argument
from smoe_hpc.config import recipe_names
from tests.cli.calling import command

ROOT = Path(__file__).resolve().parents[2]


def test_recipes():
    assert [name for name, _ in recipe_argument("")] == recipe_names()
    assert [name for name, _ in recipe_argument("uk_t2m_l")] == ["uk_t2m_lcn", "uk_t2m_low_rank_lcn"]
    assert all(len(text) > 20 for _, text in recipe_argument("heat"))


def test_keys_and_values():
    assert [text for text, _ in override_argument("training.b")] == ["training.batch="]
    assert [text for text, _ in override_argument("loader.backend=")] == [
        "loader.backend=threads",
        "loader.backend=dali",
        "loader.backend=auto",
    ]
    assert [text for text, _ in override_argument("training.zero_stage=1")] == ["training.zero_stage=1"]
    assert list(override_argument("training.batch=")) == []
    assert list(override_argument("no.such=")) == []


@pytest.mark.parametrize("verb", ["train", "submit", "recipes", "data statistics"])
def test_a_shell_is_told(verb: str):
    words = f"smoe-hpc {verb} heat_smoe_l"
    environment = {"_SMOE_HPC_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(verb.split()) + 1)}
    done = subprocess.run(
        [sys.executable, "-m", "smoe_hpc"],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["heat_smoe_lcn_gate", "heat_smoe_linear_gate"], done.stderr


def test_it_can_be_installed():
    text = command("--help").output
    assert "--install-completion" in text
    assert "--show-completion" in text
