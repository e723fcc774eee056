"""Binding: from a page to the weights that a layer computes with, widened, perturbed and checked."""

from __future__ import annotations

from collections.abc import Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from streamprune.errors import UsageError
from streamprune.kernels import noise_seed, perturb
from streamprune.kernels.launch import Backend
from streamprune.model.skeleton import Skeleton
from streamprune.paging.device import at_once, draw_threads
from streamprune.paging.pager import Page
from streamprune.storage.checkpoint import check_finite, is_finite

ALIGNED_ELEMENTS = 16  # bound tensors begin at multiples of this, for vector loads in any dtype


@dataclass(frozen=True)
class Perturbation:
    """Change of the weights to w + δ + σ|w|ξ in the prunable layers.

    Attributes:
        sigma: relative standard deviation of the noise.
        key: (seed, step, draw) of the noise.
        delta: δ per tensor on the host, float32 (float64 in float64 runs); absent tensors have δ = 0.
    """

    sigma: float
    key: tuple[int, ...]
    delta: Mapping[tuple[int, str], Tensor] = field(default_factory=dict)

    def move(self, out: Tensor, stored: Tensor, layer: int, name: str, backend: Backend | None = None) -> None:
        """Write the moved weight to `out`. δ is brought here from where it is kept, a tensor for each thread."""
        delta = self.delta.get((layer, name))
        seed = noise_seed(*self.key, layer, name)
        perturb(out, stored, None if delta is None else delta.to(out.device), self.sigma, seed, backend=backend)


class Binder:
    """Binder of a page's tensors to weights of the compute dtype, in one buffer that stays.

    A tensor that is stored in the compute dtype and not perturbed is used where it lies, in the slot. The pieces of a
    fused parameter are always copied, each to its place. `backend` of the kernels is as in `perturb`.
    """

    def __init__(self, skeleton: Skeleton, backend: Backend | None = None) -> None:
        self.skeleton, self.backend = skeleton, backend
        self._buffer: Tensor | None = None
        self._finite: set[int] = set()
        # Tensors have generators of their own, so they can be drawn together.
        self.threads = draw_threads(skeleton.device)
        self._pool: ThreadPoolExecutor | None = None
        if self.threads > 1:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="streamprune-noise")

    @property
    def buffer_bytes(self) -> int:
        """Bytes that the buffer takes when it is needed: the largest layer's in the compute dtype."""
        layers = map(self.skeleton.shapes, range(len(self.skeleton.layers)))
        elements = max(sum(_aligned(shape.numel()) for shape in shapes.values()) for shapes in layers)
        return elements * self.skeleton.dtype.itemsize

    @property
    def copies(self) -> bool:
        """Tell whether unperturbed weights are copied too: stored in another dtype than needed, or in pieces."""
        skeleton = self.skeleton
        widened = any(entry.dtype != skeleton.dtype for layer in skeleton.entries for entry in layer.values())
        return widened or bool(skeleton.family.fused)

    def bind(
        self,
        page: Page,
        perturbation: Perturbation | None = None,
        scored: Container[str] = (),
        *,
        own: bool = False,
        apart: bool = False,
    ) -> dict[str, Tensor]:
        """Return weights by the parameters' names inside the layer; valid until the next call, unless `apart`.

        Args:
            perturbation: moves the tensors `scored`.
            own: copy all of them, so that they can be changed.
            apart: copy all of them to memory of their own, which stays as long as they do.
        """
        shapes, weights, position = self.skeleton.shapes(page.layer), dict[str, Tensor](), 0
        drawing = list[Future[None]]()
        buffer = self._new_buffer(page.layer) if apart else None
        for name, stored in page.tensors.items():
            parameter, place = self.skeleton.places[page.layer].get(name, (name, None))
            moved = perturbation is not None and name in scored
            if place is None and stored.dtype == self.skeleton.dtype and not (moved or own or apart):
                weights[parameter] = stored
                continue
            if parameter not in weights:
                weights[parameter] = self._room(position, shapes[parameter], buffer)
                position += _aligned(weights[parameter].numel())
            out = self._within(weights, page.layer, name)
            if perturbation is not None and moved:
                move = partial(perturbation.move, out, stored, page.layer, name, self.backend)
                if self._pool is None:
                    move()
                else:
                    drawing.append(self._pool.submit(move))
            else:
                out.copy_(stored)
        for draw in drawing:
            draw.result()
        self._check_first(page, weights)
        self._finite.add(page.layer)
        return weights

    def _check_first(self, page: Page, weights: Mapping[str, Tensor]) -> None:
        """Refuse NaN and infinity, at a layer's first visit, in what is stored and in its weights of a narrower dtype.

        Raises:
            CheckpointError: a stored tensor is not finite.
            UsageError: a weight does not fit into the compute dtype.
        """
        if page.layer in self._finite:  # the file does not change; a method of ten sweeps would look ten times
            return
        for name, stored in page.tensors.items():
            check_finite(self.skeleton.checkpoint.path, f"layer {page.layer}, {name}", stored, at_once(stored))
            weight = self._within(weights, page.layer, name)
            if not is_finite(weight, at_once(weight)):
                raise UsageError(
                    f"layer {page.layer}, {name} does not fit into {str(weight.dtype).removeprefix('torch.')}; "
                    "use --dtype bfloat16 or float32"
                )

    def _within(self, weights: Mapping[str, Tensor], layer: int, name: str) -> Tensor:
        """View the part of the bound weights that a stored tensor makes up."""
        parameter, place = self.skeleton.places[layer].get(name, (name, None))
        return weights[parameter] if place is None else weights[parameter][place]

    def _room(self, position: int, shape: torch.Size, buffer: Tensor | None) -> Tensor:
        if buffer is None:
            if self._buffer is None:
                elements = self.buffer_bytes // self.skeleton.dtype.itemsize
                self._buffer = torch.empty(elements, dtype=self.skeleton.dtype, device=self.skeleton.device)
            buffer = self._buffer
        return buffer[position : position + shape.numel()].view(shape)

    def _new_buffer(self, layer: int) -> Tensor:
        elements = sum(_aligned(shape.numel()) for shape in self.skeleton.shapes(layer).values())
        return torch.empty(elements, dtype=self.skeleton.dtype, device=self.skeleton.device)


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNED_ELEMENTS) * ALIGNED_ELEMENTS
