"""LoRA of a model that does not fit in memory: its layers are paged there and back once a step, adapters stay.

A step's sweep forwards keeps each layer's input, the one backwards runs the layer again with its adapters' graph: what
autograd then finds are the gradients of A and B. One pass of the layers there and back serves the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import StreampruneError
from streamprune.kernels import noise_seed
from streamprune.model.units import module_of
from streamprune.paging.hidden_states import States
from streamprune.recovery.lora import Adapter
from streamprune.streaming.gradients import gradient_scale
from streamprune.streaming.sweeper import Objective, Sweeper


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


def _no_collector(*anything: Any) -> Any:
    raise StreampruneError("the weights themselves are not trained")
