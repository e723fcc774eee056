"""Forward and backward sweeps: every sequence goes through one layer before the next layer is touched.

A forward sweep keeps each prunable layer's input (a boundary), or lets a visitor see and change the layers on the way;
the backward sweep recomputes a layer from its boundary with gradients, so that one layer's activations and gradients
exist at a time. Methods receive the gradients tensor by tensor, as autograd finishes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.kernels.launch import Backend
from streamprune.model.skeleton import LayerCall, Skeleton
from streamprune.model.units import TensorRef
from streamprune.paging.device import paging_device
from streamprune.paging.hidden_states import Activations, Place, States, ahead
from streamprune.paging.pager import Page, Pager, Turn
from streamprune.paging.state import StateStream, Streamed
from streamprune.streaming.binder import Binder, Perturbation
from streamprune.streaming.gradients import Collector, MakeCollector, gradient_scale, takes_ends, watched

# (float32 logits [rows, columns, vocabulary], rows, columns) -> a sum over these tokens; column t predicts token t + 1
Objective = Callable[[Tensor, slice, slice], Tensor]
DEFAULT_MICRO_BATCH_TOKENS = 2048


def default_micro_batch(seq_len: int) -> int:
    """Return how many sequences are computed at once where the user does not say."""
    return max(1, DEFAULT_MICRO_BATCH_TOKENS // seq_len)


@dataclass(frozen=True)
class _Graph:
    """Graph of a layer that a forward sweep has kept: parts, with input and output of each, and who is fed."""

    collectors: Sequence[Collector]
    runs: list[tuple[slice, Tensor, Tensor]]


class Sweeper:
    """Runner of forward and backward sweeps of one model.

    Args:
        skeleton: embeddings, head and layer functions.
        pager: brings the layers' weights.
        micro_batch: sequences per layer call; part of the arithmetic, since sums depend on it.
        scope: what is scored and moved: the matrices that "units" are cut from, or all "matrices" of a layer.
        backend: of the kernels, where it is not the device's own.

    Attributes:
        place, scratch: where hidden states stay, to be set before the sweeps.
        graphs: layers below the head whose graphs a forward sweep keeps for the backward one, which then computes
            nothing again.
        state: what the method keeps between sweeps, where it does not lie on the device; it passes with the layers.
        calls: recorded calls of the layers, with their masks, by sequence length.
        staged: is called once, when host memory cannot be registered with the device, so that copies are staged.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        pager: Pager,
        micro_batch: int,
        scope: Literal["units", "matrices"] = "units",
        backend: Backend | None = None,
    ) -> None:
        self.skeleton, self.pager, self.micro_batch = skeleton, pager, micro_batch
        self.scope, self.backend = scope, backend
        self.binder = Binder(skeleton, backend)
        self.calls: dict[int, list[LayerCall]] = {}
        self.place: Place = "device"
        self.scratch: Path | None = None
        self.state: StateStream | None = None
        self.staged: Callable[[], object] = lambda: None
        self._said_staged = False
        self.graphs = 0
        self._graphs: dict[int, _Graph] = {}
        self._activations: Activations | None = None
        self._kept: list[States] = []  # inputs of the layers from `_kept_from` up, and the last one's output
        self._kept_from = 0

    @cached_property
    def scored(self) -> list[dict[str, TensorRef]]:
        """Scored matrices of each layer, by their names inside it."""
        return [_refs(self.skeleton, layer, self.scope) for layer in range(self.n_layers)]

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.skeleton.layers)

    @contextmanager
    def pages(
        self, order: Sequence[int], then: Turn = "back", stores: Collection[str] | None = None
    ) -> Iterator[Iterator[Page]]:
        """Give layers as `Pager.pages` does, each with the method's state: of its `stores`, by default of all."""
        with self.pager.pages(order, then) as pages:
            yield pages if self.state is None else self.state.along(pages, order, then, stores)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, *, micro_batch: int | None = None, then: Turn = "back") -> States:
        """Compute the hidden states after the last layer [n, seq, d]; each layer works in place.

        Args:
            input_ids: [n, seq].
            micro_batch: sequences per layer call, where not the sweeper's.
            then: the next sweep comes "back", or goes the same way "again".
        """
        self.forget_boundaries()
        size = micro_batch or self.micro_batch
        hidden, calls = self.embed(input_ids, size), self.recorded(input_ids)
        with self.pager.pages(range(self.n_layers), then) as pages:
            for page in pages:
                self._run(page.layer, self.binder.bind(page), calls[page.layer], hidden, hidden, size)
        return hidden

    @torch.no_grad()
    def forward_keeping(
        self,
        input_ids: Tensor,
        lowest: int,
        *,
        again: bool = False,
        prunable: Sequence[int] = (),
        perturbation: Perturbation | None = None,
        collector: MakeCollector | None = None,
        stop: int | None = None,
    ) -> States:
        """Compute the hidden states up to layer `stop`; keep the inputs of layer `lowest` and above for `backward`.

        Args:
            input_ids: [n, seq].
            again: begin at `lowest` with the input that the last sweep kept.
            perturbation: applied in the layers `prunable`.
            collector: as `backward` will be given it: the graphs of the last `self.graphs` layers are kept for that.
            stop: the first layer that is not run.
        """
        self._graphs.clear()
        if again:
            assert lowest == self._kept_from and self._kept, "the sweep before kept the same"
            hidden = self._kept[0]
        else:
            hidden = self.embed(input_ids, self.micro_batch, lowest)
        calls = self.recorded(input_ids)
        order = range(lowest if again else 0, self.n_layers if stop is None else stop)
        with self.pages(order, stores=_stores_of(perturbation)) as pages:
            for page in pages:
                layer, scored = page.layer, self.scored[page.layer] if page.layer in prunable else {}
                keeps = collector is not None and stop is None and layer >= max(lowest, self.n_layers - self.graphs)
                weights = self.binder.bind(page, perturbation if scored else None, scored, apart=keeps)
                output = self._kept[layer - lowest + 1] if layer >= lowest else hidden
                if collector is not None and keeps:
                    parts = len(list(self.micro_batches(len(hidden))))
                    collectors = [collector(ref, page.tensors[name], parts) for name, ref in scored.items()]
                    runs = list[tuple[slice, Tensor, Tensor]]()
                    for part, boundary, made in self._with_graph(layer, weights, calls[layer], hidden, collectors):
                        output[part] = made.detach()
                        runs.append((part, boundary, made))
                    self._graphs[layer] = _Graph(collectors, runs)
                else:
                    self._run(layer, weights, calls[layer], hidden, output, self.micro_batch)
                hidden = output
        return hidden

    def _with_graph(
        self,
        layer: int,
        weights: dict[str, Tensor],
        call: LayerCall,
        hidden: States,
        collectors: Sequence[Collector],
        following: States | None = None,
    ) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Run a layer part by part; yield each part, its input, and its output, whose backward feeds `collectors`.

        `following` are announced while the last part is computed on.
        """
        # Nothing is wanted below the first boundary; but captured ends need a graph, which then begins at it.
        graph = layer > self._kept_from or any(takes_ends(each, weights[each.ref.tensor]) for each in collectors)
        parts = list(self.micro_batches(len(hidden)))
        with watched(self.skeleton.layers[layer], weights, collectors) as bound:
            for part in parts:
                # Not detach(): where boundaries are one memory, it counts writes to others as writes to this one.
                boundary = hidden[part].data.requires_grad_(graph)
                if following is not None and part.stop == len(hidden):
                    ahead(following, parts[0])
                with torch.enable_grad():
                    output = self.skeleton.run_layer(layer, bound, call, boundary)
                yield part, boundary, output

    def _run(
        self, layer: int, weights: dict[str, Tensor], call: LayerCall, hidden: States, output: States, micro_batch: int
    ) -> None:
        for part in self.micro_batches(len(hidden), micro_batch):
            output[part] = self.skeleton.run_layer(layer, weights, call, hidden[part])

    def backward(
        self,
        input_ids: Tensor,
        grad: States,
        prunable: Sequence[int],
        collector: MakeCollector,
        *,
        perturbation: Perturbation | None = None,
        below: int | None = None,
        done: Callable[[int, States], None] = lambda layer, grad: None,
    ) -> None:
        """Carry dL/dh from the last layer down to the lowest boundary that `forward_keeping` kept; feed collectors.

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
        assert kept, "a forward sweep kept boundaries"
        calls, parts = self.recorded(input_ids), len(list(self.micro_batches(len(grad))))
        top = self.n_layers if below is None else below
        with self.pages(range(top - 1, first - 1, -1)) as pages:
            for page in pages:
                layer, scored = page.layer, self.scored[page.layer] if page.layer in prunable else {}
                graph = self._graphs.pop(layer, None)
                if graph is not None:
                    for each in graph.collectors:
                        each.stored = page.tensors[each.ref.tensor]  # the slot of then may hold another layer
                    runs: Iterable[tuple[slice, Tensor, Tensor]] = graph.runs
                else:
                    weights = self.binder.bind(page, perturbation if scored else None, scored)
                    collectors = [collector(ref, page.tensors[name], parts) for name, ref in scored.items()]
                    below_it = kept[layer - first - 1] if layer > first else None
                    runs = self._with_graph(
                        layer, weights, calls[layer], kept[layer - first], collectors, following=below_it
                    )
                for part, boundary, output in runs:
                    output.backward(grad[part])
                    if layer > first and boundary.grad is not None:
                        grad[part] = boundary.grad
                done(layer, grad)

    def head_loss(self, hidden: States, input_ids: Tensor, *, with_grad: bool) -> tuple[float, States | None]:
        """Compute the mean next-token loss (nats) and, if asked, its gradient with respect to `hidden` [n, seq, d].

        The gradient is `gradient_scale(dtype)` times as large; what `backward` hands over is not.
        """
        n, seq, _ = hidden.shape
        targets = input_ids.to(self.skeleton.device)

        def objective(logits: Tensor, rows: slice, columns: slice) -> Tensor:
            following = targets[rows, columns.start + 1 : columns.stop + 1]
            return F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="sum")

        return self.through_head(hidden, objective, n * (seq - 1), with_grad=with_grad)

    def through_head(
        self, hidden: States, objective: Objective, count: int, *, with_grad: bool
    ) -> tuple[float, States | None]:
        """Sum an objective over the logits of all tokens but each sequence's last; return its mean and gradient.

        Args:
            hidden: the last layer's output [n, seq, d].
            objective: is given the logits of a block at a time.
            count: what the sum is divided by. with_grad: as in `head_loss`.
        """
        n, seq, _ = hidden.shape
        # Blocks of tokens are added up in float64, so that their number costs no digits.
        total = torch.zeros((), dtype=torch.float64, device=self.skeleton.device)
        grad = self.states_like(hidden) if with_grad else None
        for rows, blocks in blocks_of_tokens(n, seq - 1, self.skeleton.head_tokens):
            states = hidden[rows].detach()
            grads = torch.zeros_like(states) if with_grad else None
            for columns in blocks:
                block = states[:, columns].requires_grad_(with_grad)
                with torch.set_grad_enabled(with_grad):
                    logits = self.skeleton.head(block)
                    loss = objective(logits if logits.dtype == torch.float64 else logits.float(), rows, columns)
                total += loss.detach().double()
                if grads is not None:
                    scaled = loss * (gradient_scale(block.dtype) / count)
                    (grads[:, columns],) = torch.autograd.grad(scaled, block)
            if grad is not None and grads is not None:
                grad[rows] = grads
        return float(total) / count, grad

    def states(self, pieces: Iterable[Tensor], count: int) -> States:
        """Put hidden states [count, seq, d] together, where this sweeper's stay, from pieces of them on the CPU."""
        states, start = None, 0
        for piece in pieces:
            if states is None:
                (states,) = self._new_states(1, (count, *piece.shape[1:]), piece.dtype)
            for part in self.micro_batches(len(piece)):
                states[start + part.start : start + part.stop] = piece[part].to(self.skeleton.device, copy=True)
            start += len(piece)
        assert states is not None and start == count, "a journal holds all of them"
        return states

    def states_like(self, states: States, width: int | None = None, count: int | None = None) -> States:
        """Make new hidden states of the same shape, or of another width or count, with anything in them."""
        n, seq, hidden_size = states.shape
        return self._new_states(1, (count or n, seq, width or hidden_size), states.dtype)[0]

    def _new_states(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[States]:
        if self._activations is None:
            device = self.skeleton.device
            self._activations = Activations(device, self.place, paging_device(device), self.scratch, self.say_staged)
        return self._activations.several(count, shape, dtype)

    def embed(self, input_ids: Tensor, micro_batch: int, keep_from: int | None = None) -> States:
        """Compute the first layer's input [n, seq, d]; where boundaries are to be kept, in the place of the lowest."""
        hidden: States | None = None
        for part in self.micro_batches(len(input_ids), micro_batch):
            embedded = self.skeleton.embed(input_ids[part])
            if hidden is None:
                shape = (len(input_ids), *embedded.shape[1:])
                hidden = self._lowest_boundary(shape, embedded.dtype, keep_from)
            hidden[part] = embedded
        assert hidden is not None, "there are sequences"
        return hidden

    def _lowest_boundary(self, shape: tuple[int, ...], dtype: torch.dtype, keep_from: int | None) -> States:
        if keep_from is None:
            return self._new_states(1, shape, dtype)[0]
        if not self._kept or self._kept_from != keep_from or self._kept[0].shape != shape:
            # The old ones go before there are new ones, so that both are never in memory.
            self._kept = []
            self._kept = self._new_states(self.n_layers - keep_from + 1, shape, dtype)
            self._kept_from = keep_from
        return self._kept[0]

    def forget_boundaries(self) -> None:
        """Let go of what `forward_keeping` kept."""
        self._kept = []
        self._graphs.clear()

    def close(self) -> None:
        """Let go of all hidden states and their files, and of the method's state: no sweep comes."""
        self.forget_boundaries()
        if self.state is not None:
            self.state.close()
            self.state = None
        if self._activations is not None:
            self._activations.close()
            self._activations = None

    def say_staged(self) -> None:
        """Say that copies are staged, unless it was said before: for hidden states, or the method's state."""
        if not self._said_staged:
            self._said_staged = True
            self.staged()

    def recorded(self, input_ids: Tensor) -> list[LayerCall]:
        """Return the recorded calls for this sequence length; they do not depend on the tokens."""
        seq = input_ids.shape[1]
        if seq not in self.calls:
            self.calls[seq] = self.skeleton.record(input_ids)
        return self.calls[seq]

    def micro_batches(self, n: int, size: int | None = None) -> Iterator[slice]:
        """Yield `n` sequences in slices of `size`, by default the sweeper's own."""
        size = size or self.micro_batch
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))


def _refs(skeleton: Skeleton, layer: int, scope: Literal["units", "matrices"]) -> dict[str, TensorRef]:
    """Return the scored matrices of a layer by their names inside it."""
    geometry, stored = skeleton.geometries[layer], skeleton.matrices(layer)
    members = {m.tensor: m for m in skeleton.family.members if m.scored}
    names = stored if scope == "matrices" else [name for name in members if name in stored]
    return {name: TensorRef(layer, name, geometry, members.get(name), stored[name]) for name in names}


def _stores_of(perturbation: Perturbation | None) -> Collection[str]:
    """Name the stores that binding reads."""
    delta = None if perturbation is None else perturbation.delta
    return [delta.name] if isinstance(delta, Streamed) else []


def blocks_of_tokens(n: int, seq: int, tokens: int) -> Iterator[tuple[slice, list[slice]]]:
    """Yield blocks of at most about `tokens` tokens of [n, seq]: rows, and the columns of each block in them."""
    rows, columns = max(1, tokens // seq), min(seq, tokens)
    for top in range(0, n, rows):
        yield slice(top, min(top + rows, n)), [slice(x, min(x + columns, seq)) for x in range(0, seq, columns)]
