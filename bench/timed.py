"""Figures of a run that a process makes several times: the first time apart from the others, its peaks, its profile."""

from __future__ import annotations

import importlib
import pkgutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from streamprune import kernels
from streamprune.figures import peak_rss
from streamprune.paging.device import synchronize

Figures = dict[str, Any]
Run = Callable[[], Figures]
TOP = 15  # operations of a profile
NAME = 160  # characters of theirs: a template of C++ has thousands


def timed(run: Run, device: torch.device, again: int = 1) -> Iterator[Figures]:
    """Yield the figures of the first run of a process, then of the median of `again` more; `run` gives its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken, found = seconds_of(run, device)
    yield {"first": taken, **found, **peaks(device)}
    others = [seconds_of(run, device) for _ in range(again)]
    yield {"second": statistics.median(taken for taken, _ in others), **others[-1][1], **peaks(device)}


def seconds_of(run: Run, device: torch.device) -> tuple[float, Figures]:
    """Wall time of a run, the device's work included, and what it gives."""
    synchronize(device)
    start = time.perf_counter()
    found = run()
    synchronize(device)
    return time.perf_counter() - start, found


def peaks(device: torch.device) -> Figures:
    """Bytes of tensors at the most, and of what the allocator held for them; on a CPU both are the process's."""
    rss = peak_rss()
    if device.type == "cpu":
        return {"peak": rss, "reserved": rss, "peak_rss": rss}
    return {
        "peak": torch.cuda.max_memory_allocated(),
        "reserved": torch.cuda.max_memory_reserved(),
        "peak_rss": rss,
    }


def profiled(run: Run, device: torch.device) -> Figures:
    """Profile a run: what the GPU did (on a CPU torch's operations, each with those inside it), and for how long.

    `own` is the part of our kernels in the device's seconds, but for grad_norm, which does the work of a product.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
        wall, _ = seconds_of(run, device)
    # The events as they were recorded: torch's tables of hundreds of thousands of them take a minute.
    results = found.profiler.kineto_results.events()
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    events = [(e.name(), e.start_ns(), e.duration_ns()) for e in results if e.device_type() == wanted]
    if not events:
        raise SystemExit(f"the profiler has recorded nothing of {device}")
    totals: dict[str, list[int]] = {}
    for name, _, duration in events:
        each = totals.setdefault(name, [0, 0])
        each[0] += duration
        each[1] += 1
    total = sum(duration for duration, _ in totals.values())
    own = sum(totals[name][0] for name in own_kernels() & totals.keys() if name != "grad_norm_kernel")
    top = sorted(totals.items(), key=lambda item: -item[1][0])[:TOP]
    return {
        "wall": wall,
        "busy": busy([(start, duration) for _, start, duration in events]) / 1e9,
        "own": own / total,
        "top": [
            {"name": name[:NAME], "seconds": nanoseconds / 1e9, "calls": calls, "share": nanoseconds / total}
            for name, (nanoseconds, calls) in top
        ],
    }


def busy(spans: Sequence[tuple[int, int]]) -> int:
    """Time in which at least one of (start, duration) goes on."""
    total = end = 0
    for start, duration in sorted(spans):
        total += max(0, start + duration - max(start, end))
        end = max(end, start + duration)
    return total


def own_kernels() -> set[str]:
    """Names of the kernels in kernels/src."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{each.name}") for each in pkgutil.iter_modules(kernels.__path__)
    ]
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}
