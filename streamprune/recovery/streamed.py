"""LoRA of a model that does not fit in memory: its layers are paged there and back once a step, adapters stay.

A step's sweep forwards keeps each layer's input, the one backwards runs the layer again with its adapters' graph: what
autograd then finds are the gradients of A and B. One pass of the layers there and back serves the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from streamprune.errors import StreampruneError
from streamprune.kernels import noise_seed
from streamprune.model.units import module_of
from streamprune.paging.hidden_states import States
from streamprune.recovery.course import MAX_NORM, Course, Note, Trained, TrainingStep, check_step, objective_of, padded
from streamprune.recovery.distillation import TeacherLogits
from streamprune.recovery.lora import Adapter
from streamprune.storage.journal import Journal
from streamprune.streaming.gradients import gradient_scale
from streamprune.streaming.sweeper import Objective, Sweeper
from streamprune.texts.instructions import Example

ADAM_MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW, by torch's names
LORA_WEIGHTS = "weights"  # A and B, where they are saved


class AttachedAdapter:
    """Adapter that a sweeper's layers run with, while `attached`.

    The A and B of one layer are on the device at a time; gradients are summed there over micro-batches, and added to
    those on the host behind the layer.
    """

    def __init__(self, sweeper: Sweeper, adapter: Adapter, *, dropout: float = 0.0, seed: int = 0) -> None:
        self.sweeper, self.adapter, self.dropout, self.seed = sweeper, adapter, dropout, seed
        self._step: int | None = None  # of the training; None where nothing is dropped
        self._layer: int | None = None
        self._leaves: dict[str, tuple[Tensor, Tensor]] = {}
        self._drawn: dict[str, int] = {}

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the layers run with the adapter in the block."""
        handles = []
        for layer, name in self.adapter.pairs:
            module = self.sweeper.skeleton.layers[layer].get_submodule(module_of(name))
            handles.append(module.register_forward_hook(self._branch(layer, name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._turn(None)

    def gradients(self, step: int, input_ids: Tensor, objective: Objective, count: int) -> float:
        """Add the gradients of a batch's mean loss to the adapter's; return that loss.

        Args:
            step: number of the step, by which dropout is drawn.
            input_ids: [n, seq], all of them at once.
            objective: sums the loss of a block of logits, as `Sweeper.through_head` asks for it.
            count: of the tokens that it counts.
        """
        sweeper = self.sweeper
        self._turn(step)
        hidden = sweeper.forward_keeping(input_ids, 0)
        loss, grad = sweeper.through_head(hidden, objective, count, with_grad=True)
        assert grad is not None
        self._turn(step)
        sweeper.backward(input_ids, grad, (), _no_collector, done=self._gather)
        self._turn(None)
        return loss

    def _turn(self, step: int | None) -> None:
        """Begin a sweep: what it drops is drawn as in the one before."""
        self._step, self._layer, self._leaves = step, None, {}

    def _branch(self, layer: int, name: str) -> Callable[[Any, tuple[Tensor, ...], Tensor], Tensor]:
        scale = self.adapter.scale((layer, name))

        def add(module: Any, given: tuple[Tensor, ...], made: Tensor) -> Tensor:
            a, b = self._brought(layer)[name]
            x = self._dropped(given[0].to(a.dtype), layer, name)
            # In PEFT's order, and rounded where it rounds.
            return (made + (x @ a.T) @ b.T * scale).to(made.dtype)

        return add

    def _brought(self, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the layer's A and B on the device: leaves of its graph."""
        if self._layer != layer:
            device = self.sweeper.skeleton.device
            self._layer, self._drawn = layer, {}
            self._leaves = {
                name: tuple(each.detach().to(device).requires_grad_() for each in pair)  # type: ignore[misc]
                for (owner, name), pair in self.adapter.pairs.items()
                if owner == layer
            }
        return self._leaves

    def _dropped(self, x: Tensor, layer: int, name: str) -> Tensor:
        if not self.dropout or self._step is None:
            return x
        number = self._drawn[name] = self._drawn.get(name, -1) + 1  # micro-batches come in the same order both ways
        generator = torch.Generator(x.device).manual_seed(noise_seed(self.seed, self._step, number, layer, name))
        keeps = 1 - self.dropout
        return x * torch.empty_like(x).bernoulli_(keeps, generator=generator).div_(keeps)

    def _gather(self, layer: int, grad: States) -> None:
        """Add a layer's gradients to those on the host."""
        factor = 1 / gradient_scale(self.sweeper.skeleton.dtype)
        for name, leaves in self._leaves.items():
            for leaf, parameter in zip(leaves, self.adapter.pairs[layer, name], strict=True):
                if leaf.grad is None:
                    continue
                found = leaf.grad.mul_(factor).to(parameter.device)
                parameter.grad = found if parameter.grad is None else parameter.grad.add_(found)


def train_streamed(
    sweeper: Sweeper,
    adapter: Adapter,
    examples: Sequence[Example],
    course: Course,
    *,
    dropout: float,
    teacher: TeacherLogits | None = None,
    saved: SavedTraining | None = None,
    note: Note = lambda step: None,
) -> Trained:
    """Train an adapter with the layers of a model paged there and back once a step.

    Args:
        adapter: to begin with; changed in place.
        examples: `course` says when each is taken. note: is told each step.
        saved: keeps the state of the training behind each step, and has that of an earlier run.
    """
    parameters = [each.requires_grad_() for each in adapter.parameters]
    optimizer = torch.optim.AdamW(parameters, lr=course.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, course.warmup, course.steps)
    training = Training(adapter, optimizer, schedule)
    steps = [] if saved is None else saved.bring_back(training)
    attached, order = AttachedAdapter(sweeper, adapter, dropout=dropout, seed=course.seed), course.order()
    with attached.attached():
        for step in range(len(steps), course.steps):
            numbers = order[step * course.batch : (step + 1) * course.batch]
            ids, labels = padded([examples[number] for number in numbers], sweeper.skeleton.positions)
            known = None if teacher is None else teacher.get(numbers)
            objective = objective_of(labels, sweeper.skeleton.device, known)
            loss = attached.gradients(step, ids, objective, sum(examples[number].counted for number in numbers))
            steps.append(TrainingStep(step + 1, loss, optimizer.param_groups[0]["lr"]))
            check_step(steps[-1])
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            note(steps[-1])
            if saved is not None:
                saved.keep(training, steps)
    for each in parameters:
        each.requires_grad_(False)
    return Trained(adapter, steps)


@dataclass(frozen=True)
class Training:
    """State of a training: the adapter, its optimiser and the learning rate's schedule."""

    adapter: Adapter
    optimizer: torch.optim.AdamW
    schedule: torch.optim.lr_scheduler.LambdaLR

    def numbers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield A and B of all matrices, and Adam's two moments of them, by name: each in one tensor, made in turn."""
        parameters = self.adapter.parameters
        yield LORA_WEIGHTS, torch.cat([each.detach().flatten() for each in parameters])
        for name in ADAM_MOMENTS:
            yield name, torch.cat([self.optimizer.state[each][name].flatten() for each in parameters])

    @torch.no_grad()
    def set(self, numbers: Mapping[str, Tensor], step: int) -> None:
        """Take what `numbers` gave back, as of so many steps."""
        parameters = self.adapter.parameters
        parts = {name: each.split([each.numel() for each in parameters]) for name, each in numbers.items()}
        for number, each in enumerate(parameters):
            each.copy_(parts[LORA_WEIGHTS][number].view_as(each))
            moments = {name: parts[name][number].view_as(each).clone() for name in ADAM_MOMENTS}
            self.optimizer.state[each] = moments | {"step": torch.tensor(float(step))}
        for _ in range(step):
            self.schedule.step()


class SavedTraining:
    """State of a training in a journal, behind each step."""

    def __init__(self, journal: Journal) -> None:
        self.journal, self._store = journal, journal.store("training")

    def keep(self, training: Training, steps: Sequence[TrainingStep]) -> None:
        """Save the state after these steps."""
        for name, each in training.numbers():
            self._store[0, name] = each
        self.journal.facts["steps"] = [astuple(step) for step in steps]
        self.journal.save()

    def bring_back(self, training: Training) -> list[TrainingStep]:
        """Take an earlier run's state back, if there is one; return the steps it had made."""
        steps = [TrainingStep(*each) for each in self.journal.facts.get("steps", ())]
        if steps:
            training.set({name: each for (_, name), each in self._store.items()}, len(steps))
        return steps


def _no_collector(*anything: Any) -> Any:
    raise StreampruneError("the weights themselves are not trained")
