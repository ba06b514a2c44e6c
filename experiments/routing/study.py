"""How routing settles when the targets have irreducible error: the study behind the defaults of the routing loss.

Noisy heat diffusion (paper, section 4, with noise added to the targets) for N = 2, 3 and 4 experts and as many regions;
noise of one size everywhere, or ten times larger in the western half. For every quantile, gate learning rate, error scale
and damping: the share of pixels on the right expert after some epochs, and how often a pixel changed its expert in the
last one. One batched computation for all settings of a case (:mod:`experiments.routing.ensemble`).

Dimensions: S settings, B batch, H, W grid, P pixels, N experts.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.routing.ensemble import Ensemble, Setting, patches_of
from smoe_hpc.io.synthetic.heat import DIFFUSIVITIES, noise_unit, region_map, simulate

_STATES = 100  # pairs of states that a run gives
_SEED = 0


@dataclass(frozen=True)
class Case:
    """One kind of data: how many regions, how much noise.

    Args:
        num_experts: N, also the number of regions.
        noise: in the quieter half, in units of :func:`smoe_hpc.io.synthetic.heat.noise_unit`.
        noise_ratio: western over eastern half.
    """

    num_experts: int
    noise: float
    noise_ratio: float


@dataclass(frozen=True)
class Scope:
    """What the study covers.

    Args:
        cases: kinds of data.
        quantiles: in units of K / N.
        gate_lrs, error_scales, dampings: of the settings.
        lr: of the experts.
        seeds: starts of each setting; figures are means over them.
        runs: heat runs to draw batches from (100 pairs each); an epoch is that many pairs.
        epochs: of training.
        batch: samples a step.
        grid: (H, W).
    """

    cases: tuple[Case, ...] = tuple(Case(n, 0.3, ratio) for n in (2, 3, 4) for ratio in (1.0, 10.0))
    quantiles: tuple[float, ...] = (0.6, 0.9, 1.0, 1.1, 1.2, 1.35, 1.6, 2.0)
    gate_lrs: tuple[float, ...] = (1e-3, 1e-2)
    error_scales: tuple[str, ...] = ("none", "running_mean")
    dampings: tuple[float, ...] = (0.05, 1.0)
    lr: float = 3e-3
    seeds: int = 2
    runs: int = 400
    epochs: int = 5
    batch: int = 32
    grid: tuple[int, int] = (64, 64)


def routing_study(
    scope: Scope, device: torch.device | str = "cpu", say: Callable[[str], None] = lambda line: None
) -> list[dict[str, Any]]:
    """Train every setting of every case.

    Returns:
        A row for each case and setting (seeds averaged): the fields of :class:`Case` and :class:`Setting` (``quantile`` as
        a number, ``relative_quantile`` in units of K / N), ``agreement`` (% of pixels on the right expert; also
        ``agreement_of_each_seed``), ``rerouted`` (times that a pixel changed its expert in the last epoch, mean over
        pixels) and ``steps``.
    """
    rows: list[dict[str, Any]] = []
    for case in scope.cases:
        start = time.perf_counter()
        rows += _study_case(case, scope, torch.device(device))
        say(f"{case}: {time.perf_counter() - start:.0f} s")
    return rows


def tables(rows: list[dict[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Rows of :func:`routing_study` as a table for each case: (title, columns, cells).

    A cell is "% of pixels on the right expert / re-routings of a pixel in the last epoch".
    """
    made = []
    for case in dict.fromkeys((row["num_experts"], row["noise"], row["noise_ratio"]) for row in rows):
        some = [row for row in rows if (row["num_experts"], row["noise"], row["noise_ratio"]) == case]
        quantiles = sorted({round(row["relative_quantile"], 2) for row in some})
        lines: dict[tuple[Any, ...], dict[float, str]] = {}
        for row in some:
            key = row["error_scale"], row["damping"], row["gate_lr"]
            cell = f"{row['agreement']:.0f} / {row['rerouted']:.0f}"
            lines.setdefault(key, {})[round(row["relative_quantile"], 2)] = cell
        title = f"N/K = {case[0]}, noise {case[1]:g}, western half x{case[2]:g}"
        columns = ["error scale, damping, gate rate", *(f"q = {quantile:g} K/N" for quantile in quantiles)]
        cells = [[f"{k[0]}, {k[1]:g}, {k[2]:g}", *(v.get(q, "-") for q in quantiles)] for k, v in lines.items()]
        made.append((title, columns, cells))
    return made


def _study_case(case: Case, scope: Scope, device: torch.device) -> list[dict[str, Any]]:
    regions, clean, noise_std = _data(case, scope, device)
    options = itertools.product(scope.quantiles, scope.gate_lrs, scope.error_scales, scope.dampings)
    settings = [
        Setting(min(relative / case.num_experts, 0.99), gate_lr, scope.lr, damping, scale, seed)
        for relative, gate_lr, scale, damping in options
        for seed in range(scope.seeds)
    ]
    ensemble = Ensemble(settings, case.num_experts, scope.grid, device)
    generator = torch.Generator(device).manual_seed(_SEED)
    pairs = scope.runs * _STATES
    steps_per_epoch = pairs // scope.batch
    for _ in range(scope.epochs):
        ensemble.changed.zero_()
        order = torch.randperm(pairs, generator=generator, device=device)
        for step in range(steps_per_epoch):
            chosen = order[step * scope.batch : (step + 1) * scope.batch]
            run, state = chosen // _STATES, chosen % _STATES
            target = clean[run, state + 1].flatten(1)
            target = target + noise_std * torch.randn(target.shape, generator=generator, device=device)
            ensemble.train_step(patches_of(clean[run, state]), target)
    agreement, changed = ensemble.agreement(regions), ensemble.changed.cpu()
    rows = []
    for first in range(0, len(settings), scope.seeds):
        some = slice(first, first + scope.seeds)
        row = {**asdict(case), **asdict(settings[first]), "relative_quantile": settings[first].quantile * case.num_experts}
        row |= {"agreement": 100 * float(agreement[some].mean()), "rerouted": float(changed[some].mean())}
        row |= {"agreement_of_each_seed": [100 * float(value) for value in agreement[some]]}
        row |= {"seeds": scope.seeds, "steps": scope.epochs * steps_per_epoch}
        del row["seed"]
        rows.append(row)
    return rows


def _data(case: Case, scope: Scope, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Regions [P], clean states [runs, 101, H, W], standard deviation of the targets' noise [P]."""
    base = region_map(scope.grid, _SEED)
    regions = _regions(base, case.num_experts)
    values = np.geomspace(DIFFUSIVITIES[0], DIFFUSIVITIES[-1], case.num_experts)
    diffusivity = values[regions]
    states = simulate(base, diffusivity, _STATES, _SEED, np.arange(scope.runs))
    noise_std = np.full(scope.grid, case.noise * noise_unit(base, np.array(DIFFUSIVITIES)[base], _STATES, _SEED))
    noise_std[:, : scope.grid[1] // 2] *= case.noise_ratio
    as_tensor = torch.from_numpy
    return (
        as_tensor(regions).flatten(),
        as_tensor(states).to(device),
        as_tensor(noise_std.astype(np.float32)).flatten().to(device),
    )


def _regions(base: np.ndarray, count: int) -> np.ndarray:
    """A map of ``count`` regions from one of three: the last two joined (2), or a part of each set apart (4)."""
    if count == 2:
        return np.minimum(base, 1)
    if count == 4:
        return np.where(region_map((base.shape[0], base.shape[1]), _SEED + 1) == 0, 3, base)
    assert count == 3, "the study has 2, 3 or 4 regions"
    return base
