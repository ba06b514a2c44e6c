"""Scores: what is added up over batches and processes, and what is made of the sums."""

from smoe_hpc.scores.acc import AnomalyCorrelation
from smoe_hpc.scores.accumulate import Accumulator, PointScore, PointSums, region_masks
from smoe_hpc.scores.rmse import Mse, Rmse
from smoe_hpc.scores.routing import (
    Matching,
    RoutingAgreement,
    best_matching,
    confusion_matrix,
    load_entropy,
    stencil_differences,
)
from smoe_hpc.scores.weights import area_weights
from smoe_hpc.scores.within import Within

__all__ = [
    "Accumulator",
    "AnomalyCorrelation",
    "Matching",
    "Mse",
    "PointScore",
    "PointSums",
    "Rmse",
    "RoutingAgreement",
    "Within",
    "area_weights",
    "best_matching",
    "confusion_matrix",
    "load_entropy",
    "region_masks",
    "stencil_differences",
]
