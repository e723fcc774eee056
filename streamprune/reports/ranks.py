"""Correlation of ranks."""

from __future__ import annotations

import torch
from torch import Tensor


def spearman(one: Tensor, other: Tensor) -> float | None:
    """Correlate the ranks of two scores [n] of the same units; equal scores share the mean of their ranks.

    It is Pearson's correlation of the ranks (Spearman 1904).

    Returns:
        -1 to 1; None where all scores of either are equal.
    """
    centred = [ranks - ranks.mean() for ranks in (_ranks(one), _ranks(other))]
    norms = [float(ranks.norm()) for ranks in centred]
    if 0.0 in norms:
        return None
    return max(-1.0, min(1.0, float(centred[0] @ centred[1]) / (norms[0] * norms[1])))


def _ranks(scores: Tensor) -> Tensor:
    """Rank scores [n] from 0, float64."""
    _, group, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    return (first + (counts - 1) / 2).double()[group]
