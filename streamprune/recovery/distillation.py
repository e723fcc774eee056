"""Logits of a teacher: the largest of every token that the loss counts, on a scratch disk, and how far a model is off.

The divergence is KL(p ‖ q) = Σ p (log p − log q) over the teacher's k likeliest tokens, and over what is left of both
as one more, the rest (distillation: 1503.02531).
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


def with_rest(logits: Tensor, tokens: Tensor) -> Tensor:
    """Compute the log-probabilities of `tokens` [n, k], and of all others together as one more: [n, k + 1].

    One minus the others' sum would lose the rest's digits: what is left of a sure model is below float32's rounding.
    """
    # The least number instead of -inf: where nothing is left, differences and gradients are no NaN.
    rest = logits.scatter(-1, tokens, torch.finfo(logits.dtype).min).logsumexp(-1, keepdim=True)
    return torch.cat([logits.gather(-1, tokens), rest], -1) - logits.logsumexp(-1, keepdim=True)


def divergence(logits: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """Sum KL(teacher ‖ model) over tokens.

    Args:
        logits: the model's [n, vocabulary].
        values: `with_rest` of the teacher's logits [n, k + 1]. tokens: its likeliest [n, k].
    """
    values = values.to(logits.dtype)
    return (values.exp() * (values - with_rest(logits, tokens.long()))).sum()


class TeacherLogits:
    """Largest log-probabilities of a teacher, and the rest's, of each counted token of examples: a file without a name.

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
        return sum(each.counted for each in examples) * _bytes_of_token(k)

    def room(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Make room for values [counted tokens, k + 1], float32, and tokens [counted tokens, k], int32, of examples."""
        count = sum(self._counts[number] for number in numbers)
        return torch.empty(count, self.k + 1), torch.empty(count, self.k, dtype=torch.int32)

    def put(self, numbers: Sequence[int], values: Tensor, tokens: Tensor) -> None:
        """Keep values and tokens of these examples, one after another."""
        start = 0
        for number in numbers:
            part = slice(start, start + self._counts[number])
            both = torch.cat([values[part].view(torch.int32), tokens[part]], 1)
            write_at(self._descriptor, both, self._starts[number] * _bytes_of_token(self.k), self._directory)
            start = part.stop

    def get(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return what was put of these examples, one after another."""
        found = []
        for number in numbers:
            both = torch.empty(self._counts[number], 2 * self.k + 1, dtype=torch.int32)
            read_at(self._descriptor, both, self._starts[number] * _bytes_of_token(self.k), self._directory)
            found.append(both)
        values, tokens = torch.cat(found).split([self.k + 1, self.k], dim=1)
        return values.view(torch.float32), tokens


def _bytes_of_token(k: int) -> int:
    return 4 * (2 * k + 1)
