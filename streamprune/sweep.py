"""Forward and backward sweeps: every sequence goes through one layer before the next layer is touched.

A forward sweep keeps each prunable layer's input (a boundary); the backward sweep recomputes a layer from its
boundary with gradients, so that one layer's activations and gradients exist at a time. Methods receive the
gradients tensor by tensor, as autograd finishes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.binding import Binder, Perturbation, check_finite
from streamprune.capture import (
    Consumer,
    GradientCollector,
    MakeCollector,
    PowerCollector,
    PowersConsumer,
    TensorRef,
    gradient_scale,
    watched,
)
from streamprune.paging import Page, Pager
from streamprune.skeleton import LayerCall, Skeleton

HEAD_BYTES = 64 << 20  # float32 logits made at a time; a vocabulary of 128k words never exists for all tokens
DEFAULT_MICRO_BATCH_TOKENS = 2048


def default_micro_batch(seq_len: int) -> int:
    """Sequences computed at once where the user does not say."""
    return max(1, DEFAULT_MICRO_BATCH_TOKENS // seq_len)


class Sweeper:
    """Runs sweeps of one model.

    Args:
        skeleton: embeddings, head and layer functions.
        pager: brings the layers' weights.
        micro_batch: sequences per layer call; part of the arithmetic, since sums depend on it.
    """

    def __init__(self, skeleton: Skeleton, pager: Pager, micro_batch: int) -> None:
        self.skeleton, self.pager, self.micro_batch = skeleton, pager, micro_batch
        self._binder = Binder(skeleton)
        self._calls: dict[int, list[LayerCall]] = {}
        self._boundaries: Tensor | None = None

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.skeleton.layers)

    @property
    def resident_bytes(self) -> int:
        """Bytes that stay allocated: slots, chunks, the bound layer, embeddings and head."""
        return self.pager.resident_bytes + self._binder.resident_bytes + self.skeleton.resident_bytes

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        *,
        start: tuple[int, Tensor] | None = None,
        keep_from: int | None = None,
        perturbation: Perturbation | None = None,
        perturbed: Sequence[int] = (),
        edit: Callable[[int, dict[str, Tensor]], None] | None = None,
        micro_batch: int | None = None,
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Hidden states after the last layer [n, seq, d], and the boundaries that were kept.

        Boundaries are valid until the next sweep that keeps some: they lie in one tensor that stays.

        Args:
            input_ids: [n, seq].
            start: (layer, its input) where an earlier sweep had the same weights below that layer; with `keep_from`
                it is the boundary of that very layer that the earlier sweep kept.
            keep_from: keep the inputs of this layer and of those above.
            perturbation: applied in the layers `perturbed`.
            edit: may change a layer's bound weights in place (masks).
            micro_batch: sequences per layer call, where not the sweeper's.
        """
        first, hidden = start if start is not None else (0, self._embed(input_ids, micro_batch))
        calls = self._recorded(input_ids)
        boundaries: dict[int, Tensor] = {}
        with self.pager.pages(range(first, self.n_layers)) as pages:
            for page in pages:
                moved = perturbation if page.layer in perturbed else None
                weights = self._binder.bind(page, moved, own=edit is not None)
                if edit is not None:
                    edit(page.layer, weights)
                if keep_from is not None and page.layer >= keep_from:
                    store = self._boundary_store(keep_from, hidden)
                    if page.layer == keep_from and start is None:
                        hidden = store[0].copy_(hidden)
                    boundaries[page.layer] = hidden
                    output = store[page.layer + 1 - keep_from]
                else:
                    # The caller of `start` keeps its hidden states; otherwise the layer works in place.
                    output = torch.empty_like(hidden) if page.layer == first else hidden
                for part in self._micro_batches(len(hidden), micro_batch):
                    output[part] = self.skeleton.run_layer(page.layer, weights, calls[page.layer], hidden[part])
                hidden = output
        return hidden, boundaries

    def backward(
        self,
        input_ids: Tensor,
        boundaries: dict[int, Tensor],
        grad: Tensor,
        prunable: Sequence[int],
        collector: MakeCollector,
        *,
        perturbation: Perturbation | None = None,
    ) -> None:
        """From dL/dh after the last layer down to the lowest boundary, feeding collectors.

        Args:
            input_ids: [n, seq], as in the forward sweep.
            boundaries: from `forward`; emptied on the way.
            grad: dL/dh [n, seq, d] after the last layer; overwritten.
            prunable: layers whose weight gradients are wanted.
            collector: makes the collector of a scored tensor of those layers, given the number of micro-batches.
            perturbation: as in the forward sweep.
        """
        call, first = self._recorded(input_ids), min(boundaries)
        parts = list(self._micro_batches(len(grad)))
        with self.pager.pages(range(self.n_layers - 1, first - 1, -1)) as pages:
            for page in pages:
                layer, hidden = page.layer, boundaries.pop(page.layer)
                weights = self._binder.bind(page, perturbation if layer in prunable else None)
                refs = self.refs(page) if layer in prunable else []
                collectors = [collector(ref, page.tensors[ref.member.tensor], len(parts)) for ref in refs]
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
        parts = self._micro_batches(len(input_ids), micro_batch)
        return torch.cat([self.skeleton.embed(input_ids[part]) for part in parts])

    def _boundary_store(self, keep_from: int, hidden: Tensor) -> Tensor:
        """[layers from `keep_from` up, and one, n, seq, d]: allocated once.

        Tensors that come and go among a layer's activations leave holes in the heap, more with every layer.
        """
        shape = (self.n_layers - keep_from + 1, *hidden.shape)
        if self._boundaries is None or self._boundaries.shape != shape:
            self._boundaries = torch.empty(shape, dtype=hidden.dtype, device=hidden.device)
        return self._boundaries

    def _recorded(self, input_ids: Tensor) -> list[LayerCall]:
        """The recorded calls for this sequence length; they do not depend on the tokens."""
        seq = input_ids.shape[1]
        if seq not in self._calls:
            self._calls[seq] = self.skeleton.record(input_ids)
        return self._calls[seq]

    def _micro_batches(self, n: int, size: int | None = None) -> Iterator[slice]:
        size = size or self.micro_batch
        for start in range(0, n, size):
            yield slice(start, min(start + size, n))

    def refs(self, page: Page) -> list[TensorRef]:
        """The scored tensors of a page."""
        members, geometry = self.skeleton.family.members, self.skeleton.geometry
        return [TensorRef(page.layer, m, geometry) for m in members if m.scored and m.tensor in page.tensors]


def working_bytes(sweeper: Sweeper, samples: int, seq_len: int, layers: Sequence[int], sums: int = 1) -> dict[str, int]:
    """Bytes that a gradient sweep holds beside the interpreter, by purpose; not a method's state.

    The activations of one layer are counted as the inputs and outputs of its matrices for one micro-batch, and their
    gradients as three of the widest (a gated MLP's product and its two factors exist together). With several
    micro-batches a layer's weight gradients are summed together, otherwise they come and go matrix by matrix. `sums` is
    how many are kept of each: more than one for `gradient_powers` with several powers.
    """
    skeleton = sweeper.skeleton
    size, tokens = skeleton.dtype.itemsize, min(sweeper.micro_batch, samples) * seq_len
    hidden = samples * seq_len * skeleton.config.hidden_size * size
    matrices = [shape for shape in skeleton.shapes(layers[0]).values() if len(shape) == 2]
    largest, all_of_them = max(map(torch.Size.numel, matrices)), sum(map(torch.Size.numel, matrices))
    gradients = (1 + sums) * largest + (sums * all_of_them if samples > sweeper.micro_batch else 0)
    return {
        "slots, chunks, bound layer, embeddings and head": sweeper.resident_bytes,
        # Each layer's input from the lowest prunable one up, the last one's output, and the gradient of both kinds.
        "boundaries": (sweeper.n_layers - layers[0] + 3) * hidden,
        "one layer's activations": sum(sum(shape) for shape in matrices) * tokens * size,
        "gradients of its activations": 3 * max(max(shape) for shape in matrices) * tokens * size,
        "gradients, and what is made of them": gradients * max(size, 4),
        "logits, their softmax and gradient": 3 * HEAD_BYTES,
    }


def _token_blocks(n: int, seq: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of at most about `tokens` tokens of [n, seq]: whole sequences, or parts of one."""
    rows, columns = max(1, tokens // seq), min(seq, tokens)
    for top in range(0, n, rows):
        for left in range(0, seq, columns):
            yield slice(top, min(top + rows, n)), slice(left, min(left + columns, seq))


class Statistics:
    """What a method can ask for. It sees tensors and scores, never files, paging or devices.

    Attributes:
        layers: the prunable layers.
        samples: calibration sequences.
        seed: of the run.
    """

    def __init__(self, sweeper: Sweeper, input_ids: Tensor | None, layers: Sequence[int], seed: int) -> None:
        self.sweeper, self.input_ids, self.layers, self.seed = sweeper, input_ids, layers, seed
        self._start: tuple[int, Tensor] | None = None
        skeleton = sweeper.skeleton
        self.geometry, self.kinds = skeleton.geometry, skeleton.family.kinds
        self.samples = 0 if input_ids is None else len(input_ids)

    def bytes_to_read(self, needs: str, sweeps: int) -> int:
        """Bytes of layers that a method reads which needs "nothing", "weights", or so many "gradients" sweeps."""
        pager = self.sweeper.pager
        sizes = [pager.bytes_of(layer) for layer in range(self.sweeper.n_layers)]
        if needs != "gradients":
            return sum(sizes[layer] for layer in self.layers) if needs == "weights" else 0
        # Each way passes the layers from the lowest prunable one up; the first forward also those below.
        return sum(sizes) + (2 * sweeps - 1) * sum(sizes[self.layers[0] :])

    def weights(self, consume: Callable[[TensorRef, Tensor], None]) -> None:
        """One sweep over the scored tensors of the prunable layers as they are stored."""
        with self.sweeper.pager.pages(self.layers) as pages:
            for page in pages:
                for ref in self.sweeper.refs(page):
                    weight = page.tensors[ref.member.tensor]
                    check_finite(self.sweeper.skeleton.checkpoint.path, page.layer, ref.member.tensor, weight)
                    consume(ref, weight)

    def gradients(self, consume: Consumer, perturbation: Perturbation | None = None) -> float:
        """One forward and one backward sweep over the calibration batch; returns the mean loss in nats."""
        return self._sweep(partial(GradientCollector, consume), perturbation)

    def gradient_powers(self, consume: PowersConsumer, powers: Sequence[int]) -> float:
        """The same for Σ_n |g_n|^p over the samples' own gradients, and the mean gradient for p = 0."""
        assert self.input_ids is not None, "as for gradients"
        return self._sweep(partial(PowerCollector, consume, powers, (self.samples, self.input_ids.shape[1])), None)

    def _sweep(self, collector: MakeCollector, perturbation: Perturbation | None) -> float:
        assert self.input_ids is not None, "run.py reads the calibration text for every method that needs it"
        sweeper, lowest = self.sweeper, self.layers[0]
        hidden, boundaries = sweeper.forward(
            self.input_ids,
            start=self._start,
            keep_from=lowest,
            perturbation=perturbation,
            perturbed=self.layers,
        )
        # Below the first prunable layer nothing ever moves: later sweeps start from its input.
        self._start = (lowest, boundaries[lowest])
        loss, grad = sweeper.head_loss(hidden, self.input_ids, with_grad=True)
        assert grad is not None
        sweeper.backward(self.input_ids, boundaries, grad, self.layers, collector, perturbation=perturbation)
        return loss
