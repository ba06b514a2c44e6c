"""How pictures look: colours that colour-blind people can tell apart, maps with their coordinates, one way to save.

Figures are drawn without pyplot, so that nothing global is touched and any thread of a training run may draw.

Dimensions: H latitude rows, W longitude columns.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure

from smoe_hpc.io.grids import Grid

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#555555")
"""Okabe and Ito's colours, those that lie far apart first."""

FIELD_COLOURS, ERROR_COLOURS = "viridis", "RdBu_r"
GREY, LIGHT = "#444444", "#DDDDDD"


def figure(width: float, height: float, title: str | None = None) -> Figure:
    """An empty figure, sizes in inches."""
    made = Figure(figsize=(width, height), layout="constrained")
    if title is not None:
        made.suptitle(title, fontsize=12, fontweight="bold")
    return made


def tidy(axes: Axes, title: str | None = None) -> None:
    """Axes of a curve: no frame above and to the right, a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=LIGHT, linewidth=0.6)
    axes.set_axisbelow(True)
    if title is not None:
        axes.set_title(title, fontsize=10, loc="left")


def show_map(axes: Axes, values: np.ndarray, grid: Grid, title: str, labels: bool = True, **options: Any) -> Any:
    """A field [H, W] on its grid; north is up. Options are ``imshow``'s."""
    if grid.kind == "plane":
        image = axes.imshow(values, origin="upper", interpolation="nearest", **options)
        names = ("column", "row")
    else:
        lon = grid.lon - 360 if grid.lon[0] >= 180 and not grid.periodic else grid.lon
        south, north = _outer(grid.lat)
        west, east = _outer(lon)
        stretch = 1 / max(math.cos(math.radians((south + north) / 2)), 0.2)
        image = axes.imshow(
            values, origin="lower", interpolation="nearest", extent=(west, east, south, north),
            aspect=1.0 if grid.periodic else stretch, **options,
        )  # fmt: skip
        names = ("longitude (° east)", "latitude (° north)")
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    if labels:
        axes.set_xlabel(names[0], fontsize=8)
        axes.set_ylabel(names[1], fontsize=8)
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    return image


def _outer(values: np.ndarray) -> tuple[float, float]:
    """Outer edges of evenly spaced cells."""
    half = (values[-1] - values[0]) / (len(values) - 1) / 2 if len(values) > 1 else 0.5
    return float(values[0] - half), float(values[-1] + half)


def categories(count: int) -> dict[str, Any]:
    """``imshow`` options for a map of numbers 0 to count - 1, at most as many as there are colours."""
    return {"cmap": ListedColormap(PALETTE[:count]), "norm": BoundaryNorm(np.arange(count + 1) - 0.5, count)}


def save(made: Figure, path: Path) -> Path:
    """Write a PNG, whole or not at all; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    made.savefig(partial, format="png", dpi=130, facecolor="white")
    partial.replace(path)
    return path
