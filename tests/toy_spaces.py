"""Spaces of few units for a policy, numbers to fill them with, and the highest that a budget has room for."""

import torch

from streamprune.methods.budget import Space

F64 = torch.float64


def random(seed, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def made(parts, costs, *budgets):
    """A space of one budget for all kinds, or one for each; what stays is the highest of all that have room."""
    kinds = dict.fromkeys(kind for _, kind in parts)
    of_kind = [tuple(key for key in parts if key[1] == kind) for kind in kinds]
    together = [tuple(parts)] if len(budgets) == 1 else of_kind
    prices = costs.tolist()

    def lost(ordered, part):
        mask = highest([value for key in parts for value in ordered[key].tolist()], prices, *budgets)
        return {key: mask[at].count(False) for key, at in parts.items()}

    return Space(parts, costs, dict(zip(together, budgets, strict=True)), lost)


def highest(values, costs, budget):
    """The mask of the highest that the budget has room for; all in lists."""
    mask, left = [False] * len(values), budget
    for unit in sorted(range(len(values)), key=values.__getitem__, reverse=True):
        if costs[unit] <= left:
            mask[unit], left = True, left - costs[unit]
    return mask
