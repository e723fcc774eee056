"""Scoring of models that nobody has to have, on machines that are not there: what it takes, and what waits for what.

    python bench/clocked.py [--model llama-2-7b ...] [--card h100 ...] [--method taylor ...] [--json FILE]

Runs the scoring of each method by the virtual clock (virtual_clock.py) on checkpoints of headers alone, and prints its
seconds beside those of the busiest of link, disk and arithmetic. Sequences that are computed together are as many as
--tokens-at-once says, so that a run has fewer operations to look at.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import psutil
import torch
from clock_rates import Machine, machine
from plans import MODELS, write_headers
from virtual_clock import META, Clock, Sweep, running

from streamprune.config import PruneConfig
from streamprune.figures import table
from streamprune.methods.sinks import LayerScores, UnitScores, WeightPruner
from streamprune.methods.table import METHODS
from streamprune.pipeline.source import Source
from streamprune.planning.cards import CARDS
from streamprune.planning.decision import Plan, make_plan
from streamprune.planning.placement import Placement, choose_placement
from streamprune.planning.stage import Work
from streamprune.storage.tensor_store import make_store
from streamprune.streaming.pager import Pager, Turn
from streamprune.streaming.statistics import Statistics
from streamprune.streaming.sweeper import Sweeper, default_micro_batch

GIB = 1 << 30
HOST_MEMORY = 512 * GIB


@dataclass
class Clocked:
    """A run by the clock: seconds of its scoring, its sweeps, and what the main thread waited for."""

    seconds: float
    sweeps: list[Sweep]
    waits: dict[str, float]
    linked: dict[str, float]
    placement: Placement

    @property
    def bound(self) -> float:
        """Seconds below which nothing can bring the sweeps, one after another."""
        return sum(sweep.busy.bound for sweep in self.sweeps)


def score(
    path: Path,
    machine: Machine,
    method: str,
    *,
    gpu_memory: int,
    granularity: str = "units",
    warm: bool = False,
    again: bool = False,
    slots: int | None = None,
    change: Any = None,
    **options: Any,
) -> Clocked:
    """Score a checkpoint of headers by the clock.

    Args:
        gpu_memory: bytes. warm: the page cache holds the checkpoint before. again: the second time in a process.
        slots: layers on the device, where not as many as the plan says.
        options: of the `PruneConfig`.
    """
    given = {"gpu_memory": gpu_memory, "host_memory": HOST_MEMORY, "evaluate": False, "ratio": None, **options}
    given = {name: value for name, value in given.items() if value is not None}
    config = PruneConfig(str(path), Path("unused"), method, granularity=granularity, **given)
    clock = Clock(machine)
    with running(clock), opened(config) as (sweeper, plan, shape):
        placement = _settle(sweeper, config, plan, shape)
        sweeper.pager.slots = slots or sweeper.pager.slots
        ids = torch.zeros(shape, dtype=torch.int64) if shape else None
        if warm:
            clock.cached = _Everything()
        for _ in range(2 if again else 1):
            before, clock.sweeps = clock.world.now, []
            waits, linked = dict(clock.waits), dict(clock.linked)
            store = partial(make_store, journal=None, scratch=None, dtype=config.state_dtype)
            statistics = Statistics(sweeper, ids, plan.layers, config.seed, None, store)
            with _noting_sweeps(clock):
                METHODS[method].score(statistics, plan.settings, _sink(config, plan, sweeper))
                clock.synchronize()
        waits = {name: value - waits.get(name, 0) for name, value in clock.waits.items()}
        linked = {name: value - linked.get(name, 0) for name, value in clock.linked.items()}
        return Clocked(clock.world.now - before, clock.sweeps, waits, linked, placement)


class _Everything(set[Any]):
    def __contains__(self, item: object) -> bool:
        return True


@contextmanager
def opened(config: PruneConfig) -> Iterator[tuple[Sweeper, Plan, tuple[int, int] | None]]:
    """A sweeper whose model is on `meta`, the plan, and the shape of the method's text."""
    source = Source(config.model, planned=META, scope="units" if config.target == "units" else "matrices")
    with source.open() as sweeper:
        sweeper.skeleton.model.to(META).requires_grad_(False)
        plan = make_plan(config, sweeper.skeleton)
        samples, seq_len = METHODS[config.method].calibration
        shape = (config.samples or samples, config.seq_len or seq_len)
        yield sweeper, plan, shape if METHODS[config.method].needs_text else None


def _settle(sweeper: Sweeper, config: PruneConfig, plan: Plan, shape: tuple[int, int] | None) -> Placement:
    sweeper.micro_batch = config.micro_batch or default_micro_batch(shape[1] if shape else 128)
    found = choose_placement(sweeper, config, plan, Work(shape, None, None), baseline=0)
    sweeper.micro_batch, sweeper.pager.slots, sweeper.place = found.micro_batch, found.slots, found.place
    sweeper.pager.page_cache = HOST_MEMORY
    return found


def _sink(config: PruneConfig, plan: Plan, sweeper: Sweeper) -> Any:
    if config.target == "weights":
        assert plan.sparsity is not None
        return WeightPruner(plan.sparsity, lambda ref, stored, pruned: None)
    return (
        LayerScores(plan.layers) if config.target == "layers" else UnitScores(sweeper.skeleton.all_units(plan.layers))
    )


@contextmanager
def _noting_sweeps(clock: Clock) -> Iterator[None]:
    """Note what each pass over layers takes: up to where the next one begins, with what comes between them."""
    pages, notes = Pager.pages, list[tuple[int, Any]]()

    def noted(self: Pager, order: Sequence[int], then: Turn = "back") -> Any:
        notes.append((len(order), clock.busy()))
        return pages(self, order, then)

    Pager.pages = noted
    try:
        yield
    finally:
        Pager.pages = pages
    for (layers, begun), (_, ended) in zip(notes, [*notes[1:], (0, clock.busy())], strict=True):
        clock.sweeps.append(Sweep(layers, ended.since(begun)))
