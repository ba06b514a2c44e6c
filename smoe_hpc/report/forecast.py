"""One forecast beside the truth and its error.

Dimensions: H latitude rows, W longitude columns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from smoe_hpc.io.grids import Grid
from smoe_hpc.report import style


def draw_forecast(
    start: np.ndarray | None, truth: np.ndarray, forecast: np.ndarray, grid: Grid, unit: str, title: str
) -> Figure:
    """Newest input (if it is the same field), truth, forecast and forecast minus truth, each [H, W] in ``unit``."""
    fields = [("newest input", start), ("truth", truth), ("forecast", forecast)]
    shown = [(name, field) for name, field in fields if field is not None]
    values = np.stack([field for _, field in shown])
    low, high = np.percentile(values, [0.5, 99.5])
    error = forecast - truth
    largest = max(float(np.percentile(np.abs(error), 99.5)), 1e-12)
    panels = len(shown) + 1
    made = style.figure(3.3 * panels, 3.9, title)
    axes = made.subplots(1, panels)
    options = {"cmap": style.FIELD_COLOURS, "vmin": low, "vmax": max(high, low + 1e-12)}
    images = [
        style.show_map(panel, field, grid, name, labels=number == 0, **options)
        for number, (panel, (name, field)) in enumerate(zip(axes, shown, strict=False))
    ]
    in_unit = f" {unit}" if unit not in ("", "1") else ""
    caption = f"forecast - truth (RMSE {np.sqrt(np.square(error).mean()):.3g}{in_unit})"
    image = style.show_map(axes[-1], error, grid, caption, labels=False, cmap=style.ERROR_COLOURS, vmin=-largest, vmax=largest)
    in_unit = in_unit and f" ({unit})"
    look: dict[str, Any] = {"orientation": "horizontal", "shrink": 0.7, "aspect": 30, "extend": "both"}
    made.colorbar(images[0], ax=list(axes[:-1]), label=f"field{in_unit}", **{**look, "aspect": 50})
    made.colorbar(image, ax=axes[-1], label=f"error{in_unit}", **look)
    return made
