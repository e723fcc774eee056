"""Collectors that hand over what a method asked of a layer's backward pass: weight gradients, or their sample norms.

Both come tensor by tensor, as autograd reaches them, and are summed over micro-batches. Norms Σ_n |dY_nᵀ X_n|^p are
made of a Linear's ends, its input X and its output's gradient dY, by `grad_norm` and without a gradient in memory.
Where a GPU computes in half precision so are gradients dYᵀX, straight into float32; others are autograd's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from streamprune.kernels import add_product, grad_norm, sums_halves
from streamprune.kernels.launch import Backend
from streamprune.model.units import TensorRef
from streamprune.streaming.watch import watch_ends

# Gradients of a mean over thousands of tokens lie below float16's smallest number; they are carried this much larger.
FLOAT16_SCALE = 2.0**13


# (tensor, its weight as stored, gradient of the mean loss)
Consumer = Callable[[TensorRef, Tensor, Tensor], None]
# (tensor, its weight as stored, {p: Σ_n |g_n|^p over the samples' own gradients, 0: gradient of the mean loss})
PowersConsumer = Callable[[TensorRef, Tensor, dict[int, Tensor]], None]


def gradient_scale(dtype: torch.dtype) -> float:
    """Return how many times larger than themselves gradients are carried in a compute dtype."""
    return FLOAT16_SCALE if dtype == torch.float16 else 1.0


class GradientCollector:
    """Collector that sums one tensor's gradient over micro-batches and hands it over with the last of them.

    Autograd calls the collector as soon as the gradient of a micro-batch is there, or `add_ends` is given what it is
    made of. That gradient is freed, so that a layer's gradients do not exist together unless there are several
    micro-batches.
    """

    def __init__(self, consume: Consumer, ref: TensorRef, stored: Tensor, parts: int) -> None:
        self.consume, self.ref, self.stored, self.left = consume, ref, stored, parts
        self.total: Tensor | None = None

    def __call__(self, leaf: Tensor) -> None:
        grad, leaf.grad = leaf.grad, None
        assert grad is not None
        scale = gradient_scale(grad.dtype)
        # Sums of half gradients would lose what is small beside the sum.
        grad = grad if grad.dtype == torch.float64 else grad.float()
        if scale != 1:
            grad = grad.div_(scale)
        self._is_now(grad if self.total is None else self.total.add_(grad))

    def add_ends(self, x: Tensor, dy: Tensor) -> None:
        """Add a micro-batch's dYᵀX, from X [..., d_in] and dY [..., d_out], in float32 (float64 in float64 runs)."""
        x, dy = x.flatten(0, -2), dy.flatten(0, -2)
        total, beta = self.total, 1.0
        if total is None:
            dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
            total, beta = torch.empty(self.stored.shape, dtype=dtype, device=dy.device), 0.0
        self._is_now(add_product(total, dy, x, alpha=1 / gradient_scale(dy.dtype), beta=beta))

    def _is_now(self, total: Tensor) -> None:
        self.total = total
        self.left -= 1
        if self.left == 0:
            self.total = None
            self.consume(self.ref, self.stored, total)


class PowerCollector:
    """Collector that sums |g_n|^p over the samples of all micro-batches, for powers p.

    `shape` is (samples, seq), `backend` as in `grad_norm`.
    """

    def __init__(
        self,
        consume: PowersConsumer,
        powers: Sequence[int],
        shape: tuple[int, int],
        backend: Backend | None,
        ref: TensorRef,
        stored: Tensor,
        parts: int,
    ) -> None:
        self.consume, self.powers, (self.samples, self.seq_len), self.backend = consume, powers, shape, backend
        self.ref, self.stored, self.left = ref, stored, parts
        self.sums: dict[int, Tensor] = {}

    def add_ends(self, x: Tensor, dy: Tensor) -> None:
        """Add Σ_n |dY_nᵀ X_n|^p of a micro-batch, from X [..., d_in] and dY [..., d_out]."""
        dtype = torch.float64 if dy.dtype == torch.float64 else torch.float32
        for power in self.powers:
            if power not in self.sums:
                self.sums[power] = torch.zeros(self.stored.shape, dtype=dtype, device=dy.device)
            # Some models flatten samples and tokens before a Linear.
            ends = (end.reshape(-1, self.seq_len, end.shape[-1]) for end in (x, dy))
            grad_norm(self.sums[power], *ends, power, backend=self.backend)
        self.left -= 1
        if self.left == 0:
            sums, self.sums = self.sums, {}
            # The seed of the backward pass carries 1/N, so a sample's own gradient is N times what was summed.
            for power, value in sums.items():
                factor = (self.samples if power else 1) / gradient_scale(dy.dtype)
                value.mul_(factor ** max(power, 1))
            self.consume(self.ref, self.stored, sums)


Collector = GradientCollector | PowerCollector
MakeCollector = Callable[[TensorRef, Tensor, int], Collector]  # from (tensor, its weight as stored, micro-batches)


def takes_ends(collector: Collector, weight: Tensor) -> bool:
    """Tell whether a collector takes a Linear's ends, and not the gradient that autograd makes for `weight`."""
    return isinstance(collector, PowerCollector) or sums_halves(weight)


@contextmanager
def watched(
    layer: nn.Module, weights: Mapping[str, Tensor], collectors: Sequence[Collector]
) -> Iterator[dict[str, Tensor]]:
    """Give the weights to run `layer` with, so that its backward passes inside the block feed the collectors."""
    bound, ends = dict(weights), {}
    for collector in collectors:
        name = collector.ref.tensor
        if isinstance(collector, GradientCollector) and not takes_ends(collector, weights[name]):
            bound[name] = weights[name].detach().requires_grad_()
            bound[name].register_post_accumulate_grad_hook(collector)
        else:
            ends[name] = partial(_capture, collector)
    with watch_ends(layer, ends):
        yield bound


def _capture(collector: Collector, given: Tensor, output: Tensor) -> None:
    """Hand over a Linear's X, and its dY when the backward pass has it.

    The weight needs no gradient, so autograd computes none. Where it is stored as [d_in, d_out] the two ends change
    places.
    """
    held = [given.detach()]

    def hand_over(dy: Tensor) -> None:
        x = held.pop()  # the graph's nodes, and this with them, outlive the backward pass
        collector.add_ends(*((dy, x) if collector.ref.transposed else (x, dy)))

    output.register_hook(hand_over)
