"""Methods that need no calibration text: random scores, and magnitude."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from streamprune.kernels import noise_seed
from streamprune.methods.sinks import Sink, WeightPruner
from streamprune.model.units import TensorRef
from streamprune.streaming.statistics import Statistics

SMALLEST = 2.0**-25  # between 0 and the next number that torch.rand draws


def random(statistics: Statistics, settings: dict[str, Any], sink: Sink) -> None:
    """Score uniformly in [0, 1), from (seed, layer, kind or tensor)."""

    def uniform(layer: int, what: str, shape: torch.Size) -> Tensor:
        generator = torch.Generator().manual_seed(noise_seed(statistics.seed, layer, what))
        return torch.rand(shape, generator=generator)

    def prune(pruner: WeightPruner, ref: TensorRef, weight: Tensor) -> None:
        # A score of 0 marks what goes: a 0 that was drawn stays the lowest, but is none.
        scores = uniform(ref.layer, ref.tensor, weight.shape).clamp_(min=SMALLEST).to(weight.device)
        pruner.sparsity.prune(ref.matrix(scores), backend=statistics.backend)
        gone = scores == 0
        del scores  # before there is the pruned one
        pruner.put(ref, weight, weight.masked_fill(gone, 0))

    if isinstance(sink, WeightPruner):
        statistics.weights(partial(prune, sink))
    else:
        sink.draw(uniform)


def magnitude(statistics: Statistics, settings: dict[str, Any], sink: Sink) -> None:
    """Score by |w|; a unit or a layer by the ℓ2 norm of all its weights."""
    # Squares add up over the matrices of a unit; the root is taken of their sum.
    statistics.weights(lambda ref, weight: sink.add(ref, weight, form="square"))
    sink.root()
