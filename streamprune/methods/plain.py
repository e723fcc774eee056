"""Scores that need no gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from streamprune.capture import TensorRef
from streamprune.kernels import noise_seed, unit_score
from streamprune.methods.scores import UnitScores
from streamprune.sweep import Statistics


def random(statistics: Statistics, settings: dict[str, Any]) -> UnitScores:
    """Uniform in [0, 1), from (seed, layer, kind)."""
    scores = UnitScores.zeros(statistics)
    for layer, kinds in scores.values.items():
        for kind, values in kinds.items():
            seed = noise_seed(statistics.seed, layer, kind)
            values.copy_(torch.rand(values.shape, generator=torch.Generator().manual_seed(seed)))
    return scores


def magnitude(statistics: Statistics, settings: dict[str, Any]) -> UnitScores:
    """The ℓ2 norm of all weights of the unit."""
    scores = UnitScores.zeros(statistics)

    def consume(ref: TensorRef, weight: Tensor) -> None:
        scores.add(ref, unit_score(weight, None, ref.member.dim, "square"))

    statistics.weights(consume)
    for kinds in scores.values.values():
        for values in kinds.values():
            values.sqrt_()
    return scores
