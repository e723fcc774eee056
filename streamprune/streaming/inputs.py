"""Sums over the inputs of a layer's Linears: moments of each column, or the Gram matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from streamprune.kernels import gram, mirror
from streamprune.kernels.launch import Backend
from streamprune.streaming.watch import SeenEnough, watch_inputs


class Moments:
    """Moments of each column of a Linear's input over all tokens: Σx², the mean, and Σ(x − mean)² by Chan's update.

    They are [columns] in float32 (float64 for float64 inputs); `count` is the number of tokens. No kernel makes them,
    whatever `backend` is.
    """

    def __init__(self, columns: int, x: Tensor, backend: Backend | None = None) -> None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.count = 0
        self.squares, self.mean, self.deviations = torch.zeros(3, columns, dtype=dtype, device=x.device)

    def add(self, x: Tensor) -> None:
        """Take in tokens [tokens, columns]."""
        x, count = x.to(self.mean.dtype), len(x)
        # Not Σx² − count · mean², in which the two nearly cancel where a column hardly varies.
        squares, mean = x.square().sum(dim=0), x.mean(dim=0)
        shift, total = mean - self.mean, self.count + count
        deviations = (x - mean).square_().sum(dim=0)
        self.deviations += deviations + shift.square() * (self.count * count / total)
        self.mean += shift * (count / total)
        self.squares += squares
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Sample variance of each column."""
        return self.deviations / max(1, self.count - 1)


class Gram:
    """Gram matrix Σ x xᵀ [columns, columns] of a Linear's input over all tokens, float32 (float64 for float64 inputs).

    `factor` has room for what a method makes of it once for all matrices that share the input; `backend` is as in
    `gram`.
    """

    def __init__(self, columns: int, x: Tensor, backend: Backend | None = None) -> None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.count = 0
        self.total = torch.zeros(columns, columns, dtype=dtype, device=x.device)
        self.factor: Any = None
        self.backend = backend

    def add(self, x: Tensor) -> None:
        """Take in tokens [tokens, columns]."""
        gram(self._total, x, backend=self.backend)
        self.count, self._whole = self.count + len(x), False

    @property
    def total(self) -> Tensor:
        """Sum so far; whoever needs it no more may overwrite it."""
        if not self._whole:
            mirror(self._total)
            self._whole = True
        return self._total

    @total.setter
    def total(self, total: Tensor) -> None:
        self._total, self._whole = total, True


Sums = TypeVar("Sums", Moments, Gram)


class Inputs(Generic[Sums]):
    """Sums over the inputs of some Linears of a layer; those that are given the very same tensor share one.

    Attributes:
        sums: the sums by the tensors' names, after the layer has run.
    """

    def __init__(self, kind: type[Sums], tensors: Sequence[str], backend: Backend | None = None) -> None:
        self.kind: type[Sums] = kind
        self.backend = backend
        self.tensors = tensors
        self.sums: dict[str, Sums] = {}
        self._seen: list[tuple[Tensor, Sums]] = []
        self._awaited: set[str] | None = None

    @contextmanager
    def watching(self, layer: nn.Module, *, enough: bool = False) -> Iterator[None]:
        """Take in what the Linears are given while `layer` runs inside the block: one micro-batch.

        With `enough`, the pass ends where the last of them has been given its input, and so does the block.
        """
        self._awaited = set(self.tensors) if enough else None
        try:
            with watch_inputs(layer, {name: partial(self._take, name) for name in self.tensors}):
                yield
        finally:
            self._seen.clear()  # the next micro-batch has other tensors, and these would stay in memory

    def _take(self, name: str, given: Tensor) -> None:
        shared = next((sums for tensor, sums in self._seen if tensor is given), None)  # by q, k and v; gate and up
        if shared is not None:
            self.sums.setdefault(name, shared)
        else:
            x = given.detach().reshape(-1, given.shape[-1])
            if name not in self.sums:
                self.sums[name] = self.kind(x.shape[-1], x, self.backend)
            self.sums[name].add(x)
            self._seen.append((given, self.sums[name]))
        if self._awaited is not None:
            self._awaited.discard(name)
            if not self._awaited:
                raise SeenEnough
