import copy
import pickle

import pytest
import torch

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import Routing, select_experts


def pixels(*columns: list[float]) -> torch.Tensor:
    """[N, 1, W]: each argument is the values of one pixel."""
    return torch.tensor(columns).T[:, None, :]


def test_rank_order_is_best_first_and_id_order_is_by_number():
    values = pixels([0.1, 3.0, 2.0, -1.0], [5.0, 0.0, -2.0, 6.0])
    assert select_experts(values, 2, "rank").indices[:, 0].T.tolist() == [[1, 2], [3, 0]]
    assert select_experts(values, 2, "id").indices[:, 0].T.tolist() == [[1, 2], [0, 3]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tie_goes_to_the_lower_number(dtype: torch.dtype):
    values = pixels([1.0, 2.0, 2.0, 2.0], [0.0, -0.0, 0.0, -1.0]).to(dtype)
    assert select_experts(values, 2).indices[:, 0].T.tolist() == [[1, 2], [0, 1]]
    assert select_experts(values, 1).indices[:, 0].T.tolist() == [[1], [0]]


@pytest.mark.parametrize("selected", [1, 2, 5, 7])
@pytest.mark.parametrize("shape", [(7, 4, 5), (3, 7, 4, 5)])
def test_equals_a_stable_sort(selected: int, shape: tuple[int, ...]):
    generator = torch.Generator().manual_seed(selected)
    values = torch.randint(-3, 4, shape, generator=generator).float()  # many ties
    expected = values.sort(dim=-3, descending=True, stable=True).indices[..., :selected, :, :]
    assert torch.equal(select_experts(values, selected).indices, expected)


def test_order_of_very_different_magnitudes():
    values = pixels([-1e30, -1e-30, 1e-38, 3e38, 0.0])
    assert select_experts(values, 5).indices.flatten().tolist() == [3, 2, 4, 1, 0]


@pytest.mark.parametrize("sign", [1.0, -1.0])  # 0 / 0 is negative on x86
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_experts", [3, 17])
@pytest.mark.parametrize("selected", [1, 2])
def test_a_value_that_is_not_a_number_comes_first(num_experts: int, selected: int, dtype: torch.dtype, sign: float):
    values = torch.arange(float(num_experts), dtype=dtype)[:, None, None].clone()
    values[1] = torch.copysign(torch.tensor(torch.nan, dtype=dtype), torch.tensor(sign, dtype=dtype))
    assert select_experts(values, selected).indices.flatten().tolist() == [1, num_experts - 1][:selected]


def test_among_several_that_are_not_numbers_the_lower_number_goes_first():
    values = pixels([torch.inf, -torch.nan, torch.nan, -torch.nan])
    assert values[1, 0, 0].signbit()
    for dtype in (torch.float32, torch.float64):
        assert select_experts(values.to(dtype), 4).indices.flatten().tolist() == [1, 2, 3, 0]


def test_a_copy_makes_plans_of_its_own():
    routing = select_experts(torch.rand(5, 4, 6, generator=torch.Generator().manual_seed(1)), 2)
    routing._plans["key"] = [torch.zeros(1)]
    for other in (copy.deepcopy(routing), pickle.loads(pickle.dumps(routing))):
        assert torch.equal(other.choice, routing.choice)
        assert other._plans == {}


def test_load_and_change():
    old = Routing(torch.tensor([[[0, 1, 2]], [[1, 2, 0]]]), 4)  # pixels use {0, 1}, {1, 2}, {2, 0}
    new = Routing(torch.tensor([[[1, 1, 3]], [[0, 2, 2]]]), 4)  # {1, 0}, {1, 2}, {3, 2}: one of six is new
    assert old.load().tolist() == pytest.approx([2 / 6, 2 / 6, 2 / 6, 0.0])
    assert new.changed_from(old).item() == pytest.approx(1 / 6)
    assert old.changed_from(old).item() == 0.0


def test_choices_of_either_type_tell_the_same():
    wide = Routing(torch.tensor([[[0, 1, 2]], [[1, 2, 0]]]), 4)
    narrow = Routing(torch.tensor([[[1, 1, 3]], [[0, 2, 2]]], dtype=torch.int32), 4)
    assert narrow.indices.dtype == torch.int64
    assert narrow.changed_from(wide) == wide.changed_from(narrow) == pytest.approx(1 / 6)
    assert torch.equal(narrow.load(), torch.tensor([1.0, 2.0, 2.0, 1.0]) / 6)


def test_change_of_single_selections():
    old, new = Routing(torch.tensor([[[0, 1, 2, 0]]]), 3), Routing(torch.tensor([[[0, 2, 2, 0]]]), 3)
    assert new.changed_from(old).item() == pytest.approx(0.25)


@pytest.mark.parametrize("selected", [0, 4])
def test_more_selected_than_there_are_is_refused(selected: int):
    with pytest.raises(ConfigError, match="from 1 to num_experts"):
        select_experts(torch.zeros(3, 2, 2), selected)


def test_an_unknown_order_is_refused():
    with pytest.raises(ConfigError, match="choose one of rank, id"):
        select_experts(torch.zeros(3, 2, 2), 1, "best")
