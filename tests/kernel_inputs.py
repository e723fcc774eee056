"""Inputs of the kernels, the tolerance of their outputs, and the memory they ask for."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from streamprune.kernels.launch import triton

# Kernels run on a GPU where there is one, and in Triton's interpreter where there is none (conftest.py asks for it).
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(triton is None, reason="Triton is not installed")
BACKENDS = ("torch", pytest.param("triton", marks=needs_triton))

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


# A last place of bfloat16: Triton's interpreter cuts off where a GPU rounds.
BF16_STEP = 2**-7


def normal(shape, seed, scale=1.0, dtype=F64):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=F64) * scale).to(dtype)


def close(actual, expected, rtol, atol):
    torch.testing.assert_close(actual.double(), expected, rtol=rtol, atol=atol, check_dtype=False)


def largest_allocation(run):
    """Bytes of the largest block of memory that `run` asked torch's allocator for, inside operations too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        run()
    # The allocator's own events: an operation's memory in the tables is net of what it freed itself.
    events = profiled.profiler.kineto_results.events()
    return max((event.nbytes() for event in events if event.name() == "[memory]"), default=0)
