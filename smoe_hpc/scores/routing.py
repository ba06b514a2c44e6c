"""How well a learned routing agrees with regions that are known, and how evenly it uses its experts.

Experts have no names: expert 2 may have learned region 0. So the experts are first matched to the regions in the way
that agrees best, and the agreement is the share of cells whose expert is the one matched to their region.

Dimensions: N experts, Q regions, K selected experts, H latitude rows, W longitude columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from smoe_hpc.errors import DataError
from smoe_hpc.runs import Scores


def confusion_matrix(experts: np.ndarray | Tensor, region: np.ndarray | Tensor, num_experts: int) -> np.ndarray:
    """How many cells of each region go to each expert.

    Args:
        experts: [..., H, W] number of the expert at each cell.
        region: [H, W] number of the region of each cell, from 0.
        num_experts: N.

    Returns:
        [N, Q] float64 counts.

    Raises:
        DataError: maps of different grids.
    """
    experts, region = np.asarray(experts), np.asarray(region).astype(np.int64)
    if experts.shape[-2:] != region.shape:
        raise DataError(f"routing map {experts.shape} and region map {region.shape} are of different grids")
    num_regions = int(region.max()) + 1
    cells = experts.astype(np.int64) * num_regions + region
    counts = np.bincount(cells.ravel(), minlength=num_experts * num_regions)
    return counts.reshape(num_experts, num_regions).astype(np.float64)


@dataclass(frozen=True)
class Matching:
    """Which expert stands for which region.

    Args:
        region_of_expert: the region of each expert in the best one-to-one matching; an expert that is left over (N > Q)
            has none.
        one_to_one: % of cells whose expert is the one matched to their region.
        many_to_one: % of cells whose expert serves their region more than any other; several experts may share a
            region, so this is 100 too where a region has been divided among experts, and never below ``one_to_one``.
    """

    region_of_expert: dict[int, int]
    one_to_one: float
    many_to_one: float


def best_matching(confusion: np.ndarray) -> Matching:
    """The matching of experts and regions that agrees on the most cells (Hungarian method).

    Args:
        confusion: [N, Q] counts or weights, e.g. of :func:`confusion_matrix`.

    >>> best_matching(np.array([[0.0, 9.0], [6.0, 5.0]])).one_to_one
    75.0
    """
    total = confusion.sum()
    experts, regions = linear_sum_assignment(-confusion)
    pairs = {int(expert): int(region) for expert, region in zip(experts, regions, strict=True)}
    if not total > 0:
        return Matching(pairs, float("nan"), float("nan"))
    matched, served = confusion[experts, regions].sum(), confusion.max(axis=1).sum()
    return Matching(pairs, float(100 * matched / total), float(100 * served / total))


def load_entropy(load: np.ndarray) -> float:
    """How evenly experts are used: entropy of their load over log N; 1 is even, 0 is one expert for all.

    Args:
        load: [N] shares or counts, not negative.

    >>> load_entropy(np.array([5, 5, 0, 0]))
    0.5
    """
    share = np.asarray(load, dtype=np.float64) / np.sum(load)
    used = share[share > 0]
    return float(-(used * np.log(used)).sum() / np.log(len(share))) if len(share) > 1 else 1.0


def stencil_differences(filters: np.ndarray, stencils: np.ndarray, region_of_expert: dict[int, int]) -> dict[int, float]:
    """How far each learned filter is from the true stencil of its region.

    Args:
        filters: [N, k, k] learned.
        stencils: [Q, k, k] true.
        region_of_expert: see :class:`Matching`.

    Returns:
        {region: largest absolute difference}, in units of the stencil.
    """
    return {
        region: float(np.abs(filters[expert] - stencils[region]).max())
        for expert, region in sorted(region_of_expert.items(), key=lambda pair: pair[1])
    }


class RoutingAgreement:
    """Agreement of a routing with the true regions as a score, in %.

    Scores of region "all": ``routing_agreement`` (one to one), with more experts than regions also
    ``routing_agreement_many`` (many to one), and ``load_entropy``.

    Args:
        region: [H, W] true regions, from 0.
        num_experts: N.
    """

    def __init__(self, region: np.ndarray | Tensor, num_experts: int) -> None:
        self.region = torch.as_tensor(np.asarray(region)).long()
        self.num_experts, self.num_regions = num_experts, int(self.region.max()) + 1
        self.counts = torch.zeros(num_experts, self.num_regions, dtype=torch.float64)

    def add(self, indices: Tensor, valid: Tensor) -> None:
        """Add the routing of a batch: [1, H, W], or [B, 1, H, W] where each sample has its own; ``valid`` [B] bool."""
        if self.counts.device != indices.device:
            self.counts, self.region = self.counts.to(indices.device), self.region.to(indices.device)
        if indices.dim() == 3:  # one routing for all samples
            indices, weight = indices[None], valid.sum().double()[None]
        else:
            weight = valid.double()
        cells = (indices[:, 0] * self.num_regions + self.region).flatten(1)
        weights = weight[:, None].expand(cells.shape).flatten()
        counted = torch.bincount(cells.flatten(), weights=weights, minlength=self.counts.numel())
        self.counts += counted.view_as(self.counts)

    def state(self) -> dict[str, Tensor]:
        """The counts [N, Q] themselves."""
        return {"counts": self.counts}

    def matching(self) -> Matching:
        """The best matching over all that was added."""
        return best_matching(self.counts.cpu().numpy())

    def result(self) -> Scores:
        """{"all": {score: value}}."""
        matching = self.matching()
        scores = {"routing_agreement": matching.one_to_one}
        if self.num_experts > self.num_regions:
            scores["routing_agreement_many"] = matching.many_to_one
        if float(self.counts.sum()) > 0:
            scores["load_entropy"] = load_entropy(self.counts.sum(1).cpu().numpy())
        return {"all": scores}
