"""Budgets of what may stay: the units that share them, and probabilities that meet them (arXiv 2406.10576)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from streamprune.methods.sinks import check_scores, zscores
from streamprune.storage.journal import Key

EXACT, MOST_STEPS = 1e-12, 70  # of a budget; more steps towards it than are ever taken where that can be met
FEW_UNITS = 16  # a layer and kind of no more has a direction for each: whether a KV group goes is a question by itself


@dataclass(frozen=True)
class Space:
    """Units, or layers, that stay or go, in a row.

    Attributes:
        parts: for each group of a layer and kind its key, and its place in the row.
        costs: parameters of each [n], float64.
        budgets: parameters that may stay of some groups together, by their keys.
        count: gives, by logits of each group from the lowest up, how many of each a run would take away, when that
            part of what is to go does.
    """

    parts: Mapping[Key, slice]
    costs: Tensor
    budgets: Mapping[tuple[Key, ...], float]
    count: Callable[[Mapping[Key, Tensor], float], Mapping[Key, int]]

    @cached_property
    def pools(self) -> list[tuple[Tensor, float]]:
        """Places of units that share a budget, int64, and the budget."""
        return [
            (torch.cat([torch.arange(self.parts[key].start, self.parts[key].stop) for key in keys]), most)
            for keys, most in self.budgets.items()
        ]

    @property
    def gone(self) -> float:
        """The fraction of all parameters that goes."""
        return 1 - sum(self.budgets.values()) / float(self.costs.sum())

    @property
    def can_move(self) -> bool:
        """Tell whether moves along directions change what goes: several share a budget, and not all of it goes."""
        directions = self.directions()
        return any(
            0 < most < float(self.costs[places].sum()) and len(directions[places].unique()) > 1
            for places, most in self.pools
        )

    def eased(self, part: float) -> Space:
        """Return the space of which only a part of what is to go does."""
        whole = [float(self.costs[places].sum()) for places, _ in self.pools]
        eased = [total - part * (total - most) for total, most in zip(whole, self.budgets.values(), strict=True)]
        return replace(self, budgets=dict(zip(self.budgets, eased, strict=True)))

    def project(self, values: Tensor) -> Tensor:
        """Project numbers [n] onto the probabilities that meet every budget."""
        return self._by_pool(values, project)

    def shifted(self, logits: Tensor) -> Tensor:
        """Return σ(logits + μ) [n], with a μ for each budget at which the expected parameters are that."""
        return self._by_pool(logits, shifted)

    def _by_pool(self, row: Tensor, work: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        made = torch.empty_like(row)
        for places, most in self.pools:
            made[places] = work(row[places], self.costs[places], most)
        return made

    def split(self, row: Tensor) -> dict[Key, Tensor]:
        """View a row [n] by group."""
        return {key: row[place] for key, place in self.parts.items()}

    def groups(self) -> Tensor:
        """Return the number of each unit's group, int64 [n]."""
        sizes = torch.tensor([place.stop - place.start for place in self.parts.values()])
        return torch.arange(len(sizes)).repeat_interleave(sizes)

    def directions(self) -> Tensor:
        """Return the number of the direction that moves each unit [n]: its group's, or in small groups its own."""
        found, count = list[Tensor](), 0
        for place in self.parts.values():
            size = place.stop - place.start
            found.append(torch.full((size,), count) if size > FEW_UNITS else torch.arange(count, count + size))
            count += 1 if size > FEW_UNITS else size
        return torch.cat(found)


class Masks:
    """Masks that a run would end with, by logits that the units of large groups have moved together.

    These keep their order, which is found once: to sort millions of them for each mask would take longer than to try
    it.

    Args:
        logits: before they are moved [n]. directions: those of the space.
    """

    def __init__(self, space: Space, logits: Tensor, directions: Tensor) -> None:
        self._space, self._logits, self._directions = space, logits, directions
        many = {key: at for key, at in space.parts.items() if at.stop - at.start > FEW_UNITS}
        self._orders = {key: at.start + logits[at].argsort(stable=True) for key, at in many.items()}
        self._ordered = {key: logits[order] for key, order in self._orders.items()}

    def kept(self, moved: Tensor, part: float) -> Tensor:
        """Return the mask [n] of what stays when the logits are moved along each direction so far."""
        orders, ordered = dict[Key, Tensor](), dict[Key, Tensor]()
        for key, at in self._space.parts.items():
            if key in self._orders:
                orders[key] = self._orders[key]
                ordered[key] = self._ordered[key] + moved[self._directions[at.start]]
            else:
                ordered[key], order = (self._logits[at] + moved[self._directions[at]]).sort(stable=True)
                orders[key] = at.start + order
        mask = torch.ones(len(self._logits), dtype=torch.bool)
        for key, gone in self._space.count(ordered, part).items():
            mask[orders[key][:gone]] = False
        return mask


def shifted(logits: Tensor, costs: Tensor, budget: float) -> Tensor:
    """Return σ(logits + μ) [n] with the μ at which the expected parameters are the budget.

    By Newton's method, and by halves where a step would leave the bracket.
    """
    total = float(costs.sum())
    if not 0 < budget < total:
        return torch.full_like(logits, float(budget > 0))
    middle = math.log(budget / (total - budget))  # all of them there meet the budget
    low, high = middle - float(logits.max()), middle - float(logits.min())
    shift = (low + high) / 2
    for _ in range(MOST_STEPS):
        s = torch.sigmoid(logits + shift)
        kept = costs * s
        excess = float(kept.sum()) - budget
        if abs(excess) <= EXACT * budget:
            break
        low, high = (low, shift) if excess > 0 else (shift, high)
        slope = float(kept.sum() - kept @ s)
        newton = shift - excess / slope if slope > 0 else low
        shift = newton if low < newton < high else (low + high) / 2
    return s


def start_from_scores(scores: Mapping[Key, Tensor], space: Space, *, by_order: bool = False) -> Tensor:
    """Return σ(z + μ) [n] of another method's scores, z-scores within each layer and kind: `sigmoid-norm` (§3.3).

    `by_order`: where many units move together, what z-scores of as many normally distributed scores would be. One
    score far above the others leaves these no distance from each other, and to move them would be all or nothing.

    Raises:
        StreampruneError: a score is not finite.
    """
    parts = []
    for values in scores.values():
        check_scores(values)
        if by_order and len(values) > FEW_UNITS:
            ranks = values.argsort(stable=True).argsort()
            parts.append(torch.special.ndtri((ranks.double() + 0.5) / len(values)))
            continue
        parts.append(zscores(values))
    return space.shifted(torch.cat(parts))


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
