"""Learning curves: the loss, the validation score and the restlessness of the routing."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smoe_hpc.report import style
from smoe_hpc.runs.metrics import Events

SMOOTH = 60
"""Bins into which a curve of many steps is averaged: what remains can be seen."""

SCORE_NAMES = {"within_1pct": "points within 1 % (%)", "rmse": "RMSE", "loss": "loss"}


def smoothed(steps: np.ndarray, values: np.ndarray, bins: int = SMOOTH) -> tuple[np.ndarray, np.ndarray]:
    """Means over at most ``bins`` stretches of steps: their last step and mean."""
    if len(steps) <= bins:
        return steps, values
    parts = np.array_split(np.arange(len(steps)), bins)
    return steps[[part[-1] for part in parts]], np.array([np.nanmean(values[part]) for part in parts])


def draw_curves(events: Events, score: str, unit: str, title: str) -> Figure | None:
    """Learning curves; None where nothing was written down yet.

    Args:
        events: of `smoe_hpc.runs.metrics.read_events`.
        score: the validation score to show, over all and per region.
        unit: of the score, "" for none.
        title: of the picture.
    """
    steps, validations = events["step"], events["validation"]
    restless = [event for event in steps if event.get("selections_changed") is not None]
    if not steps and not validations:
        return None
    panels = 2 + bool(restless)
    made = style.figure(4.4 * panels, 3.6, title)
    axes = made.subplots(1, panels)
    _draw_loss(axes[0], steps, validations)
    _draw_score(axes[1], validations, score, unit)
    if restless:
        _draw_changes(axes[2], restless)
    for panel in axes:
        panel.set_xlabel("optimiser step", fontsize=9)
        panel.tick_params(which="both", labelsize=8)
    return made


def _series(events: list[dict[str, Any]], *path: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a nested figure, where it is there and finite."""
    found = []
    for event in events:
        value: Any = event
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            found.append((event["step"], value))
    array = np.array(found, dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _draw_loss(axes: Axes, steps: list[dict[str, Any]], validations: list[dict[str, Any]]) -> None:
    axes.plot(*smoothed(*_series(steps, "loss")), color=style.PALETTE[0], linewidth=1.4, label="training")
    at, values = _series(validations, "scores", "all", "loss")
    axes.plot(at, values, color=style.PALETTE[5], linewidth=1.2, marker="o", markersize=3, label="validation")
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    style.tidy(axes, "loss (mean squared error)")


def _draw_score(axes: Axes, validations: list[dict[str, Any]], score: str, unit: str) -> None:
    regions = list(dict.fromkeys(region for event in validations for region in event["scores"]))
    numbered = 0
    for region in sorted(regions, key=lambda name: name != "all"):
        at, values = _series(validations, "scores", region, score)
        if region == "all":
            look: dict[str, Any] = {"color": "black", "linewidth": 2.0, "zorder": 3, "label": "all"}
        else:
            colour = style.PALETTE[numbered % len(style.PALETTE)]
            look = {"color": colour, "linewidth": 1.2, "label": region.replace("_", " ")}
            numbered += 1
        axes.plot(at, values, marker="o", markersize=3, **look)
    at, values = _series(validations, "scores", "all", f"persistence_{score}")
    if len(values):
        axes.axhline(values[-1], color=style.GREY, linestyle="--", linewidth=1.2, label="persistence")
    if score == "within_1pct":
        axes.set_ylim(-3, 103)
    axes.legend(frameon=False, fontsize=8)
    name = SCORE_NAMES.get(score, score)
    style.tidy(axes, f"validation: {name}" + (f" ({unit})" if unit else ""))


def _draw_changes(axes: Axes, steps: list[dict[str, Any]]) -> None:
    at, values = smoothed(*_series(steps, "selections_changed"))
    axes.plot(at, 100 * values, color=style.PALETTE[2], linewidth=1.4)
    axes.set_yscale("symlog", linthresh=0.01)
    axes.set_ylim(bottom=0)
    style.tidy(axes, "selections re-routed per step (%)")
