"""Scores of whole layers."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from streamprune.methods.scores import LayerScores
from streamprune.statistics import Statistics

LARGEST_LOSS = 700.0  # its exponential is a number


def layer_ppl(statistics: Statistics, settings: dict[str, Any], sink: LayerScores) -> None:
    """Perplexity of the calibration batch without the layer (Shortened LLaMA, 2402.02834, §3.1)."""
    for layer, loss in statistics.losses_without().items():
        sink.values[layer] = math.exp(min(loss, LARGEST_LOSS))


def block_influence(statistics: Statistics, settings: dict[str, Any], sink: LayerScores) -> None:
    """1 − the mean over tokens of cos(x_in, x_out) (ShortGPT, 2403.03853, Eq. 1)."""

    def consume(layer: int, before: Tensor, after: Tensor) -> None:
        pairs = zip(before, after, strict=True)
        total = sum(float(F.cosine_similarity(x.double(), y.double(), dim=-1).sum()) for x, y in pairs)
        sink.values[layer] = 1 - total / before.shape[:-1].numel()

    statistics.hidden(consume)
