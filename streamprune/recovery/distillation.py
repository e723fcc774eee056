"""Logits of a teacher: the largest of every token that the loss counts, on a scratch disk, and how far a model is off.

The divergence is KL(p ‖ q) = Σ p (log p − log q) over the teacher's k likeliest tokens, and over what is left of both
as one more (distillation: 1503.02531).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from streamprune.storage.scratch import read_at, scratch_file, write_at
from streamprune.texts.instructions import Example

LEAST = 1e-9  # of the mass that is left: below it rounding decides


def divergence(logits: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """Sum KL(teacher ‖ model) over tokens.

    Args:
        logits: the model's [n, vocabulary]. values: the teacher's largest log-probabilities [n, k], of `tokens` [n, k].
    """
    values = values.to(logits.dtype)
    own = torch.log_softmax(logits, -1).gather(-1, tokens.long())
    shared = (values.exp() * (values - own)).sum()
    left, own_left = ((1 - each.exp().sum(-1)).clamp_min(LEAST) for each in (values, own))
    return shared + (left * (left.log() - own_left.log())).sum()


class TeacherLogits:
    """Largest log-probabilities of a teacher for each counted token of examples, in a file without a name.

    Args:
        directory: on the scratch disk. k: of each token. examples: in their order.
    """

    def __init__(self, directory: Path, k: int, examples: Sequence[Example]) -> None:
        self.k, self._directory = k, directory
        self._counts = [each.counted for each in examples]
        self._starts = [0, *accumulate(self._counts)]
        self._descriptor = scratch_file(directory)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)

    @staticmethod
    def bytes_of(k: int, examples: Sequence[Example]) -> int:
        """Count the bytes that the file will have."""
        return sum(each.counted for each in examples) * k * 8

    def room(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Make room for values, float32, and tokens, int32, of these examples: each [counted tokens, k]."""
        count = sum(self._counts[number] for number in numbers)
        return torch.empty(count, self.k), torch.empty(count, self.k, dtype=torch.int32)

    def put(self, numbers: Sequence[int], values: Tensor, tokens: Tensor) -> None:
        """Keep values and tokens of these examples, one after another."""
        start = 0
        for number in numbers:
            part = slice(start, start + self._counts[number])
            both = torch.stack([values[part].view(torch.int32), tokens[part]])
            write_at(self._descriptor, both, self._starts[number] * self.k * 8, self._directory)
            start = part.stop

    def get(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what was put of these examples, one after another."""
        found = []
        for number in numbers:
            both = torch.empty(2, self._counts[number], self.k, dtype=torch.int32)
            read_at(self._descriptor, both, self._starts[number] * self.k * 8, self._directory)
            found.append(both)
        values, tokens = torch.cat(found, dim=1)
        return values.view(torch.float32), tokens
