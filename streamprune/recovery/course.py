"""Course of a training: which sequences each step takes, how it rises and falls, and the loss of a batch.

Both ways of training follow it: in memory, and layer by layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.errors import StreampruneError
from streamprune.recovery.distillation import TeacherLogits, divergence, with_rest
from streamprune.recovery.lora import Adapter
from streamprune.storage.checkpoint import is_finite
from streamprune.streaming.perplexity import HIDDEN_BYTES
from streamprune.streaming.sweeper import Objective, Sweeper, default_micro_batch
from streamprune.texts.instructions import IGNORED, Example

MULTIPLE = 8  # of which padded lengths are: products of other lengths are slower
WARMUP_SHARE = 10  # of the steps at the most one of as many
MAX_NORM = 1.0  # gradients are clipped to it, as by transformers' Trainer where it is not told otherwise


@dataclass(frozen=True)
class TrainingStep:
    """Step of a training: its number, from 1 on, the mean loss of its batch before it, and its learning rate."""

    number: int
    loss: float
    learning_rate: float


Note = Callable[[TrainingStep], None]


def check_number(what: str, value: float, remedy: str) -> None:
    """Refuse NaN and infinity in a figure of a training, which is called `what`.

    Raises:
        StreampruneError: it is not finite.
    """
    if not math.isfinite(value):
        raise StreampruneError(f"{what} is {value}; {remedy}")


def check_step(step: TrainingStep) -> None:
    """Refuse a step of a training that diverges.

    Raises:
        StreampruneError: its loss is not finite.
    """
    check_number(f"step {step.number}: the loss", step.loss, "lower --learning-rate, or give another --dtype")


@dataclass(frozen=True)
class Trained:
    """Result of a training: the adapter, and all steps."""

    adapter: Adapter
    steps: Sequence[TrainingStep]

    def check(self) -> None:
        """Refuse an adapter that the last step has spoilt.

        Raises:
            StreampruneError: it holds NaN or infinite values.
        """
        if not all(map(is_finite, self.adapter.parameters)):
            raise StreampruneError("the adapter holds NaN or infinite values; lower --learning-rate")


@dataclass(frozen=True)
class Course:
    """Course of a training.

    Attributes:
        sequences: how many there are. batch: of them in a step. steps: in all.
        warmup: steps in which the learning rate rises to `learning_rate`, before it falls to 0.
    """

    sequences: int
    batch: int
    steps: int
    learning_rate: float
    warmup: int
    seed: int

    @classmethod
    def of(
        cls, sequences: int, batch: int, epochs: float, steps: int | None, learning_rate: float, warmup: int, seed: int
    ) -> Course:
        """Make a course of so many epochs, or of `steps`, whose warmup is at most a tenth of it."""
        steps = steps or max(1, math.ceil(epochs * sequences / batch))
        return cls(sequences, batch, steps, learning_rate, min(warmup, steps // WARMUP_SHARE), seed)

    def order(self) -> list[int]:
        """List the sequences of all steps in order: all of them, shuffled anew each time."""
        generator, order = torch.Generator().manual_seed(self.seed), list[int]()
        while len(order) < self.steps * self.batch:
            order += torch.randperm(self.sequences, generator=generator).tolist()
        return order[: self.steps * self.batch]


def padded(examples: Sequence[Example], positions: int) -> tuple[Tensor, Tensor]:
    """Put sequences together as ids and labels [n, seq], filled up behind their ends, to at most so many positions.

    Nothing there is counted, and what comes before does not look at it: no mask is needed.
    """
    longest = max(len(each.ids) for each in examples)
    shape = len(examples), max(longest, min(-(-longest // MULTIPLE) * MULTIPLE, positions))
    ids, labels = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORED)
    for row, each in enumerate(examples):
        ids[row, : len(each.ids)], labels[row, : len(each.ids)] = each.ids, each.labels
    return ids, labels


def objective_of(labels: Tensor, device: torch.device, teacher: tuple[Tensor, Tensor] | None = None) -> Objective:
    """Make the function that sums the loss of a batch over blocks of its logits.

    Args:
        labels: [n, seq]. device: of the logits.
        teacher: its values [counted tokens, k + 1] and tokens [counted tokens, k], as `divergence` takes them; that is
            then added.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED).to(device)  # the last token predicts none
    counts = following != IGNORED
    # Of each counted token its number among them.
    numbers = (counts.flatten().cumsum(0) - 1).view(counts.shape)
    known = None if teacher is None else tuple(each.to(device) for each in teacher)

    def objective(logits: Tensor, rows: slice, columns: slice) -> Tensor:
        loss = F.cross_entropy(
            logits.flatten(0, 1), following[rows, columns].flatten(), reduction="sum", ignore_index=IGNORED
        )
        if known is None:
            return loss
        counted = counts[rows, columns]
        chosen = logits[counted]
        at = numbers[rows, columns][counted]
        return loss + divergence(chosen, known[0][at], known[1][at])

    return objective


def grouped(sweeper: Sweeper, examples: Sequence[Example], among: Iterable[int] | None = None) -> Iterator[list[int]]:
    """Yield the examples, or those `among` them, by number in groups of like lengths that one forward sweep holds."""
    hidden_size, itemsize = sweeper.skeleton.config.hidden_size, sweeper.skeleton.dtype.itemsize
    tokens = max(1, HIDDEN_BYTES // (hidden_size * itemsize))
    chosen = range(len(examples)) if among is None else set(among)
    numbers = sorted(chosen, key=lambda number: (len(examples[number].ids), number))
    group: list[int] = []
    for number in numbers:
        if group and (len(group) + 1) * (len(examples[number].ids) + MULTIPLE) > tokens:
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def mean_loss(sweeper: Sweeper, examples: Sequence[Example]) -> float:
    """Measure the mean loss (nats) of the counted tokens by forward sweeps."""
    total, count = 0.0, sum(each.counted for each in examples)
    for group in grouped(sweeper, examples):
        ids, labels = padded([examples[number] for number in group], sweeper.skeleton.positions)
        hidden = sweeper.forward(ids, micro_batch=default_micro_batch(ids.shape[1]), then="again")
        loss, _ = sweeper.through_head(hidden, objective_of(labels, sweeper.skeleton.device), 1, with_grad=False)
        total += loss
    return total / count


def keep_logits(
    teacher: Sweeper, examples: Sequence[Example], kept: TeacherLogits, among: Iterable[int] | None = None
) -> None:
    """Keep a teacher's largest logits of every counted token, by forward sweeps over the same tokens.

    `among`: numbers of the examples that will be asked for, by default all.
    """
    device = teacher.skeleton.device
    for group in grouped(teacher, examples, among):
        ids, labels = padded([examples[number] for number in group], teacher.skeleton.positions)
        counts = labels[:, 1:].to(device) != IGNORED
        values, tokens = kept.room(group)
        numbers = (counts.flatten().cumsum(0) - 1).view(counts.shape)

        def keep(
            logits: Tensor,
            rows: slice,
            columns: slice,
            counts: Tensor = counts,
            numbers: Tensor = numbers,
            values: Tensor = values,
            tokens: Tensor = tokens,
        ) -> Tensor:
            counted = counts[rows, columns]
            chosen = logits[counted].float()  # as it is kept
            largest = chosen.topk(kept.k).indices
            at = numbers[rows, columns][counted].cpu()
            values[at] = with_rest(chosen, largest).cpu()
            tokens[at] = largest.to(torch.int32).cpu()
            return torch.zeros((), device=device)

        hidden = teacher.forward(ids, micro_batch=default_micro_batch(ids.shape[1]), then="again")
        teacher.through_head(hidden, keep, 1, with_grad=False)
        kept.put(group, values, tokens)
