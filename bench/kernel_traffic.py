"""Bytes that each kernel loads and stores, counted in Triton's interpreter, beside those of plain torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from kernel_cases import cases
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

SIZE = (512, 2048)  # hidden and intermediate: large enough for what a program adds at its edges to vanish


@contextmanager
def counted() -> Iterator[dict[int, int]]:
    """Bytes loaded and stored by kernels in the block, by the bytes of an element. Masked lanes move nothing."""
    moved: dict[int, int] = {}
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(pointers: Any, mask: Any) -> None:
        size = pointers.get_element_ty().primitive_bitwidth // 8
        moved[size] = moved.get(size, 0) + size * int(mask.data.sum())

    def counting_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return load(pointers, mask, *rest)

    def counting_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask)
        return store(pointers, value, mask, *rest)

    builder.create_masked_load, builder.create_masked_store = counting_load, counting_store
    try:
        yield moved
    finally:
        del builder.create_masked_load, builder.create_masked_store


class _EagerBytes(TorchDispatchMode):
    """Adds what every operation reads and writes, as if each were a kernel of its own (so they are in eager mode)."""

    def __init__(self) -> None:
        super().__init__()
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            # An operation in place returns its argument: it is read and written, and counts twice.
            self.moved += sum(t.numel() * t.element_size() for t in [*read, *written])
        return result


def eager_bytes(run: Any) -> int:
    """Bytes that the operations of `run` read and write."""
    with _EagerBytes() as mode:
        run()
    return mode.moved


def traffic() -> tuple[list[list[str]], list[dict[str, Any]]]:
    """A row per kernel: least bytes per element, counted bytes, their ratio, and those of eager torch.

    A matrix product reads its operands once per tile, mostly from the cache; there the accumulator is compared, and
    the operands stand beside it.
    """
    rows = [["kernel", "least B/element", "counted", "ratio", "of operands again", "eager torch"]]
    figures = []
    for case in cases():
        operands = case.operands(SIZE, "cpu")
        elements = operands.rows * operands.columns
        made = case.make(operands)
        with counted() as moved:
            made.launch.run()
        product = case.name.startswith("grad_norm")
        again = moved.pop(2) / elements if product else 0.0
        own = sum(moved.values()) / elements
        eager = eager_bytes(made.naive) / elements
        figures.append(
            {"kernel": case.name, "minimum": case.minimum, "counted": own, "operands": again, "eager": eager}
        )
        again_cell = f"{again:.1f}" if product else "-"
        rows.append(
            [case.name, f"{case.minimum:.0f}", f"{own:.3f}", f"{own / case.minimum:.3f}", again_cell, f"{eager:.1f}"]
        )
    return rows, figures
