"""Starts of Triton kernels, as descriptions. This is the only file that knows that Triton may be absent.

An op describes a start as a `Launch`; the same description runs on a GPU, in Triton's interpreter, and through the
ahead-of-time compiler (bench/kernels.py), and with tensors on `meta` the kernel is compiled and not started. Choices of
block and warps follow from the shape alone: nothing is tuned at run time, since another block size changes the order of
a sum, and a resumed run would prune other units.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Backend = Literal["torch", "triton"]

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU needs no Triton
    triton = tl = None

MOST_COMPILERS = 8  # threads; a method has no more kernels than some twenty
HOLDS_FUTURES = (3, 7)  # Triton's version from which a start finds a kernel that is being compiled, and waits for it


class KernelFailure(RuntimeError):
    """Kernel that cannot be compiled for the device, or not be started on it: its name, and the cause's first line."""


def jit(kernel: Callable[..., None] | None = None, **options: Any) -> Any:
    """Compile a kernel with `triton.jit`; where Triton is absent return it as it is, which nobody then calls."""
    if triton is None:
        return kernel if kernel is not None else lambda fn: fn
    return triton.jit(kernel, **options)


def use_triton(tensor: Tensor, backend: Backend | None) -> bool:
    """Tell whether an op on `tensor` runs its kernel: on a GPU where Triton is installed, or as `backend` says.

    On `meta`, where nothing runs, it does what it would do on a GPU. float64 has no kernels, whatever `backend` says.
    The interpreter runs kernels on CPU tensors (TRITON_INTERPRET=1 before the first import).

    Raises:
        RuntimeError: `backend` is "triton" and Triton is absent.
    """
    if backend == "triton" and triton is None:
        raise RuntimeError("Triton is not installed; pip install triton, or leave the backend to the device")
    if tensor.dtype == torch.float64:
        return False
    if backend is not None:
        return backend == "triton"
    return triton is not None and (tensor.is_cuda or tensor.is_meta)


def has_triton() -> bool:
    """Tell whether Triton is installed."""
    return triton is not None


def interpreted() -> bool:
    """Tell whether kernels run in Triton's interpreter, that is on a CPU, for tests."""
    return triton is not None and triton.knobs.runtime.interpret


@dataclass(frozen=True)
class Launch:
    """Description of one start of a kernel.

    Attributes:
        kernel: a function under `jit`.
        grid: programs along up to three axes.
        arguments: tensors and numbers, by the kernel's parameter names.
        constants: its constexpr parameters.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler, by name. Fusion into multiply-adds is said outright: Triton's default changes."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def run(self) -> None:
        """Start the kernel on the device of its first tensor, without waiting for its end; on `meta` compile it only.

        Raises:
            KernelFailure: it cannot be compiled, or not be started.
        """
        first = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        named = {**self.arguments, **self.constants, **self.options}
        if first.is_meta:
            self.kernel.warmup(**named, grid=self.grid)
            return
        # Triton starts on the current device, which need not be that of the tensors where there are several.
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            try:
                self.kernel[self.grid](**named)
            except Exception as error:
                raise KernelFailure(f"the kernel {self.kernel.__name__} does not run here: {_cause(error)}") from error


def _cause(error: Exception) -> str:
    """Return the first line of what went wrong; Triton's own begins with where in the source it was."""
    lines = str(getattr(error, "error_message", None) or error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def compiling(device: torch.device) -> Iterator[None]:
    """Let kernels that are started on `meta` inside the block be compiled for a GPU, in threads, until all are.

    Whoever starts one of them meanwhile waits for that one alone, and learns of it if it does not compile; with a
    Triton before HOLDS_FUTURES, compiles it once more.
    """
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    threads = ThreadPoolExecutor(min(MOST_COMPILERS, os.cpu_count() or 1), thread_name_prefix="streamprune-compile")
    with threads, on_device, triton.AsyncCompileMode(threads, ignore_errors=True) as submitted:
        try:
            yield
        finally:
            # Triton would take the results here too, and its futures bear one taker: who starts the kernel. Where no
            # start finds a future, that one is Triton.
            if _version() >= HOLDS_FUTURES:
                submitted.raw_futures.clear()


def _version() -> tuple[int, ...]:
    """Return Triton's, to the second number."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2])


def most_warps() -> int:
    """Number of warps that a program may have: 1024 threads, of 32 to a warp, or of 64 on an AMD card."""
    return 16 if torch.version.hip else 32


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below `n`."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)
