"""Hooks that show the inputs and outputs of a layer's Linears, for as long as a block runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from streamprune.model.units import module_of

SeeInput = Callable[[Tensor], Tensor | None]


class SeenEnough(Exception):
    """Signal of a watcher that has seen all it wants: what comes after it in the layer is not computed."""


@contextmanager
def watch_inputs(layer: nn.Module, see: Mapping[str, SeeInput]) -> Iterator[None]:
    """Show each Linear's input [..., d_in] before it is run, to the function by its weight's name inside the layer.

    The Linear is given what the function returns, where that is not None.
    A pass in the block ends, and the block with it, where one of them raises `SeenEnough`.
    """

    def before(show: SeeInput) -> Callable[..., Tensor | None]:
        return lambda module, given: show(given[0])

    with _hooks([_module(layer, name).register_forward_pre_hook(before(show)) for name, show in see.items()]):
        yield


@contextmanager
def watch_ends(layer: nn.Module, see: Mapping[str, Callable[[Tensor, Tensor], None]]) -> Iterator[None]:
    """Show each Linear's input [..., d_in] and output [..., d_out] after it was run, by its weight's name."""

    def after(show: Callable[[Tensor, Tensor], None]) -> Callable[..., None]:
        return lambda module, given, made: show(given[0], made)

    with _hooks([_module(layer, name).register_forward_hook(after(show)) for name, show in see.items()]):
        yield


def _module(layer: nn.Module, weight: str) -> nn.Module:
    return layer.get_submodule(module_of(weight))


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    except SeenEnough as enough:
        # From Python 3.12 on it would be a cycle: a frame of its traceback leads to one that holds the exception, and
        # the layer's activations stay until the collector comes.
        enough.__traceback__ = None
    finally:
        for handle in handles:
            handle.remove()
