"""A task that fits in memory and a second, for trials of the loop; and a command line to run it in processes of its
own.

Dimensions: B batch, H rows, W columns.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from smoe_hpc.config import Data, Optimizer, Recipe, Run, Schedule, Training
from smoe_hpc.errors import SmoeError
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.loading.batch import Batch
from smoe_hpc.io.loading.samples import Samples
from smoe_hpc.io.sampling.windows import Window
from smoe_hpc.io.store.encoding import Encoding
from smoe_hpc.io.store.interface import FieldReader
from smoe_hpc.runs import Selection
from smoe_hpc.training import RunInterrupted, train

GRID = (6, 5)


class MemoryStore(FieldReader):
    """Fields [T, 1, H, W] in memory, in runs of two steps."""

    def __init__(self, fields: np.ndarray) -> None:
        self.path, self.attributes, self.constants = Path("memory"), {}, {}
        self.grid, self.channels, self.units, self.transforms = Grid.plane(*GRID), ["heat"], ["1"], ["none"]
        self.encoding, self.num_samples, self.fields = Encoding.identity(1), len(fields), fields
        self.coords = {"run": np.arange(len(fields)) // 2, "step": np.arange(len(fields)) % 2}

    direct = True
    folder = Path()

    def digest(self) -> str:
        return "memory"

    def describe_row(self, row: int) -> str:
        return f"row {row}"

    def close(self) -> None:
        return

    def _fill(self, rows: np.ndarray, channels: Any, out: np.ndarray, where: np.ndarray, check: bool) -> None:
        out[where] = self.fields[rows][:, list(channels)]


class MemorySamples(Samples):
    """Random fields; the target is a fixed blur whose strength differs between the left and the right half."""

    def __init__(self, number: int, seed: int, kept: int | None = None) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.inputs = torch.randn(number, 1, *GRID, generator=generator)[:kept]
        blurred = nn.functional.avg_pool2d(self.inputs, 3, stride=1, padding=1)
        strength = torch.where(torch.arange(GRID[1]) < 2, 0.5, 2.0)
        self.targets = strength * blurred
        fields = torch.stack([self.inputs, self.targets], dim=1).flatten(0, 1).numpy()
        super().__init__(MemoryStore(fields), Window((0,), 1))


@dataclass
class MeanSquare:
    total: Tensor
    number: Tensor

    def update(self, output: Tensor, batch: Batch, valid: Tensor) -> None:
        error = (output - batch.targets).double().square().mean(dim=(1, 2, 3))
        self.total += (error * valid).sum().cpu()
        self.number += valid.sum().cpu()

    def state(self) -> dict[str, Tensor]:
        return {"total": self.total, "number": self.number}

    def result(self) -> dict[str, dict[str, float]]:
        return {"all": {"loss": float(self.total / self.number)}}


class ToyTask:
    """``kind``: "conv" (smooth), "batch" (a layer with buffers), "nan" (the loss breaks at step 7), or two SMoE layers:
    "smoe" (latent gates), "smoe_conv_gate" (gates that read the input), "smoe_per_sample" (latent gates with noise of each
    sample), "smoe_running_mean" (errors over their mean of past steps).
    """

    selection = Selection("validation", "all", "loss", "min")

    def __init__(self, kind: str = "conv", width: int = 3, seed: int = 0, train_samples: int = 100) -> None:
        self.kind, self.width, self.seed = kind, width, seed
        self.grid = Grid.plane(*GRID)
        train = MemorySamples(100, 1, train_samples)
        self._samples: dict[str, Samples] = {"train": train, "validation": MemorySamples(13, 2), "test": MemorySamples(11, 3)}
        self._calls = 0

    def build_model(self) -> nn.Module:
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind.startswith("smoe"):
            model: nn.Module = nn.Sequential(
                self._routed(1, 4, filters=2, generator=generator),
                nn.Tanh(),
                self._routed(2, 3, filters=1, generator=generator),
            )
        else:
            middle = nn.BatchNorm2d(self.width) if self.kind == "batch" else nn.Tanh()
            model = nn.Sequential(nn.Conv2d(1, self.width, 3, padding=1), middle, nn.Conv2d(self.width, 1, 3, padding=1))
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.3, generator=generator)
        return model

    def _routed(self, incoming: int, experts: int, filters: int, generator: torch.Generator) -> nn.Module:
        from smoe_hpc.layers import RoutingLoss, SpatialMoE2d, make_gate

        kind = "conv" if self.kind == "smoe_conv_gate" else "latent"
        noise = "per_sample" if self.kind == "smoe_per_sample" else "none"
        scale = "running_mean" if self.kind == "smoe_running_mean" else "none"
        gate = make_gate(kind, experts, 1, GRID, in_channels=incoming, noise=noise, noise_seed=experts, generator=generator)
        options = {"gate": gate, "routing_loss": RoutingLoss(error_scale=scale), "generator": generator}
        return SpatialMoE2d(incoming, experts, 1, GRID, filters_per_expert=filters, **options)

    def describe(self) -> None:
        return None

    def samples(self, split: str) -> Samples:
        return self._samples[split]

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        loss = (output - batch.targets).square().mean()
        self._calls += 1
        return loss * float("nan") if self.kind == "nan" and self._calls == 7 else loss

    def score(self, split: str) -> MeanSquare:
        return MeanSquare(torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64))


def recipe(**changes: Any) -> Recipe:
    """A recipe of 3 epochs of 12 steps; ``training__batch=4`` changes a key of a section."""
    made = Recipe(
        name="toy",
        task="heat",
        data=Data(store="none"),
        optimizer=Optimizer(lr=1e-2, clip=0.5, weight_decay=1e-3),
        schedule=Schedule(patience=2, early_stop=None),
        training=Training(epochs=3, batch=8, validate_every=5, threads=1),
        run=Run(checkpoint_every=4),
    )
    for name, value in changes.items():
        section, _, key = name.partition("__")
        made = replace(made, **{section: replace(getattr(made, section), **{key: value}) if key else value})
    return made


def draw(run_dir: Path, model: nn.Module) -> None:
    """In place of pictures."""
    (run_dir / "drawn").touch()


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Values of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def exit_status(made: Recipe, task: ToyTask, run_dir: Path, progress: bool = True) -> int:
    """Train, and say on stderr what failed, as the command does."""
    try:
        train(made, task, run_dir=run_dir, progress=progress)
    except RunInterrupted as error:
        print(error, file=sys.stderr)
        return error.exit_status
    except SmoeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def main() -> int:
    """Train the toy task: ``toy.py RUN_DIR [--kind smoe] [training__epochs=5 ...]``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--kind", default="conv")
    parser.add_argument("--slow", type=float, default=0.0, help="seconds that each loss takes")
    parser.add_argument("changes", nargs="*")
    arguments = parser.parse_intermixed_args()
    changes = {key: json.loads(value) for key, value in (change.split("=", 1) for change in arguments.changes)}
    task = ToyTask(arguments.kind)
    if arguments.slow:
        quick = task.loss
        task.loss = lambda output, batch: (time.sleep(arguments.slow), quick(output, batch))[1]  # type: ignore[method-assign]
    return exit_status(recipe(**changes), task, arguments.run_dir)


if __name__ == "__main__":
    sys.exit(main())
