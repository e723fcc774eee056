"""Bytes that each kernel loads and stores, counted in Triton's interpreter, beside those of plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from kernel_cases import cases
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime import interpreter

# Hidden and intermediate size: whole blocks of every kernel, so that nothing is added at edges.
SIZE, DRY_SIZE = (256, 512), (64, 256)


@contextmanager
def counted(tensors: Mapping[str, Tensor]) -> Iterator[dict[str, int]]:
    """Bytes that kernels in the block load from and store to each of `tensors`. Masked lanes move nothing."""
    moved = dict.fromkeys(tensors, 0)
    builder = interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def count(pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data]
        left = addresses.size
        for name, tensor in tensors.items():
            begin = tensor.data_ptr()
            hits = int(((addresses >= begin) & (addresses < begin + tensor.nbytes)).sum())
            moved[name] += hits * tensor.element_size()
            left -= hits
        if left:
            raise SystemExit(f"{left} accesses outside of all operands")

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


def traffic(*, dry: bool = False) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """A row per kernel: least bytes per element, counted bytes, their ratio, and those of eager torch.

    What is not of the matrix's shape (‖X‖, and X and dY of a product) is read by many programs, from the cache but for
    the first time: that once belongs to the least, and the repeats stand beside.
    """
    rows = [["kernel", "least B/element", "counted", "ratio", "again, from the cache", "eager torch"]]
    figures = []
    for case in cases():
        operands = case.operands(DRY_SIZE if dry else SIZE, "cpu")
        elements = case.elements(operands)
        made = case.make(operands)
        # An operand that a form does not use is given as another one; each is counted under its first name.
        tensors = {id(t): (name, t) for name, t in reversed(made.launch.arguments.items()) if isinstance(t, Tensor)}
        named = dict(tensors.values())
        with counted(named) as moved:
            made.launch.run()
        small = [name for name, tensor in named.items() if tensor.shape != (operands.rows, operands.columns)]
        once = sum(named[name].nbytes for name in small if moved[name])
        again = sum(max(0, moved[name] - named[name].nbytes) for name in small) / elements
        minimum = case.minimum + once / elements
        own = sum(moved.values()) / elements - again
        eager = eager_bytes(made.naive) / elements
        figures.append({"kernel": case.name, "minimum": minimum, "counted": own, "again": again, "eager": eager})
        again_cell = f"{again:.1f}" if again else "-"
        rows.append([case.name, f"{minimum:.2f}", f"{own:.2f}", f"{own / minimum:.3f}", again_cell, f"{eager:.1f}"])
    return rows, figures
