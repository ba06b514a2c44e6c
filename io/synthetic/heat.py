"""Location-dependent heat diffusion: the experiment of the SMoE paper (arXiv 2211.13491) that needs no download.

A flat domain has three regions of different diffusivity; each step every cell takes a little of its four neighbours, as
much as its own region says. A model sees one state and predicts the next: three filters suffice, if it finds out where
each applies. Every run has its own counter-based random numbers, so a run is the same however many are made with it.

Chosen here, where the published description leaves room: the rule of the region map (:func:`region_map`), a point
source sets its cell to 1, and a stored state is the float32 of the exact step from the stored state before it, so that
the true filters applied to any stored state give the next one to float32 rounding.

Dimensions: n runs made together, T states of a run, H rows, W columns.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np

from smoe_hpc.errors import DataError
from smoe_hpc.io.grids import Grid
from smoe_hpc.io.names import known_names
from smoe_hpc.io.store.layout import open_hdf5
from smoe_hpc.io.store.writer import StoreWriter
from smoe_hpc.progress import Progress

DIFFUSIVITIES = (0.0025, 0.025, 0.25)
SPLITS = ("train", "validation", "test")
STATE, OBSERVED = "heat", "observed"
VERSION = 1

_COHERENCE = 0.95
_MIN_SHARE = 0.25
_TRIES = 1000
_STATE_STREAM, _NOISE_STREAM, _MAP_STREAM = 0, 1, 2
_UNIT_RUNS = 8
_SLAB_BYTES = 16 << 20  # small enough for the allocator to use the same memory again, large enough for HDF5


def make_heat(
    directory: str | Path,
    runs: tuple[int, int, int] = (1000, 20, 20),
    grid: tuple[int, int] = (64, 64),
    steps: int = 100,
    seed: int = 0,
    noise: float = 0.0,
    noise_ratio: float = 1.0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Path]:
    """Write ``heat_train.h5``, ``heat_validation.h5`` and ``heat_test.h5``; quick when the very same are there.

    Samples are states, ordered by ``run`` and ``step`` (0..steps). Run numbers go on from split to split: with the
    default 0..999 train, 1000..1019 validate, 1020..1039 test. Channel ``heat`` is the state. With noise there is a
    second channel ``observed``, the state plus noise of its own: inputs are ``heat``, targets ``observed`` one step
    later, and ``heat`` one step later is the truth to score against. Constants: ``region`` [H, W] int (0, 1, 2),
    ``diffusivity`` [H, W] and, with noise, ``noise_std`` [H, W].

    Args:
        directory: where the files go; made when missing.
        runs: how many runs train, validate and test.
        grid: (H, W).
        steps: steps of a run; steps + 1 states are kept.
        seed: of everything.
        noise: standard deviation of the noise, in units of what tells the two most alike regions apart: the root mean
            square, over the states of 8 runs, of the difference between the forecasts of their two filters. 1 is as
            much noise as signal; the most different regions differ about ten times as much.
        noise_ratio: how many times larger the noise is in the western half.
        overwrite: replace other data under these names instead of refusing.
        progress: called with (runs done, runs in all).

    Returns:
        Path of each split.

    Raises:
        DataError: impossible arguments, other data already there, no space.
    """
    noisy = math.isfinite(noise) and noise >= 0 and math.isfinite(noise_ratio) and noise_ratio > 0
    if len(runs) != 3 or min(runs) < 1 or steps < 1 or min(grid) < 2 or seed < 0 or not noisy:
        raise DataError(
            f"heat data of runs={runs}, grid={grid}, steps={steps}, seed={seed}, noise={noise}, "
            f"noise_ratio={noise_ratio} cannot be made: give 3 numbers of runs, at least 1 step and 2 x 2 cells, "
            "a positive ratio and no negative seed or noise, both of them finite"
        )
    arguments = {"grid": list(grid), "steps": steps, "seed": seed, "noise": float(noise), "version": VERSION}
    arguments["noise_ratio"] = float(noise_ratio) if noise else 1.0
    first_run = np.concatenate([[0], np.cumsum(runs)]).tolist()
    paths = {split: Path(directory) / f"heat_{split}.h5" for split in SPLITS}
    wanted = {}
    for i, split in enumerate(SPLITS):
        recipe = json.dumps({**arguments, "runs": first_run[i : i + 2]}, sort_keys=True)
        found = _recipe_of(paths[split]) if paths[split].exists() else None
        if found == recipe:
            continue
        if found is not None and not overwrite:
            raise DataError(
                f"{paths[split]} holds other data ({found or 'not ours'}); name another folder, or replace it with "
                f"`smoe-hpc data heat {directory} --overwrite` and the options you want"
            )
        wanted[split] = recipe
    if not wanted:
        return paths

    region = region_map(grid, seed)
    diffusivity = np.array(DIFFUSIVITIES)[region]
    constants = {"region": region, "diffusivity": diffusivity}
    noise_std = None
    if noise:
        noise_std = np.full(grid, noise * noise_unit(region, diffusivity, steps, seed))
        noise_std[:, : grid[1] // 2] *= noise_ratio
        constants["noise_std"] = noise_std
    done, total = 0, sum(runs[SPLITS.index(split)] for split in wanted)
    for split, recipe in wanted.items():
        numbers = np.arange(*first_run[SPLITS.index(split) : SPLITS.index(split) + 2])
        coords = {"run": np.repeat(numbers, steps + 1), "step": np.tile(np.arange(steps + 1), len(numbers))}
        channels = [STATE, OBSERVED] if noise else [STATE]
        attributes = {"recipe": recipe, "sources": "synthetic: location-dependent heat diffusion, arXiv 2211.13491"}
        together = max(1, _SLAB_BYTES // (4 * len(channels) * (steps + 1) * grid[0] * grid[1]))
        with StoreWriter(
            paths[split],
            Grid.plane(*grid),
            channels,
            ["1"] * len(channels),
            coords=coords,
            constants=constants,
            attributes=attributes,
            overwrite=overwrite,
        ) as writer:
            for start in range(0, len(numbers), together):
                some = numbers[start : start + together]
                states = simulate(region, diffusivity, steps, seed, some)
                fields = states[:, :, None]
                if noise_std is not None:
                    fields = np.stack([states, states + _noise(noise_std, steps, seed, some)], axis=2)
                writer.write(start * (steps + 1), fields.reshape(-1, len(channels), *grid))
                done += len(some)
                if progress is not None:
                    progress(done, total)
    return paths


def region_map(grid: tuple[int, int], seed: int) -> np.ndarray:
    """[H, W] int64 of 0, 1, 2: coherent regions by a raster scan.

    A cell draws its region with probability 1/3 each, shifted toward its neighbours that have one already (west,
    north-west, north, north-east): ``0.05 / 3 + 0.95 * share of them in the region``. Maps in which a region has less
    than a quarter of the cells are drawn again (the published one has 1449, 1212 and 1435 cells of 4096).

    Raises:
        DataError: a grid too small to hold three regions.

    >>> np.bincount(region_map((64, 64), seed=0).ravel()).tolist()
    [1544, 1266, 1286]
    """
    height, width = grid
    for attempt in range(_TRIES):
        draws = np.random.Generator(_stream(seed, _MAP_STREAM, attempt)).random(grid)
        # counts[r, i, j]: neighbours of cell (i, j) drawn so far that are in region r; a spare column each side
        counts = np.zeros((3, height + 1, width + 2))
        region = np.empty(grid, dtype=np.int64)
        for i in range(height):
            for j in range(width):
                near = counts[:, i, j + 1]
                share = near / near.sum() if near.any() else np.full(3, 1 / 3)
                first, second, _ = (1 - _COHERENCE) / 3 + _COHERENCE * share
                chosen = int(draws[i, j] >= first) + int(draws[i, j] >= first + second)
                region[i, j] = chosen
                counts[chosen, i, j + 2] += 1
                counts[chosen, i + 1, j : j + 3] += 1
        if np.bincount(region.ravel(), minlength=3).min() >= _MIN_SHARE * height * width:
            return region
    raise DataError(f"grid {grid} is too small for three regions; use at least 8 x 8 cells")


def simulate(region: np.ndarray, diffusivity: np.ndarray, steps: int, seed: int, runs: np.ndarray) -> np.ndarray:
    """[n, T, H, W] float32: all states of the numbered runs."""
    height, width = region.shape
    states = np.empty((len(runs), steps + 1, height, width), dtype=np.float32)
    for n, run in enumerate(runs):
        states[n, 0] = start_state(region, seed, int(run))
    centre = 1 - 4 * diffusivity
    block = max(1, (1 << 16) // (height * width))  # runs whose working arrays stay in the processor's cache
    for first in range(0, len(runs), block):
        some = states[first : first + block]
        padded = np.zeros((len(some), height + 2, width + 2))
        inside = padded[:, 1:-1, 1:-1]
        around = np.empty((len(some), height, width))
        inside[...] = some[:, 0]
        for step in range(1, steps + 1):
            np.add(padded[:, :-2, 1:-1], padded[:, 2:, 1:-1], out=around)
            around += padded[:, 1:-1, :-2]
            around += padded[:, 1:-1, 2:]
            around *= diffusivity
            inside *= centre
            inside += around
            some[:, step] = inside
            inside[...] = some[:, step]  # the next step starts from what is stored
    return states


def start_state(region: np.ndarray, seed: int, run: int) -> np.ndarray:
    """[H, W] float32: U[0, 0.1] everywhere and, in each region, the same number (1 to 3) of cells set to 1."""
    draw = np.random.Generator(_stream(seed, _STATE_STREAM, run))
    state = (0.1 * draw.random(region.shape)).astype(np.float32)
    sources = 1 + int(3 * draw.random())
    for number in range(len(DIFFUSIVITIES)):
        cells = np.flatnonzero(region == number)
        state.flat[cells[(draw.random(sources) * len(cells)).astype(np.int64)]] = 1.0
    return state


def noise_unit(region: np.ndarray, diffusivity: np.ndarray, steps: int, seed: int) -> float:
    """What ``noise=1`` means: see :func:`make_heat`. The two filters differ by (d2 - d1) times the Laplacian."""
    states = simulate(region, diffusivity, steps, seed, np.arange(_UNIT_RUNS)).astype(np.float64)
    padded = np.pad(states, ((0, 0), (0, 0), (1, 1), (1, 1)))
    laplacian = padded[..., :-2, 1:-1] + padded[..., 2:, 1:-1] + padded[..., 1:-1, :-2] + padded[..., 1:-1, 2:]
    laplacian -= 4 * states
    return float(np.diff(DIFFUSIVITIES).min() * np.sqrt(np.square(laplacian).mean()))


def _noise(noise_std: np.ndarray, steps: int, seed: int, runs: np.ndarray) -> np.ndarray:
    shape = (steps + 1, *noise_std.shape)
    scale = noise_std.astype(np.float32)
    draws = [np.random.Generator(_stream(seed, _NOISE_STREAM, int(run))) for run in runs]
    return np.stack([scale * draw.standard_normal(shape, np.float32) for draw in draws])


def _stream(seed: int, kind: int, number: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence([seed, kind, number]))


def _recipe_of(path: Path) -> str:
    """What a store says it was made with; empty for anything else that lies there, damaged files included."""
    try:
        with open_hdf5(path) as file:
            return str(file.attrs.get("recipe", ""))
    except DataError:
        return ""


def split_path(directory: str | Path, split: str, remedy: str = "") -> Path:
    """The file of one split.

    Args:
        directory: that holds it.
        split: one of ``SPLITS``.
        remedy: what an error says where the file is missing; the plain command if not given.

    Raises:
        DataError: an unknown split, or data not made yet.
    """
    if split not in SPLITS:
        raise DataError(f"heat data have no split {split!r}; {known_names(split, SPLITS)}")
    path = Path(directory) / f"heat_{split}.h5"
    if not path.exists():
        raise DataError(f"{path} does not exist; {remedy or f'make it with `smoe-hpc data heat {directory}`'}")
    return path
