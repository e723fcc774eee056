"""Forward sweeps over sequences of different lengths: each pass of the layers serves as many as fit in memory.

Sequences of about the same length are padded on the right to the longest of a batch. Causal attention never looks there
and positions count from the left, so that nothing has to be masked; what the padding itself gives is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from streamprune.streaming.perplexity import HIDDEN_BYTES
from streamprune.streaming.sweeper import DEFAULT_MICRO_BATCH_TOKENS, Sweeper

STEP = 8  # tokens that lengths are rounded up to, so that few lengths have masks and positions of their own
LONGER = 8  # a batch's longest sequence is longer than another by at most one part in so many, or by STEP


@dataclass(frozen=True)
class Batch:
    """Batch of sequences that a layer computes on at once.

    Attributes:
        rows: which of the sequences they are.
        length: tokens that each is padded to.
    """

    rows: tuple[int, ...]
    length: int

    @property
    def tokens(self) -> int:
        """Number of tokens that are computed, with the padding."""
        return len(self.rows) * self.length


def plan_passes(
    sweeper: Sweeper, lengths: Sequence[int], longest: int, micro_batch: int | None = None
) -> list[list[Batch]]:
    """Divide sequences into passes of the layers, and each pass into batches of about the same length.

    Args:
        lengths: tokens of each sequence. longest: tokens that the model can take.
        micro_batch: sequences of a batch at the most; by default as many as have `DEFAULT_MICRO_BATCH_TOKENS` tokens.
    """
    of_token = sweeper.skeleton.config.hidden_size * sweeper.skeleton.dtype.itemsize
    # Longest first: what does not fit fails at once.
    rows = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    divided: list[list[Batch]] = []
    tokens, start = 0, 0
    while start < len(rows):
        length = min(longest, -(-lengths[rows[start]] // STEP) * STEP)
        most = start + (micro_batch or max(1, DEFAULT_MICRO_BATCH_TOKENS // length))
        shortest = length - max(STEP, length // LONGER)
        stop = next((at for at in range(start + 1, len(rows)) if at == most or lengths[rows[at]] < shortest), len(rows))
        batch = Batch(tuple(rows[start:stop]), length)
        if not divided or (tokens + batch.tokens) * of_token > HIDDEN_BYTES:
            divided.append([])
            tokens = 0
        divided[-1].append(batch)
        tokens, start = tokens + batch.tokens, stop
    return divided


@torch.no_grad()
def last_states(
    sweeper: Sweeper, sequences: Sequence[Sequence[int]], batches: Sequence[Batch]
) -> Iterator[tuple[Batch, Tensor]]:
    """Make one pass of the layers; yield each batch with its hidden states after the last layer [n, length, d].

    Args:
        sequences: token ids; a batch's rows say which.
    """
    sweeper.forget_boundaries()
    sweeper.calls.clear()  # a pass has few lengths, a task hundreds, each with masks of its own
    ids = [_padded(sequences, batch) for batch in batches]
    hidden = [sweeper.skeleton.embed(each) for each in ids]
    calls = [sweeper.recorded(each) for each in ids]
    with sweeper.pages(range(sweeper.n_layers), "again") as pages:
        for page in pages:
            weights = sweeper.binder.bind(page)
            for states, called in zip(hidden, calls, strict=True):
                states[:] = sweeper.skeleton.run_layer(page.layer, weights, called[page.layer], states)
    hidden.reverse()
    for batch in batches:
        yield batch, hidden.pop()


@torch.no_grad()
def log_probabilities(sweeper: Sweeper, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the next token's log-probabilities [m, vocabulary] after hidden states [tokens, d], a block of them each.

    They are float32, or float64 where the model is computed in that.
    """
    step = sweeper.skeleton.head_tokens
    for start in range(0, len(hidden), step):
        part = slice(start, min(start + step, len(hidden)))
        # As sequences of one token: how many there are is then no matter of the model's positions.
        logits = sweeper.skeleton.head(hidden[part].unsqueeze(1)).squeeze(1)
        yield part, torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), dim=-1)


def _padded(sequences: Sequence[Sequence[int]], batch: Batch) -> Tensor:
    """Return the token ids of a batch, int64 [n, length]."""
    ids = torch.zeros(len(batch.rows), batch.length, dtype=torch.int64)
    for number, row in enumerate(batch.rows):
        ids[number, : len(sequences[row])] = torch.tensor(sequences[row])
    return ids
