"""The k-th lowest number is that of a sorted row, whoever looks for it."""

import pytest
import torch

from streamprune.kernels.selection import kth_lowest


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (7,), (5, 33), (2, 3, 300)])
def test_it_is_that_of_a_sorted_row(shape, dtype):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).mul_(4).round_().to(dtype)  # ties too
    values.view(-1)[0] = torch.nan
    before, n = values.clone(), shape[-1]
    rows = values.sort(dim=-1).values  # NaN last
    for k in {1, (n + 1) // 2, n}:
        found = kth_lowest(values, k)
        assert found.dtype == dtype
        torch.testing.assert_close(found, rows[..., k - 1 : k], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(values, before, rtol=0, atol=0, equal_nan=True)


def test_of_a_transposed_matrix_too():
    values = torch.arange(12.0).view(3, 4).T
    assert kth_lowest(values, 2).tolist() == [[4.0], [5.0], [6.0], [7.0]]


def test_what_has_no_contents_has_a_shape():
    assert kth_lowest(torch.empty(3, 4, device="meta"), 2).shape == (3, 1)
