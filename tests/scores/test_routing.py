"""Matching of experts to regions."""

import itertools

import numpy as np
import pytest
import torch

from smoe_hpc.errors import SmoeError
from smoe_hpc.scores import RoutingAgreement, best_matching, confusion_matrix, load_entropy, stencil_differences

REGION = np.array([[0, 0, 1], [2, 1, 1], [2, 2, 0]])


def test_renamed_experts_agree_wholly():
    experts = np.array([2, 0, 1])[REGION]  # region 0 -> expert 2, 1 -> 0, 2 -> 1
    matching = best_matching(confusion_matrix(experts, REGION, 3))
    assert matching.one_to_one == matching.many_to_one == 100.0
    assert matching.region_of_expert == {2: 0, 0: 1, 1: 2}


@pytest.mark.parametrize("seed", range(20))
def test_the_matching_is_the_best_of_all(seed: int):
    rng = np.random.default_rng(seed)
    num_experts, num_regions = rng.integers(1, 5, 2)
    confusion = rng.integers(0, 30, (num_experts, num_regions)).astype(float) + 1
    size = max(num_experts, num_regions)
    square = np.zeros((size, size))
    square[:num_experts, :num_regions] = confusion
    best = max(sum(square[e, r] for e, r in enumerate(order)) for order in itertools.permutations(range(size)))
    assert best_matching(confusion).one_to_one == pytest.approx(100 * best / confusion.sum())


def test_a_region_divided_among_experts():
    # region 0 | 0 | 1 | 1 ; expert 0 | 1 | 2 | 2
    matching = best_matching(confusion_matrix(np.array([[0, 1, 2, 2]]), np.array([[0, 0, 1, 1]]), 3))
    assert matching.one_to_one == 75.0
    assert matching.many_to_one == 100.0
    assert len(matching.region_of_expert) == 2


def test_fewer_experts_than_regions():
    matching = best_matching(confusion_matrix(np.zeros((3, 3), int), REGION, 2))
    assert matching.one_to_one == pytest.approx(100 / 3)
    assert len(matching.region_of_expert) == 2


def test_confusion_adds_over_samples():
    experts = np.stack([REGION, np.zeros_like(REGION)])
    confusion = confusion_matrix(experts, REGION, 3)
    assert confusion.sum() == 18
    assert confusion[0].tolist() == [6, 3, 3]
    with pytest.raises(SmoeError, match="different grids"):
        confusion_matrix(np.zeros((2, 2)), REGION, 3)


def test_entropy_of_the_load():
    assert load_entropy(np.array([1, 1, 1])) == pytest.approx(1)
    assert load_entropy(np.array([7, 0, 0])) == 0
    assert load_entropy(np.array([3])) == 1


def test_filters_beside_stencils():
    stencils = np.zeros((2, 3, 3))
    stencils[1, 1, 1] = 1
    filters = stencils[::-1].copy()
    filters[0, 2, 2] += 0.25
    assert stencil_differences(filters, stencils, {0: 1, 1: 0}) == {0: 0.0, 1: 0.25}


def test_agreement_accumulates_over_batches_and_ranks():
    right, wrong = torch.from_numpy(REGION)[None], torch.zeros(1, 3, 3, dtype=torch.long)
    one, other = RoutingAgreement(REGION, 3), RoutingAgreement(REGION, 3)
    one.add(right, torch.tensor([True, True, False]))  # one routing for all samples: counts twice
    other.add(torch.stack([right, wrong, wrong]), torch.tensor([True, True, False]))  # one each
    assert one.result()["all"]["routing_agreement"] == 100
    assert one.result()["all"]["load_entropy"] == pytest.approx(1)
    assert "routing_agreement_many" not in one.result()["all"]
    one.state()["counts"].add_(other.state()["counts"])
    assert one.counts.sum() == 4 * 9
    assert one.result()["all"]["routing_agreement"] == pytest.approx(100 * (27 + 3) / 36)
    assert np.isnan(RoutingAgreement(REGION, 3).result()["all"]["routing_agreement"])
    spare = RoutingAgreement(REGION, 4)
    spare.add(right, torch.tensor([True]))
    assert spare.result()["all"]["routing_agreement_many"] == 100
