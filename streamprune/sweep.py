"""Forward and backward sweeps: every sequence goes through one layer before the next layer is touched.

A forward sweep keeps each prunable layer's input (a boundary), or lets a visitor see and change the layers on the way;
the backward sweep recomputes a layer from its boundary with gradients, so that one layer's activations and gradients
exist at a time. Methods receive the gradients tensor by tensor, as autograd finishes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.activations import Boundaries, Place
from streamprune.binding import Binder, Perturbation
from streamprune.capture import MakeCollector, PowerCollector, TensorRef, gradient_scale, watched
from streamprune.devices import paging_device
from streamprune.inputs import Inputs
from streamprune.paging import Page, Pager, Turn
from streamprune.skeleton import LayerCall, Skeleton

HEAD_BYTES = 64 << 20  # float32 logits made at a time; a vocabulary of 128k words never exists for all tokens
DEFAULT_MICRO_BATCH_TOKENS = 2048


def default_micro_batch(seq_len: int) -> int:
    """Sequences computed at once where the user does not say."""
    return max(1, DEFAULT_MICRO_BATCH_TOKENS // seq_len)


@dataclass
class Visit:
    """A layer in a forward sweep, before its output is made: its Linears can be watched, its weights changed.

    Attributes:
        page: the layer as it is stored.
        weights: in the compute dtype, by their names inside the layer; of a sweep that may change them, copies: what is
            changed here takes effect.
        hidden: the layer's input [n, seq, d].
    """

    sweeper: Sweeper
    page: Page
    weights: dict[str, Tensor]
    hidden: Tensor
    call: LayerCall
    micro_batch: int

    @property
    def layer(self) -> int:
        """Index of the layer."""
        return self.page.layer

    def parts(self) -> Iterator[slice]:
        """The sequences in micro-batches."""
        return self.sweeper.micro_batches(len(self.hidden), self.micro_batch)

    def run(self, hidden: Tensor | None = None, *, inputs: Inputs[Any] | None = None) -> Tensor:
        """The layer's output [n, seq, d] with the weights as they are now.

        Args:
            hidden: instead of the layer's own input.
            inputs: takes in what the Linears are given.
        """
        hidden = self.hidden if hidden is None else hidden
        output, skeleton = torch.empty_like(hidden), self.sweeper.skeleton
        for part in self.parts():
            with inputs.watching(skeleton.layers[self.layer]) if inputs is not None else nullcontext():
                output[part] = skeleton.run_layer(self.layer, self.weights, self.call, hidden[part])
        return output


Visitor = Callable[[Visit], Tensor]  # returns the hidden states that go on


class Sweeper:
    """Runs sweeps of one model.

    Args:
        skeleton: embeddings, head and layer functions.
        pager: brings the layers' weights.
        micro_batch: sequences per layer call; part of the arithmetic, since sums depend on it.
        scope: what is scored and moved: the matrices that "units" are cut from, or all "matrices" of a layer.

    Attributes:
        place, scratch: where boundaries stay, to be set before the sweeps.
    """

    def __init__(
        self, skeleton: Skeleton, pager: Pager, micro_batch: int, scope: Literal["units", "matrices"] = "units"
    ) -> None:
        self.skeleton, self.pager, self.micro_batch = skeleton, pager, micro_batch
        self.scope = scope
        self.binder = Binder(skeleton)
        self._calls: dict[int, list[LayerCall]] = {}
        self.place: Place = "device"
        self.scratch: Path | None = None
        self._kept: Boundaries | None = None
        self._kept_from = 0

    @cached_property
    def scored(self) -> list[dict[str, TensorRef]]:
        """The scored matrices of each layer, by their names inside it."""
        return [_refs(self.skeleton, layer, self.scope) for layer in range(self.n_layers)]

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.skeleton.layers)

    @property
    def resident_bytes(self) -> int:
        """Bytes that stay allocated: slots, chunks, the bound layer, embeddings and head."""
        return self.pager.resident_bytes + self.binder.resident_bytes + self.skeleton.resident_bytes

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        *,
        start: tuple[int, Tensor] | None = None,
        keep_from: int | None = None,
        again: bool = False,
        perturbation: Perturbation | None = None,
        perturbed: Sequence[int] = (),
        visit: Visitor | None = None,
        change: bool = True,
        stop: int | None = None,
        micro_batch: int | None = None,
        then: Turn = "back",
    ) -> Tensor:
        """Hidden states after the last layer (or before layer `stop`) [n, seq, d].

        Args:
            input_ids: [n, seq].
            start: (layer, its input) where an earlier sweep had the same weights below that layer.
            keep_from: keep the inputs of this layer and of those above for `backward`.
            again: begin at `keep_from` with the input that the last sweep kept.
            perturbation: applied in the layers `perturbed`.
            visit: makes each layer's output instead, with no boundaries kept. change: it may change weights.
            stop: the first layer that is not run.
            micro_batch: sequences per layer call, where not the sweeper's.
            then: the next sweep comes "back", or goes the same way "again".
        """
        if visit is not None:
            self._keep_nothing()
        first, hidden = start if start is not None else (0, None)
        if again:
            assert keep_from == self._kept_from and self._kept is not None, "the sweep before kept the same"
            first, hidden = keep_from, self._kept.take(0)
        if hidden is None:
            hidden = self._embed(input_ids, micro_batch)
        calls = self._recorded(input_ids)
        with self.pager.pages(range(first, self.n_layers if stop is None else stop), then) as pages:
            for page in pages:
                moved = perturbation if page.layer in perturbed else None
                scored = self.scored[page.layer] if moved is not None else ()
                weights = self.binder.bind(page, moved, scored, own=visit is not None and change)
                if visit is not None:
                    size = micro_batch or self.micro_batch
                    hidden = visit(Visit(self, page, weights, hidden, calls[page.layer], size))
                    continue
                kept = self._keep(keep_from, page.layer, hidden, again=again) if keep_from is not None else None
                if kept is not None:
                    hidden, output = kept
                else:
                    # The caller of `start` keeps its hidden states; otherwise the layer works in place.
                    output = torch.empty_like(hidden) if page.layer == first else hidden
                for part in self.micro_batches(len(hidden), micro_batch):
                    output[part] = self.skeleton.run_layer(page.layer, weights, calls[page.layer], hidden[part])
                hidden = output
        return hidden

    def backward(
        self,
        input_ids: Tensor,
        grad: Tensor,
        prunable: Sequence[int],
        collector: MakeCollector,
        *,
        perturbation: Perturbation | None = None,
        below: int | None = None,
        done: Callable[[int, Tensor], None] = lambda layer, grad: None,
    ) -> None:
        """From dL/dh after the last layer down to the lowest boundary that `forward` kept, feeding collectors.

        Args:
            input_ids: [n, seq], as in the forward sweep.
            grad: dL/dh [n, seq, d] after the last layer; overwritten.
            prunable: layers whose weight gradients are wanted.
            collector: makes the collector of a scored tensor of those layers, given the number of micro-batches.
            perturbation: as in the forward sweep.
            below: begin below this layer; `grad` is then dL/dh before it.
            done: is given each layer when it is through, and dL/dh before it.
        """
        kept, first = self._kept, self._kept_from
        assert kept is not None, "a forward sweep kept boundaries"
        call = self._recorded(input_ids)
        parts = list(self.micro_batches(len(grad)))
        top = self.n_layers if below is None else below
        with self.pager.pages(range(top - 1, first - 1, -1)) as pages:
            for page in pages:
                layer, hidden = page.layer, kept.take(page.layer - first)
                scored = self.scored[layer] if layer in prunable else {}
                weights = self.binder.bind(page, perturbation if scored else None, scored)
                collectors = [collector(ref, page.tensors[name], len(parts)) for name, ref in scored.items()]
                # Nothing is wanted below `first`; but captured ends need a graph, which then begins at the boundary.
                graph = layer > first or any(isinstance(each, PowerCollector) for each in collectors)
                with watched(self.skeleton.layers[layer], weights, collectors) as bound:
                    for part in parts:
                        boundary = hidden[part].detach().requires_grad_(graph)
                        with torch.enable_grad():
                            output = self.skeleton.run_layer(layer, bound, call[layer], boundary)
                        output.backward(grad[part])
                        if layer > first and boundary.grad is not None:
                            grad[part] = boundary.grad
                done(layer, grad)

    def head_loss(self, hidden: Tensor, input_ids: Tensor, *, with_grad: bool) -> tuple[float, Tensor | None]:
        """Mean next-token loss (nats) and, if asked, its gradient with respect to `hidden` [n, seq, d].

        The gradient is `gradient_scale(dtype)` times as large; what `backward` hands over is not.
        """
        n, seq, _ = hidden.shape
        targets = input_ids.to(hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        grad = torch.zeros_like(hidden) if with_grad else None
        count = n * (seq - 1)
        tokens = max(1, HEAD_BYTES // (4 * self.skeleton.config.vocab_size))
        for rows, columns in _token_blocks(n, seq - 1, tokens):
            block = hidden[rows, columns].detach().requires_grad_(with_grad)
            with torch.set_grad_enabled(with_grad):
                logits = self.skeleton.head(block)
                logits = logits if logits.dtype == torch.float64 else logits.float()
                following = targets[rows, columns.start + 1 : columns.stop + 1]
                loss = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")
            total += loss.detach().double()
            if grad is not None:
                (grad[rows, columns],) = torch.autograd.grad(loss * (gradient_scale(block.dtype) / count), block)
        return float(total) / count, grad

    def _embed(self, input_ids: Tensor, micro_batch: int | None) -> Tensor:
        parts = self.micro_batches(len(input_ids), micro_batch)
        return torch.cat([self.skeleton.embed(input_ids[part]) for part in parts])

    def _keep(self, first: int, layer: int, hidden: Tensor, *, again: bool) -> tuple[Tensor, Tensor] | None:
        """(input, output) of a layer where boundaries are kept, in their places; None below `first`.

        The output of the layer below is written by now, and begins to be carried away.
        """
        index = layer - first
        if index < 0:
            return None
        if index == 0 and not again:
            shape = tuple(hidden.shape)
            if self._kept is None or self._kept_from != first or self._kept.shape != shape:
                self._keep_nothing()
                count, device = self.n_layers - first + 1, self.skeleton.device
                self._kept = Boundaries(
                    count, shape, hidden.dtype, device, self.place, paging_device(device), self.scratch
                )
                self._kept_from = first
            hidden = self._kept.buffer(0).copy_(hidden)
        assert self._kept is not None, "the first layer made them"
        if index > 0 or not again:
            self._kept.save(index)
        return hidden, self._kept.buffer(index + 1)

    def close(self) -> None:
        """No sweep comes: hidden states that were kept can go."""
        self._keep_nothing()

    def _keep_nothing(self) -> None:
        """Boundaries can go: no backward sweep comes."""
        if self._kept is not None:
            self._kept.close()
        self._kept = None

    def _recorded(self, input_ids: Tensor) -> list[LayerCall]:
        """The recorded calls for this sequence length; they do not depend on the tokens."""
        seq = input_ids.shape[1]
        if seq not in self._calls:
            self._calls[seq] = self.skeleton.record(input_ids)
        return self._calls[seq]

    def micro_batches(self, n: int, size: int | None = None) -> Iterator[slice]:
        """`n` sequences in parts of `size`, by default the sweeper's own."""
        size = size or self.micro_batch
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))


def _refs(skeleton: Skeleton, layer: int, scope: Literal["units", "matrices"]) -> dict[str, TensorRef]:
    """The scored matrices of a layer by their names inside it."""
    geometry, stored = skeleton.geometry, skeleton.matrices(layer)
    members = {m.tensor: m for m in skeleton.family.members if m.scored}
    names = stored if scope == "matrices" else [name for name in members if name in stored]
    return {name: TensorRef(layer, name, geometry, members.get(name), stored[name]) for name in names}


def _token_blocks(n: int, seq: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most about `tokens` tokens of [n, seq]: whole sequences, or parts of one."""
    rows, columns = max(1, tokens // seq), min(seq, tokens)
    for top in range(0, n, rows):
        for left in range(0, seq, columns):
            yield slice(top, min(top + rows, n)), slice(left, min(left + columns, seq))
