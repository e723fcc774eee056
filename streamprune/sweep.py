"""Forward and backward sweeps: every sequence goes through one layer before the next layer is touched.

A forward sweep keeps each prunable layer's input (a boundary); the backward sweep recomputes a layer from its
boundary with gradients, so that one layer's activations and gradients exist at a time. Methods receive the
gradients tensor by tensor, as autograd finishes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from streamprune.binding import Binder, Perturbation, check_finite
from streamprune.families import Geometry, Member
from streamprune.paging import Page, Pager
from streamprune.skeleton import LayerCall, Skeleton

HEAD_BYTES = 64 << 20  # float32 logits made at a time; a vocabulary of 128k words never exists for all tokens
DEFAULT_MICRO_BATCH_TOKENS = 2048
# Gradients of a mean over thousands of tokens lie below float16's smallest number; they are carried this much larger.
FLOAT16_SCALE = 2.0**13


@dataclass(frozen=True)
class TensorRef:
    """A scored tensor of a layer."""

    layer: int
    member: Member
    geometry: Geometry

    @property
    def key(self) -> tuple[int, str]:
        """Identifies the tensor in the model."""
        return self.layer, self.member.tensor


# (tensor, its weight as stored, gradient of the mean loss, mean squared per-sample gradient or None)
Consumer = Callable[[TensorRef, Tensor, Tensor, Tensor | None], None]


def default_micro_batch(seq_len: int) -> int:
    """Sequences computed at once where the user does not say."""
    return max(1, DEFAULT_MICRO_BATCH_TOKENS // seq_len)


def gradient_scale(dtype: torch.dtype) -> float:
    """How much larger than themselves gradients are carried in a compute dtype."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


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
        consume: Consumer,
        *,
        perturbation: Perturbation | None = None,
        second_moment: bool = False,
    ) -> None:
        """From dL/dh after the last layer down to the lowest boundary, feeding `consume`.

        Args:
            input_ids: [n, seq], as in the forward sweep.
            boundaries: from `forward`; emptied on the way.
            grad: dL/dh [n, seq, d] after the last layer; overwritten.
            prunable: layers whose weight gradients are wanted.
            consume: called once for each scored tensor of those layers.
            perturbation: as in the forward sweep.
            second_moment: also give F = (1/N) Σ_n g_n², which takes the samples one by one.
        """
        call, first = self._recorded(input_ids), min(boundaries)
        parts = list(self._micro_batches(len(grad), 1 if second_moment else self.micro_batch))
        with self.pager.pages(range(self.n_layers - 1, first - 1, -1)) as pages:
            for page in pages:
                layer, hidden, leaves = page.layer, boundaries.pop(page.layer), {}
                weights = self._binder.bind(page, perturbation if layer in prunable else None)
                if layer in prunable:
                    leaves = self._leaves(page, weights, consume, len(parts), second_moment)
                for part in parts:
                    boundary = hidden[part].detach().requires_grad_(layer > first)
                    with torch.enable_grad():
                        output = self.skeleton.run_layer(layer, {**weights, **leaves}, call[layer], boundary)
                    output.backward(grad[part])
                    if boundary.grad is not None:
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

    def _leaves(
        self, page: Page, weights: Mapping[str, Tensor], consume: Consumer, parts: int, second_moment: bool
    ) -> dict[str, Tensor]:
        """Leaves for the scored tensors of a layer that hand their summed gradients to `consume`."""
        leaves = {}
        for ref in self.refs(page):
            name = ref.member.tensor
            leaves[name] = weights[name].detach().requires_grad_()
            collector = _Collector(ref, page.tensors[name], consume, parts, second_moment)
            leaves[name].register_post_accumulate_grad_hook(collector)
        return leaves

    def refs(self, page: Page) -> list[TensorRef]:
        """The scored tensors of a page."""
        members, geometry = self.skeleton.family.members, self.skeleton.geometry
        return [TensorRef(page.layer, m, geometry) for m in members if m.scored and m.tensor in page.tensors]


def working_bytes(sweeper: Sweeper, samples: int, seq_len: int, layers: Sequence[int]) -> dict[str, int]:
    """Bytes that a gradient sweep holds beside the interpreter, by purpose; not a method's state.

    The activations of one layer are counted as the inputs and outputs of its matrices for one micro-batch, and their
    gradients as three of the widest (a gated MLP's product and its two factors exist together). With several
    micro-batches a layer's weight gradients are summed together, otherwise they come and go matrix by matrix.
    """
    skeleton = sweeper.skeleton
    size, tokens = skeleton.dtype.itemsize, min(sweeper.micro_batch, samples) * seq_len
    hidden = samples * seq_len * skeleton.config.hidden_size * size
    matrices = [shape for shape in skeleton.shapes(layers[0]).values() if len(shape) == 2]
    largest, all_of_them = max(map(torch.Size.numel, matrices)), sum(map(torch.Size.numel, matrices))
    gradients = 2 * largest + (all_of_them if samples > sweeper.micro_batch else 0)
    return {
        "slots, chunks, bound layer, embeddings and head": sweeper.resident_bytes,
        # Each layer's input from the lowest prunable one up, the last one's output, and the gradient of both kinds.
        "boundaries": (sweeper.n_layers - layers[0] + 3) * hidden,
        "one layer's activations": sum(sum(shape) for shape in matrices) * tokens * size,
        "gradients of its activations": 3 * max(max(shape) for shape in matrices) * tokens * size,
        "gradients, and what is made of them": gradients * max(size, 4),
        "logits, their softmax and gradient": 3 * HEAD_BYTES,
    }


class _Collector:
    """Sums one tensor's gradient over micro-batches and hands it over with the last of them.

    Called by autograd as soon as the gradient of a micro-batch is there; it frees that gradient, so that
    a layer's gradients do not exist together unless there are several micro-batches.
    """

    def __init__(self, ref: TensorRef, stored: Tensor, consume: Consumer, parts: int, second_moment: bool) -> None:
        self.ref, self.stored, self.consume = ref, stored, consume
        self.parts, self.left, self.second_moment = parts, parts, second_moment
        self.total: Tensor | None = None
        self.squares: Tensor | None = None

    def __call__(self, leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        scale = gradient_scale(grad.dtype)
        grad = grad if grad.dtype == torch.float64 else grad.float()
        if scale != 1:
            grad = grad.div_(scale)
        if self.second_moment:
            # The seed carries 1/N, so g_n = N · grad and F = (1/N) Σ g_n² = N Σ grad².
            square = grad.square().mul_(self.parts)
            self.squares = square if self.squares is None else self.squares.add_(square)
        self.total = grad if self.total is None else self.total.add_(grad)
        self.left -= 1
        if self.left == 0:
            total, self.total = self.total, None
            self.consume(self.ref, self.stored, total, self.squares)
            self.squares = None


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
        seed: of the run.
    """

    def __init__(self, sweeper: Sweeper, input_ids: Tensor | None, layers: Sequence[int], seed: int) -> None:
        self.sweeper, self.input_ids, self.layers, self.seed = sweeper, input_ids, layers, seed
        self._start: tuple[int, Tensor] | None = None
        skeleton = sweeper.skeleton
        self.geometry, self.kinds = skeleton.geometry, skeleton.family.kinds

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

    def gradients(
        self, consume: Consumer, perturbation: Perturbation | None = None, *, second_moment: bool = False
    ) -> float:
        """One forward and one backward sweep over the calibration batch; returns the mean loss in nats."""
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
        sweeper.backward(
            self.input_ids,
            boundaries,
            grad,
            self.layers,
            consume,
            perturbation=perturbation,
            second_moment=second_moment,
        )
        return loss
