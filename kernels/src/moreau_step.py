"""The proximal step of MoreauPruner on δ = w_t − w, with group soft-thresholding for MoreauPruner-GS.

    δ ← (1 − γ/ρ) δ − γ g                                          arXiv 2406.07017, Alg. 1, in δ form
    δ_S ← max(0, 1 − γη/‖δ_S‖₂) δ_S   for each line S              Eq. 12 (GST)

A line is a row (dim 0) or a column (dim 1): the slice of one matrix that goes when a unit is removed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moreau_step(delta: Tensor, grad: Tensor, rho: float, gamma: float) -> Tensor:
    """δ ← (1 − γ/ρ)δ − γg, in place; returns `delta`. Both [rows, columns], float32 or float64 δ."""
    return delta.mul_(1 - gamma / rho).add_(grad, alpha=-gamma)


def line_norms(delta: Tensor, dim: int) -> Tensor:
    """‖δ_S‖₂ of every line along `dim`: [rows] for 0, [columns] for 1. Without a temporary of δ's size."""
    return torch.linalg.vector_norm(delta, dim=1 - dim)


def soft_threshold(delta: Tensor, dim: int, threshold: float, norms: Tensor | None = None) -> int:
    """Group soft-thresholding of the lines of `delta` along `dim`, in place.

    Args:
        delta: [rows, columns].
        dim: 0 if a line is a row, 1 if it is a column.
        threshold: γη, in units of δ. A line whose norm does not exceed it becomes exactly zero.
        norms: `line_norms(delta, dim)` where the caller has it already.

    Returns:
        The number of lines that are zero afterwards.
    """
    norms = line_norms(delta, dim) if norms is None else norms
    kept = norms > threshold
    scale = torch.where(kept, 1 - threshold / norms, torch.zeros_like(norms))
    delta.mul_(scale.unsqueeze(1 - dim))
    return int((~kept).sum())
