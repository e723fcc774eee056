"""Methods of a few lines: random scores, magnitude; and of layers, perplexity without one, and block influence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.kernels import noise_seed
from streamprune.methods.sinks import LayerScores, Sink, WeightPruner
from streamprune.model.units import TensorRef
from streamprune.streaming.statistics import Statistics

LARGEST_LOSS = 700.0  # its exponential is a number
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


def layer_ppl(statistics: Statistics, settings: dict[str, Any], sink: LayerScores) -> None:
    """Score a layer by the perplexity of the calibration batch without it (Shortened LLaMA, 2402.02834, §3.1)."""
    for layer, loss in statistics.losses_without().items():
        sink.values[layer] = math.exp(min(loss, LARGEST_LOSS))


def block_influence(statistics: Statistics, settings: dict[str, Any], sink: LayerScores) -> None:
    """Score a layer by 1 − the mean over tokens of cos(x_in, x_out) (ShortGPT, 2403.03853, Eq. 1)."""

    def consume(layer: int, parts: Iterator[tuple[Tensor, Tensor]]) -> None:
        # In float64: most layers change little, so 1 − cos is the small difference of two numbers near 1.
        cosines = [
            F.cosine_similarity(x.double(), y.double(), dim=-1)
            for before, after in parts
            for x, y in zip(before, after, strict=True)
        ]
        sink.values[layer] = 1 - sum(float(each.sum()) for each in cosines) / sum(map(len, cosines))

    statistics.hidden(consume)
