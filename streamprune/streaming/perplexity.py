"""Streamed perplexity: exp of the mean next-token loss over non-overlapping segments."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from streamprune.streaming.sweeper import Sweeper, default_micro_batch

# Hidden states that are in memory at a time; longer texts take several sweeps.
HIDDEN_BYTES = 2 << 30


@dataclass(frozen=True)
class Perplexity:
    """Result of a measurement: perplexity = exp(loss), over `tokens` predicted tokens of `segments`.

    `text` says in words what they are segments of, `dtype` what was computed in, where whoever measured knows.
    """

    perplexity: float
    loss: float
    segments: int
    tokens: int
    text: str = ""
    dtype: str = ""


def sweeps_needed(sweeper: Sweeper, segments: Tensor) -> int:
    """Count the forward sweeps that `perplexity` will take."""
    return -(-len(segments) // most_together(sweeper, segments.shape[1]))


def perplexity(sweeper: Sweeper, segments: Tensor, micro_batch: int | None = None) -> Perplexity:
    """Measure the perplexity of `segments` [n, seq], each predicted from its own tokens alone: infinite if it is NaN.

    Args:
        micro_batch: segments computed at once; by default as many as a run has by default.
    """
    group = most_together(sweeper, segments.shape[1])
    micro_batch = micro_batch or default_micro_batch(segments.shape[1])
    total = 0.0
    for start in range(0, len(segments), group):
        part = segments[start : start + group]
        hidden = sweeper.forward(part, micro_batch=micro_batch, then="again")
        loss, _ = sweeper.head_loss(hidden, part, with_grad=False)
        total += loss * len(part)
        del hidden  # before there are the next ones
    loss = total / len(segments)
    value = math.exp(loss) if loss < 700 else math.inf  # beyond 709 there is no float64
    return Perplexity(value, loss, len(segments), len(segments) * (segments.shape[1] - 1))


def most_together(sweeper: Sweeper, seq_len: int) -> int:
    """Return how many segments a sweep takes at the most."""
    per_sequence = seq_len * sweeper.skeleton.config.hidden_size * sweeper.skeleton.dtype.itemsize
    return max(1, HIDDEN_BYTES // per_sequence)
