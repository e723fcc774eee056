"""Starts of Triton kernels, as descriptions. This is the only file that knows that Triton may be absent.

An op describes a start as a `Launch`; the same description runs on a GPU, in Triton's interpreter, and through the
ahead-of-time compiler (bench/kernels.py). Choices of block and warps follow from the shape alone: nothing is tuned
at run time, since another block size changes the order of a sum, and a resumed run would prune other units.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
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


def jit(kernel: Callable[..., None] | None = None, **options: Any) -> Any:
    """Compile a kernel with `triton.jit`; where Triton is absent return it as it is, which nobody then calls."""
    if triton is None:
        return kernel if kernel is not None else lambda fn: fn
    return triton.jit(kernel, **options)


def use_triton(tensor: Tensor, backend: Backend | None) -> bool:
    """Tell whether an op on `tensor` runs its kernel: on a GPU where Triton is installed, or as `backend` says.

    float64 has no kernels, whatever `backend` says. The interpreter runs kernels on CPU tensors (TRITON_INTERPRET=1
    before the first import).

    Raises:
        RuntimeError: `backend` is "triton" and Triton is absent.
    """
    if backend == "triton" and triton is None:
        raise RuntimeError("Triton is not installed; pip install triton, or leave the backend to the device")
    if tensor.dtype == torch.float64:
        return False
    return backend == "triton" if backend is not None else triton is not None and tensor.is_cuda


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
        """Start the kernel on the device of its first tensor, without waiting for its end."""
        first = next(value for value in self.arguments.values() if isinstance(value, Tensor))
        # Triton starts on the current device, which need not be that of the tensors where there are several.
        with torch.cuda.device(first.device) if first.is_cuda else nullcontext():
            self.kernel[self.grid](**self.arguments, **self.constants, **self.options)


def most_warps() -> int:
    """Number of warps that a program may have: 1024 threads, of 32 to a warp, or of 64 on an AMD card."""
    return 16 if torch.version.hip else 32


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is not below `n`."""
    return 1 << max(0, n - 1).bit_length()


def ceil_div(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)
