"""What a store from elsewhere says of its own making."""

from pathlib import Path

import numpy as np
import pytest

from smoe_hpc.config import load_recipe
from smoe_hpc.errors import DataError
from smoe_hpc.io import Grid, StoreWriter
from smoe_hpc.tasks import make_task


@pytest.mark.parametrize("text", ["[" * 50_000, "[]", "nonsense", '{"noise": NaN}', '{"noise": [1]}'])
def test_a_store_that_says_nonsense_of_its_making(text: str, tmp_path: Path) -> None:
    coords = {"run": np.zeros(3, int), "step": np.arange(3)}
    path = tmp_path / "heat_train.h5"
    with StoreWriter(path, Grid.plane(4, 4), ["heat"], ["K"], coords=coords, attributes={"recipe": text}) as writer:
        writer.write(0, np.zeros((3, 1, 4, 4)))
    recipe = load_recipe("heat_smoe", [f"data.store={tmp_path}", "data.noise=1", "model.routing_loss.quantile=balanced"])
    words = r"heat_train\.h5(: its attribute 'recipe' .*; make the data| was made with noise=\[1\] but)"
    with pytest.raises(DataError, match=words):
        make_task(recipe)
