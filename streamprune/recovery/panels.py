"""Solution of symmetric systems in panels of columns, in the place of the matrix and of the right side.

LAPACK's and cuSOLVER's solvers are given a copy of the matrix for the factor, and cuSOLVER's copies both again: of 28,672
inputs each is 3.3 GB. Here nothing is as large beside them; nearly all of the work are products, as it is there.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL = 2048  # columns that are factored together


def solve_in_place(right: Tensor, matrix: Tensor) -> Tensor | None:
    """Return right · matrix⁻¹ in the place of `right`, by a Cholesky factor; None where there is no factor.

    Args:
        right: B [rows, n].
        matrix: A [n, n], positive definite; its lower triangle counts. Overwritten.
    """
    panels = [slice(start, min(start + PANEL, len(matrix))) for start in range(0, len(matrix), PANEL)]
    if not _factor(matrix, panels):
        return None
    # A = L Lᵀ: Y Lᵀ = B from the first panel on, and X L = Y from the last.
    for panel in panels:
        part = right[:, panel]
        part.copy_(torch.linalg.solve_triangular(matrix[panel, panel].mT, part, upper=True, left=False))
        right[:, panel.stop :].addmm_(part, matrix[panel.stop :, panel].mT, alpha=-1)
    for panel in reversed(panels):
        part = right[:, panel]
        part.copy_(torch.linalg.solve_triangular(matrix[panel, panel], part, upper=False, left=False))
        right[:, : panel.start].addmm_(part, matrix[panel, : panel.start], alpha=-1)
    return right


def _factor(matrix: Tensor, panels: list[slice]) -> bool:
    """Put the Cholesky factor L in the place of the lower triangle; tell whether there is one.

    What is above the diagonal stays, and is not read by whoever solves for L.
    """
    failed = []
    for number, panel in enumerate(panels):
        lower, info = torch.linalg.cholesky_ex(matrix[panel, panel])
        failed.append(info)
        matrix[panel, panel] = lower
        below = matrix[panel.stop :, panel]
        below.copy_(torch.linalg.solve_triangular(lower.mT, below, upper=True, left=False))
        for later in panels[number + 1 :]:
            rest = below[later.start - panel.stop :]
            matrix[later.start :, later].addmm_(rest, rest[: later.stop - later.start].mT, alpha=-1)
    return not torch.stack(failed).any()  # asked once, since a GPU would wait each time
