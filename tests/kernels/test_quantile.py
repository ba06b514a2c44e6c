import pytest
import torch

from smoe_hpc.errors import ConfigError
from smoe_hpc.kernels import row_quantiles


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.3, 1 / 3, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("size", [1, 2, 3, 10, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_torch_quantile(quantile: float, size: int, dtype: torch.dtype):
    rows = torch.rand(5, size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(row_quantiles(rows, quantile), torch.quantile(rows, quantile, dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("quantile", [0.1, 0.45, 0.5, 0.9])
def test_equals_torch_quantile_among_equals(quantile: float):
    rows = torch.randint(0, 4, (50, 21), generator=torch.Generator().manual_seed(0)).float()
    assert row_quantiles(rows, quantile).tolist() == pytest.approx(torch.quantile(rows, quantile, dim=1).tolist())


def test_a_row_with_nan_has_no_quantile():
    rows = torch.tensor([[1.0, float("nan"), 2.0], [1.0, 2.0, 3.0]])
    assert row_quantiles(rows, 0.5).isnan().tolist() == [True, False]


def test_infinity_is_a_value():
    rows = torch.tensor([[1.0, 2.0, float("inf"), float("inf")]])
    assert row_quantiles(rows, 0.3).item() == pytest.approx(1.9)
    assert row_quantiles(rows, 0.9).item() == float("inf")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantile", [0.0, 0.3, 1.0])
def test_sixteen_bits_are_rounded_from_float32(dtype: torch.dtype, quantile: float):
    rows = torch.randn(5, 33, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = row_quantiles(rows, quantile)
    assert found.dtype == dtype
    assert torch.equal(found, torch.quantile(rows.float(), quantile, dim=1).to(dtype))


def test_no_rows_have_no_quantiles():
    assert row_quantiles(torch.zeros(0, 3), 0.5).shape == (0,)


@pytest.mark.parametrize("shape", [(3, 0), (0, 0), (4,)])
def test_a_row_without_entries_is_refused(shape: tuple[int, ...]):
    with pytest.raises(ConfigError, match="a row has at least one entry; give"):
        row_quantiles(torch.zeros(shape), 0.5)


@pytest.mark.parametrize("quantile", [-0.1, 1.01, float("nan")])
def test_a_quantile_is_a_share(quantile: float):
    with pytest.raises(ConfigError, match=f"^quantile={quantile}: .* from 0 to 1$"):
        row_quantiles(torch.zeros(2, 3), quantile)
