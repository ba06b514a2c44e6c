"""Pictures of what a routing and its experts have learned.

Dimensions: N experts, K selected experts, Q regions, C input channels, H latitude rows, W longitude columns.
"""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from smoe_hpc.io.grids import Grid
from smoe_hpc.report import style
from smoe_hpc.scores import Matching, best_matching, confusion_matrix, stencil_differences

MOST_EXPERTS = 32
"""Experts that a picture shows; those with the most cells where there are more."""

MOST_FILTERS = 48


def draw_routing_beside_regions(experts: np.ndarray, region: np.ndarray, grid: Grid, num_experts: int, title: str) -> Figure:
    """True regions, learned routing in the colours of the regions its experts stand for, and where they differ.

    Args:
        experts: [H, W] expert of each cell.
        region: [H, W] true region of each cell.
        grid: of both.
        num_experts: N.
        title: of the picture.
    """
    matching = best_matching(confusion_matrix(experts, region, num_experts))
    regions = int(region.max()) + 1
    # Experts that stand for no region get the colours that are left.
    spare = iter(range(regions, regions + num_experts))
    colour_of = np.array([matching.region_of_expert.get(n, None) for n in range(num_experts)], dtype=object)
    colour_of = np.array([next(spare) if colour is None else colour for colour in colour_of], dtype=int)
    shown = colour_of[experts] % len(style.PALETTE)
    options = style.categories(len(style.PALETTE))
    made = style.figure(11, 4.5, title)
    axes = made.subplots(1, 3)
    style.show_map(axes[0], region % len(style.PALETTE), grid, "true regions", **options)
    style.show_map(axes[1], shown, grid, "learned routing", labels=False, **options)
    wrong = shown != region % len(style.PALETTE)
    caption = f"{int(wrong.sum())} of {wrong.size} cells differ ({100 * (1 - wrong.mean()):.2f} % agree)"
    style.show_map(axes[2], wrong, grid, caption, labels=False, cmap="Greys", vmin=0, vmax=1)
    entries = [(f"region {r}", r) for r in range(regions)]
    for n in range(num_experts):
        colour = int(colour_of[n])
        if colour < regions:
            entries[colour] = (f"region {colour}, expert {n}", colour)
        elif (experts == n).any():
            entries.append((f"expert {n}", colour))
    _legend(made, entries)
    return made


def _legend(made: Figure, entries: list[tuple[str, int]]) -> None:
    handles = [Patch(color=style.PALETTE[colour % len(style.PALETTE)], label=name) for name, colour in entries]
    made.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), frameon=False, fontsize=9)


def draw_experts(indices: np.ndarray, grid: Grid, num_experts: int, title: str) -> Figure:
    """Where each expert works; one map in colours for a few experts of which one is selected, else a map each.

    Args:
        indices: [K, H, W] experts of each cell.
        grid: of the maps.
        num_experts: N.
        title: of the picture.
    """
    if len(indices) == 1 and num_experts <= len(style.PALETTE):
        made = style.figure(5.5, 5, title)
        axes = made.subplots()
        style.show_map(axes, indices[0], grid, "selected expert", **style.categories(num_experts))
        _legend(made, [(f"expert {n}", n) for n in range(num_experts)])
        return made
    used = np.stack([(indices == n).any(0) for n in range(num_experts)])
    share = used.mean((1, 2))
    chosen = np.sort(np.argsort(-share, kind="stable")[:MOST_EXPERTS])
    columns = min(8, math.ceil(math.sqrt(len(chosen))))
    rows = math.ceil(len(chosen) / columns)
    left_out = f"; the {len(chosen)} most used of {num_experts}" if len(chosen) < num_experts else ""
    wide = max(grid.shape[1] / grid.shape[0], 0.6)
    made = style.figure(max(1.5 * columns * min(wide, 2) ** 0.5, 4.5), 1.65 * rows + 0.8, f"{title}{left_out}")
    panels = made.subplots(rows, columns, squeeze=False).ravel()
    for axes, n in zip(panels, chosen, strict=False):
        title_ = f"expert {n}: {100 * share[n]:.0f} %"
        style.show_map(axes, used[n], grid, title_, labels=False, cmap="Blues", vmin=0, vmax=1.2)
        axes.title.set_fontsize(8)
    for axes in panels[len(chosen) :]:
        axes.set_visible(False)
    return made


def true_stencils(diffusivity: np.ndarray, region: np.ndarray) -> np.ndarray:
    """[Q, 3, 3] of the heat experiment: what a step takes from the cell and its four neighbours, by region.

    Args:
        diffusivity: [H, W], constant in each region.
        region: [H, W].
    """
    stencils = np.zeros((int(region.max()) + 1, 3, 3))
    for r in range(len(stencils)):
        d = float(diffusivity[region == r][0])
        stencils[r] = [[0, d, 0], [d, 1 - 4 * d, d], [0, d, 0]]
    return stencils


def draw_stencils(filters: np.ndarray, stencils: np.ndarray, matching: Matching, title: str) -> Figure:
    """Learned filters beside the true stencils of the regions they stand for, with their figures.

    Args:
        filters: [N, 3, 3].
        stencils: [Q, 3, 3].
        matching: of experts and regions.
        title: of the picture.
    """
    differences = stencil_differences(filters, stencils, matching.region_of_expert)
    pairs = sorted((region, expert) for expert, region in matching.region_of_expert.items())
    made = style.figure(7.4, 2.3 * len(pairs) + 0.6, title)
    panels = made.subplots(len(pairs), 3, squeeze=False)
    for row, (region, expert) in zip(panels, pairs, strict=True):
        learned, true = filters[expert], stencils[region]
        _draw_filter(row[0], true, f"region {region}: true", float(np.abs(stencils).max()))
        _draw_filter(row[1], learned, f"expert {expert}: learned", float(np.abs(stencils).max()))
        largest = differences[region]
        scale = max(largest, 1e-12)
        _draw_filter(row[2], learned - true, f"difference, at most {largest:.1e}", scale, "{:.0e}")
    return made


def draw_filters(weight: np.ndarray, title: str) -> Figure:
    """Filters of a layer: a column an expert or output channel, below one another its input channels.

    Args:
        weight: [filters, C, k, k].
        title: of the picture.
    """
    channels = min(weight.shape[1], 8)
    number = min(weight.shape[0], max(1, MOST_FILTERS // channels))
    columns = min(number, 8)
    blocks = math.ceil(number / columns)
    few = number * channels <= 12 and weight.shape[-1] <= 3
    size = 1.4 if few else 0.95
    shown = f" ({number} of {weight.shape[0]})" if number < weight.shape[0] else ""
    made = style.figure(max(size * columns + 1.0, 5.0), size * blocks * channels + 0.9, f"{title}{shown}")
    panels = made.subplots(blocks * channels, columns, squeeze=False)
    scale = float(np.abs(weight).max()) or 1.0
    for n, c in np.ndindex(blocks * columns, channels):
        axes = panels[n // columns * channels + c, n % columns]
        if n >= number:
            axes.set_visible(False)
            continue
        _draw_filter(axes, weight[n, c], f"filter {n}" if c == 0 else "", scale, "{:.2g}" if few else "")
        if n % columns == 0 and channels > 1:
            axes.set_ylabel(f"input {c}", fontsize=8)
    if not few:  # no figures to read, so a scale
        made.colorbar(panels[0, 0].images[0], ax=panels, shrink=0.6, label="weight")
    return made


def _draw_filter(axes: Axes, values: np.ndarray, title: str, scale: float, form: str = "{:.4f}") -> None:
    axes.imshow(values, cmap=style.ERROR_COLOURS, vmin=-scale, vmax=scale)
    axes.set_title(title, fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    for (i, j), value in np.ndenumerate(values):
        if form:
            dark = abs(value) > 0.6 * scale
            axes.text(j, i, form.format(value), ha="center", va="center", fontsize=7, color="white" if dark else "black")
