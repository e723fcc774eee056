"""Systems that are solved in panels have the solution that float64 has, whatever the panel, and no room beside them."""

import pytest
import torch

from streamprune.recovery.panels import solve_in_place


def system(columns, rows, dtype, seed=0):
    """A right side [rows, columns] and a matrix as least squares have it; what is above its diagonal is NaN."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64) + 0.5
    matrix = x.T @ x
    matrix.diagonal().add_(0.01 * matrix.diagonal().mean())
    right = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    expected = torch.linalg.solve(matrix, right.T).T
    return right.to(dtype), matrix.to(dtype).masked_fill_(torch.ones_like(matrix).triu(1) > 0, torch.nan), expected


@pytest.mark.parametrize("dtype,rtol", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("columns,panel", [(1, 8), (7, 8), (8, 8), (9, 8), (40, 8), (61, 16), (61, 64), (61, 1)])
def test_a_system_is_solved_whatever_the_panel(columns, panel, dtype, rtol):
    right, matrix, expected = system(columns, 5, dtype)
    solution = solve_in_place(right, matrix, panel)
    assert solution is not None and solution.data_ptr() == right.data_ptr()
    error = (solution.double() - expected).norm() / expected.norm()
    assert error < rtol


@pytest.mark.parametrize("at", [0, 9, 23])
def test_a_matrix_without_a_factor_has_no_solution(at):
    """Wherever it shows: in the first panel, in the middle of one, in the last column."""
    right, matrix, _ = system(24, 3, torch.float64)
    matrix[at, at] = -1.0
    assert solve_in_place(right, matrix, 8) is None
