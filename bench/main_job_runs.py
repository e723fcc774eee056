"""What a process of main_job.py measures of streamprune: scoring, the repair, forward passes; the link, and products.

A run is made ready as `prune` does it, on tokens that are given, and without the output.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timed import Figures, Run
from torch import Tensor

from streamprune.config import PruneConfig
from streamprune.kernels import add_product, gram
from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS
from streamprune.output.companions import Companions
from streamprune.paging.device import Device, is_gpu, limit_memory, paging_device, synchronize
from streamprune.pipeline.job import Job
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.rehearsal import compile_ahead
from streamprune.pipeline.run import _settle, _source
from streamprune.pipeline.source import Source
from streamprune.planning.decision import Plan, make_plan
from streamprune.planning.placement import Placement
from streamprune.planning.rates import assumed, seconds
from streamprune.planning.stage import Work
from streamprune.recovery.least_squares import compensate
from streamprune.streaming.sweeper import Sweeper, default_micro_batch

LINK_BYTES = 1 << 30  # of a copy
LINK_COPIES = 5
PRODUCT_TOKENS = 2048
WIDTHS = (4096, 11008)  # of hidden states and of channels
DRY_LINK_BYTES, DRY_TOKENS, DRY_WIDTHS = 1 << 20, 32, (64, 192)
CARD = "h100"  # whose rates foretell the seconds


class Waits(Progress):
    """Progress that says nothing, and adds up the seconds that sweeps waited for reads."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.waited = 0.0

    def advance(self, nbytes: int, **facts: Any) -> None:
        """As that of any progress."""
        self.waited += facts.get("waited", 0.0)


@dataclass(frozen=True)
class Prepared:
    """A run on an open model: what the plan says of it, and the run."""

    planned: Figures
    run: Run


@contextmanager
def _opened(config: PruneConfig, work: Work, stage: str) -> Iterator[tuple[Sweeper, Plan, Placement, Waits, Figures]]:
    """The model, placed and limited as in `prune`; `stage` is the one that is measured."""
    waits = Waits()
    with _source(config, waits) as sweeper:
        plan = make_plan(config, sweeper.skeleton)
        sweeper.micro_batch = default_micro_batch(128 if work.calibration is None else work.calibration[1])
        plan, placement = _settle(config, plan, sweeper, work)
        limit_memory(sweeper.skeleton.device, config.gpu_memory)
        compile_ahead(sweeper, config, plan, work)
        (found,) = (each for each in placement.stages if each.name.startswith(stage))
        planned = placement.device_bytes if is_gpu(sweeper.skeleton.device) else placement.host_bytes
        yield (
            sweeper,
            plan,
            placement,
            waits,
            {
                "planned": planned,
                "planned_host": placement.host_bytes,
                "planned_seconds": seconds(found, assumed(CARD)),
                "limit": config.gpu_memory,
                "up": found.up,
                "down": found.down,
                "flops": found.forward + found.backward,
                "place": placement.place,
                "kept": vars(placement.held),
                "micro_batch": placement.micro_batch,
            },
        )


@contextmanager
def score(config: PruneConfig, ids: Tensor) -> Iterator[Prepared]:
    """A method's scoring of units."""
    shape = (len(ids), ids.shape[1])
    with _opened(config, Work(shape, None, None), "scoring") as (sweeper, plan, placement, waits, planned):
        slots = placement.held.state_slots
        job = Job(config, plan, sweeper, waits, ids, None, Companions(Path(config.model)), state_slots=slots)
        yield Prepared(planned, partial(_score, job, waits))


def _score(job: Job, waits: Waits) -> Figures:
    """Score as `Job.score` does, with the memory that the state takes; hidden states stay for the next time."""
    waits.waited = 0.0
    statistics_of = job._statistics()
    scores = UnitScores(job.sweeper.skeleton.all_units(job.plan.layers), job.sweeper.backend)
    METHODS[job.config.method].score(statistics_of, job.plan.settings, scores)
    if job.sweeper.state is not None:
        job.sweeper.state.close()
        job.sweeper.state = None
    total = sum(float(values.sum()) for kinds in scores.values.values() for values in kinds.values())
    return {"sum": total, "waited": waits.waited}


@contextmanager
def repair(config: PruneConfig, ids: Tensor) -> Iterator[Prepared]:
    """The repair of a model whose units went at random; what is fitted goes to the host, and is not written."""
    shape = (len(ids), ids.shape[1])
    with _opened(config, Work(None, shape, None), "repairing") as (sweeper, plan, _, waits, planned):
        job = Job(config, plan, sweeper, waits, None, ids, Companions(Path(config.model)))
        kept = plan.choice.keep(job.score().values)
        assert plan.repair is not None, "it was asked for"

        def run() -> Figures:
            waits.waited, layers = 0.0, 0

            def write(page: Any, fitted: Any) -> None:
                nonlocal layers
                layers += 1
                for tensor in fitted.values():
                    tensor.cpu()

            compensate(
                sweeper,
                ids,
                kept,
                ridge=None,
                goal=plan.repair,
                micro_batch=default_micro_batch(shape[1]),
                write=write,
            )
            return {"layers": layers, "waited": waits.waited}

        yield Prepared(planned, run)


@contextmanager
def forward(path: Path, device: str, dtype: str, ids: Tensor, slots: int | None) -> Iterator[Prepared]:
    """A forward pass up to the last layer's output; None of `slots` for all layers."""
    waits, at_once = Waits(), default_micro_batch(ids.shape[1])
    with Source(str(path), device=device, dtype=dtype, micro_batch=at_once).open(waits) as sweeper:
        sweeper.pager.slots = slots or sweeper.n_layers

        def run() -> Figures:
            waits.waited = 0.0
            hidden = sweeper.forward(ids, then="again")
            return {"sum": float(hidden[0:1].float().abs().sum()), "waited": waits.waited}

        yield Prepared({"kept": {"slots": sweeper.pager.slots}}, run)


def rates(device: torch.device, *, dry: bool) -> Iterator[Figures]:
    """Rates of the link in bytes/s, then of the products that are summed in float32, in FLOP/s."""
    yield {"link": link(paging_device(device), DRY_LINK_BYTES if dry else LINK_BYTES)}
    yield {"products": products(device, dry=dry)}


def link(device: Device, nbytes: int) -> Figures:
    """Rates at which host memory is registered, and copied up, down, and both ways at the same time (each way's)."""
    start = time.perf_counter()
    arena, registered = device.arena(2 * nbytes)
    registering = 2 * nbytes / (time.perf_counter() - start)
    buffer, down = device.buffer(2 * nbytes), device.another()
    ways = [(device, buffer[:nbytes], arena[:nbytes]), (down, arena[nbytes:], buffer[nbytes:])]

    def copy(*chosen: tuple[Device, Tensor, Tensor]) -> float:
        """Rate of each of the copies that are queued together."""
        taken = []
        for _ in range(1 + LINK_COPIES):  # the first touches the memory
            begun = time.perf_counter()
            for by, event in [(by, by.copy(target, source)) for by, target, source in chosen]:
                by.chunk_free(event)
            taken.append(time.perf_counter() - begun)
        return nbytes / statistics.median(taken[1:])

    arena.zero_()
    found = {"up": copy(ways[0]), "down": copy(ways[1]), "both": copy(*ways)}
    device.release(arena)
    return {"registered": registered, "registering": registering, **found}


def products(device: torch.device, *, dry: bool) -> list[Figures]:
    """FLOP/s of Gram matrices and of a weight's gradient, each as it is made and in the way that it takes the place of.

    All are counted as the whole product, of which `gram` makes half.
    """
    from kernel_times import median_seconds

    tokens, widths = (DRY_TOKENS, DRY_WIDTHS) if dry else (PRODUCT_TOKENS, WIDTHS)
    generator, found = torch.Generator(device).manual_seed(0), list[Figures]()
    narrow, wide = (
        torch.randn((tokens, width), generator=generator, device=device).to(torch.bfloat16) for width in widths
    )

    def note(name: str, a: Tensor, b: Tensor, **ways: Callable[[Tensor], Any]) -> None:
        total, work = torch.zeros((a.shape[1], b.shape[1]), device=device), 2 * tokens * a.shape[1] * b.shape[1]
        for way, run in ways.items():
            taken = median_seconds(partial(run, total), device.type, 2 if dry else 20)
            found.append({"product": name, "shape": list(total.shape), "way": way, "flops": work / taken})

    for x in (narrow, wide):
        note(
            "Gram matrix",
            x,
            x,
            as_is=lambda total, x=x: gram(total, x),
            library=lambda total, x=x: add_product(total, x, x),
            widened=lambda total, x=x: total.addmm_(x.float().T, x.float()),
        )
    note(
        "weight gradient",
        wide,
        narrow,
        as_is=lambda total: add_product(total, wide, narrow),
        rounded=lambda total: total.add_((wide.T @ narrow).float()),
    )
    synchronize(device)
    return found
