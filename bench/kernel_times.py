"""Times of the kernels: the torch side on a CPU, the Triton side on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from kernel_cases import SAMPLES, SIZES, TOKENS, cases
from torch.utils import benchmark

REPEAT = 5
COPY_BYTES = 1 << 30
CACHE_BYTES = 1 << 28  # written between two runs on a GPU, so that neither finds its operands in the cache
DRY_SIZE = (64, 192)


def cpu(options: dict[str, Any]) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """A row per op and number of threads: the torch side against the plain expression, in turn, medians."""
    size, repeat = (DRY_SIZE, 2) if options["dry"] else (SIZES[options["model"]], REPEAT)
    rows = [["op", "threads", "ms", "plain torch, ms", "ratio"]]
    figures = []
    for case in cases():
        operands = case.operands(size, "cpu")
        made = case.make(operands)
        for threads in sorted({1, torch.get_num_threads()}):
            timers = [
                benchmark.Timer("run()", globals={"run": run}, num_threads=threads) for run in (made.op, made.naive)
            ]
            times: list[list[float]] = [[], []]
            for _ in range(repeat):
                for timer, taken in zip(timers, times, strict=True):
                    taken.append(timer.timeit(1).median)
            mine, plain = map(statistics.median, times)
            figures.append({"op": case.name, "threads": threads, "seconds": mine, "plain": plain})
            rows.append([case.name, str(threads), f"{mine * 1e3:.2f}", f"{plain * 1e3:.2f}", f"{mine / plain:.2f}"])
    return rows, figures


def median_seconds(run: Callable[[], Any], device: str, repeat: int) -> float:
    """Median time of `run`, by events on a GPU."""
    run()
    if device == "cpu":
        taken = []
        for _ in range(repeat):
            start = time.perf_counter()
            run()
            taken.append(time.perf_counter() - start)
        return statistics.median(taken)
    flush = torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeat)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) / 1e3 for start, end in events)


def gpu(options: dict[str, Any]) -> tuple[list[list[str]], list[dict[str, Any]]]:
    """A row per kernel: its rate, and how fast it is beside a device copy or the cuBLAS product of the same run.

    `gram` stands beside the whole product, of which it makes half.
    """
    dry = options["dry"]
    device, repeat = ("cpu", 2) if dry else ("cuda", 20)
    size = DRY_SIZE if dry else SIZES[options["model"]]
    source = torch.empty(1 << 20 if dry else COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy_rate = 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeat)
    rows = [["kernel", "ms", "rate", "of copy or cuBLAS", "wanted"]]
    figures = []
    for case in cases():
        operands = case.operands(size, device)
        made, elements = case.make(operands), case.elements(operands)
        seconds = median_seconds(made.launch.run, device, repeat)
        if made.library is not None:
            rate, unit = 2 * SAMPLES * TOKENS * elements / seconds, "TFLOP/s"
            share = median_seconds(made.library, device, repeat) / seconds
        else:
            rate, unit = case.minimum * elements / seconds, "GB/s"
            share = rate / copy_rate
        shown = rate / (1e12 if unit == "TFLOP/s" else 1e9)
        figures.append({"kernel": case.name, "seconds": seconds, "rate": rate, "unit": unit, "share": share})
        verdict = "-"
        if case.wanted is not None:
            verdict = f"{case.wanted:.0%}: {'met' if share >= case.wanted else 'MISSED'}"
        rows.append([case.name, f"{seconds * 1e3:.3f}", f"{shown:.1f} {unit}", f"{share:.0%}", verdict])
    return rows, figures


def shares(options: dict[str, Any]) -> tuple[list[list[str]], dict[str, float]]:
    """How the seconds of two moreau-gs updates on the demo's model are spent; the second one has a δ.

    Binding a layer is widening and perturbing its weights; the rest is the layers' own forwards and backwards, the
    head, and waiting for the disk.
    """
    from streamprune.commands import demo
    from streamprune.methods import gradient, sinks
    from streamprune.methods.sinks import UnitScores
    from streamprune.methods.table import METHODS, resolve_settings
    from streamprune.pipeline.progress import Progress
    from streamprune.pipeline.source import Source
    from streamprune.planning.rates import default_cache
    from streamprune.streaming import binder
    from streamprune.streaming.statistics import Statistics
    from streamprune.streaming.sweeper import default_micro_batch

    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

        return run

    watched = ((binder.Binder, "bind"), (gradient, "moreau_step"), (sinks, "unit_score"))
    originals = [getattr(owner, name) for owner, name in watched]
    model = demo.fetch(default_cache(), Progress())
    with Source(str(model), device="cpu", micro_batch=default_micro_batch(TOKENS)).open() as sweeper:
        ids = torch.randint(0, sweeper.skeleton.config.vocab_size, (SAMPLES, TOKENS))
        layers = range(4, sweeper.n_layers - 2)
        for (owner, name), original in zip(watched, originals, strict=True):
            setattr(owner, name, timed(name, original))
        try:
            start = time.perf_counter()
            settings = resolve_settings("moreau-gs", {"steps": 2})
            statistics = Statistics(sweeper, ids, layers, 0)
            METHODS["moreau-gs"].score(
                statistics, settings, UnitScores(statistics.sweeper.skeleton.all_units(statistics.layers))
            )
            total = time.perf_counter() - start
        finally:
            for (owner, name), original in zip(watched, originals, strict=True):
                setattr(owner, name, original)
    seconds["everything else"] = total - sum(seconds.values())
    rows = [["part of two moreau-gs updates", "seconds", "share"]]
    rows += [[name, f"{value:.2f}", f"{value / total:.1%}"] for name, value in seconds.items()]
    return rows, seconds
