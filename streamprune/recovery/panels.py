"""Solution of symmetric systems in panels of columns, in the place of the matrix and of the right side.

torch's solvers hold the factor beside the matrix, and on a GPU a copy of it: of 28,672 inputs each is 3.3 GB. Here
nothing of that size stands beside the matrix. Nearly all of the work are products, as it is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL_COLUMNS = 1024  # columns that are factored together


def solve_in_place(right: Tensor, matrix: Tensor, panel: int = PANEL_COLUMNS) -> Tensor | None:
    """Return B A⁻¹ in the place of B, by a Cholesky factor; None where there is no factor.

    Args:
        right: B [rows, n].
        matrix: A [n, n], positive definite; its lower triangle counts. Overwritten.
        panel: columns that are factored together.
    """
    panels = [slice(start, min(start + panel, len(matrix))) for start in range(0, len(matrix), panel)]
    if not _factor(matrix, panels):
        return None
    # A = L Lᵀ: Y Lᵀ = B from the first panel on, and X L = Y from the last.
    for columns in panels:
        part = right[:, columns]
        part.copy_(torch.linalg.solve_triangular(matrix[columns, columns].mT, part, upper=True, left=False))
        right[:, columns.stop :].addmm_(part, matrix[columns.stop :, columns].mT, alpha=-1)
    for columns in reversed(panels):
        part = right[:, columns]
        part.copy_(torch.linalg.solve_triangular(matrix[columns, columns], part, upper=False, left=False))
        right[:, : columns.start].addmm_(part, matrix[columns, : columns.start], alpha=-1)
    return right


def _factor(matrix: Tensor, panels: list[slice]) -> bool:
    """Put the Cholesky factor L in the place of the lower triangle; tell whether there is one.

    What is above the diagonal stays, and is not read by whoever solves for L.
    """
    failed = []
    for number, columns in enumerate(panels):
        lower, info = torch.linalg.cholesky_ex(matrix[columns, columns])
        failed.append(info)
        matrix[columns, columns] = lower
        below = matrix[columns.stop :, columns]
        below.copy_(torch.linalg.solve_triangular(lower.mT, below, upper=True, left=False))
        for later in panels[number + 1 :]:
            rest = below[later.start - columns.stop :]
            matrix[later.start :, later].addmm_(rest, rest[: later.stop - later.start].mT, alpha=-1)
    return bool((torch.stack(failed) == 0).all())  # asked once, since a GPU would wait each time
