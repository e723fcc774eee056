"""Projection of keep probabilities onto a budget of parameters."""

from __future__ import annotations

import torch
from torch import Tensor


def project(values: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Project `values` [n] onto {s: 0 <= s <= 1, Σ costs·s <= budget}, the nearest point in the Euclidean norm.

    It is clip(values − v·costs, 0, 1) with the least v >= 0 that meets the budget (arXiv 2406.10576, Theorem 2, where
    costs are 1): Σ costs·s falls with v along straight lines that bend where a number comes down to 1 or to 0, so the
    bends are sorted, the piece is found on which the budget lies, and v is solved for there. O(n log n).

    Args:
        values, costs: float64; costs above 0.

    Raises:
        ValueError: a negative budget, costs that are not above 0, or numbers that are not finite.
    """
    if budget < 0 or not bool((costs > 0).all()) or not bool(torch.isfinite(values).all()):
        raise ValueError(f"budget {budget}, costs from {float(costs.min())}: wanted >= 0, > 0, and finite values")
    clipped = values.clamp(0, 1)
    excess = float(costs @ clipped) - budget
    if excess <= 0:
        return clipped
    # Beyond `leaves` a number falls by its cost, beyond `lands` no more.
    leaves, lands = ((values - 1) / costs).clamp(min=0), (values / costs).clamp(min=0)
    bends, order = torch.cat([leaves, lands]).sort()
    slopes = torch.cat([costs.square(), -costs.square()])[order].cumsum(0)
    fallen = torch.cat([torch.zeros(1, dtype=values.dtype), (slopes[:-1] * bends.diff()).cumsum(0)])
    piece = int(torch.searchsorted(fallen, excess))  # the budget is met before the bend of this number
    begin, end = float(bends[max(0, piece - 1)]), float(bends[min(piece, len(bends) - 1)])
    # Solved anew from the numbers on their way there: sums along the bends have lost digits.
    middle = (begin + end) / 2
    full, falling = leaves >= middle, (leaves < middle) & (lands > middle)
    slope = float(costs[falling].square().sum())
    v = (float(costs[full].sum() + costs[falling] @ values[falling]) - budget) / slope if slope > 0 else end
    return (values - min(max(v, begin), end) * costs).clamp(0, 1)
