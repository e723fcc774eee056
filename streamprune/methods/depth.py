"""Methods that score whole layers: perplexity without a layer, and block influence."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from streamprune.methods.sinks import LayerScores
from streamprune.streaming.statistics import Statistics

LARGEST_LOSS = 700.0  # its exponential is a number


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
