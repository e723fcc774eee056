"""Scoring of models that nobody has to have, on machines that are not there: what it takes, and what waits for what.

    python bench/clocked.py [--model llama-2-7b ...] [--card h100 ...] [--method taylor ...] [--json FILE]

Runs the scoring of each method by the virtual clock (virtual_clock.py) on checkpoints of headers alone, and prints its
seconds beside those of link, disks and arithmetic, and those that the host's memory takes to be pinned, once; without
those, as many times the busiest; and how many sweeps take longer than their busiest, a tenth, and one layer.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from clock import Clock, Sweep
from clock_rates import Machine, machine_of
from plans import MODELS, write_headers
from torch.utils._python_dispatch import _disable_current_modes
from virtual_clock import META, running

from streamprune.config import PruneConfig
from streamprune.errors import StreampruneError
from streamprune.figures import table
from streamprune.methods.sinks import LayerScores, UnitScores, WeightPruner
from streamprune.methods.table import METHODS
from streamprune.output.companions import Companions
from streamprune.paging.pager import Pager, Turn
from streamprune.pipeline.job import Job
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.source import Source
from streamprune.planning.cards import CARDS
from streamprune.planning.decision import Plan, make_plan
from streamprune.planning.placement import Placement, choose_placement
from streamprune.planning.stage import Kept, Work
from streamprune.storage.tensor_store import make_store
from streamprune.streaming.statistics import Statistics
from streamprune.streaming.sweeper import Sweeper, default_micro_batch

HOST_MEMORY = 1 << 40
NAMES = tuple(name for name in METHODS if name != "random")  # which reads nothing
SLACK = 1.10  # of a sweep over its busiest resource, beside one layer that nothing hides
# A run of a method, each of whose sweeps is as any of its others.
SHORTER: dict[str, dict[str, Any]] = {
    "smoothgrad": {"settings": {"draws": 3}},
    "moreau": {"settings": {"steps": 3}},
    "moreau-gs": {"settings": {"steps": 3}},
    "layer-ppl": {"granularity": "layers"},
    "block-influence": {"granularity": "layers"},
    "sparsegpt": {"granularity": "weights"},
}


@dataclass
class Clocked:
    """A run by the clock: seconds of its scoring, its sweeps, what the main thread waited for, bytes over the link."""

    seconds: float
    sweeps: list[Sweep]
    waits: dict[str, float]
    linked: dict[str, float]
    placement: Placement

    @property
    def bound(self) -> float:
        """Seconds below which nothing can bring the sweeps, one after another."""
        return sum(sweep.busy.bound for sweep in self.sweeps)

    @property
    def late(self) -> list[Sweep]:
        """Sweeps that take longer than their busiest resource, some slack, and one layer."""
        busy = [(each, each.busy) for each in self.sweeps]
        return [each for each, its in busy if its.elapsed - its.memory > SLACK * its.bound + each.one_layer]


def score(
    path: Path,
    machine: Machine,
    method: str,
    *,
    gpu_memory: int,
    warm: bool = False,
    again: bool = False,
    then: bool = False,
    held: Kept | None = None,
    at_once: int | None = None,
    **options: Any,
) -> Clocked:
    """Score a checkpoint of headers by the clock.

    Args:
        gpu_memory: bytes. warm: the page cache holds the checkpoint before. again: the second time in a process.
        then: as when an H100 was measured: what the method keeps lies in pageable memory, hidden states in memory that
            the driver takes before the sweep, and products of halves are rounded to half and widened.
        held: what stays on the device. at_once: sequences per layer call; where not as the plan says.
        options: of the `PruneConfig`.
    """
    given = {"gpu_memory": gpu_memory, "host_memory": HOST_MEMORY, "evaluate": False, **options}
    config = PruneConfig(str(path), Path("unused"), method, **given)
    clock = Clock(replace(machine, registering=machine.pinning) if then else machine)
    with running(clock, then=then), _opened(config) as (sweeper, plan, shape):
        placement = _settle(sweeper, config, plan, shape)
        held = held or placement.held
        sweeper.pager.slots, sweeper.graphs, clock.warm = held.slots, held.graphs, warm
        sweeper.micro_batch = at_once or placement.micro_batch
        ids = torch.zeros(shape, dtype=torch.int64) if shape else None
        for _ in range(2 if again else 1):
            begun, waits, linked, clock.sweeps = clock.world.now, dict(clock.waits), dict(clock.linked), []
            job = Job(config, plan, sweeper, Progress(), ids, None, Companions(path), state_slots=held.state_slots)
            job.state_scratch = config.scratch if placement.state == "scratch" else None
            # As a run has it, but for the writing.
            store = make_store if then else job._stores()
            statistics = Statistics(sweeper, ids, plan.layers, config.seed, None, store)
            with _noting_sweeps(clock):
                METHODS[method].score(statistics, plan.settings, _sink(config, plan, sweeper))
                clock.synchronize()
            if sweeper.state is not None:
                sweeper.state.close()
                sweeper.state = None
        waits = {name: value - waits.get(name, 0) for name, value in clock.waits.items()}
        linked = {name: value - linked.get(name, 0) for name, value in clock.linked.items()}
        return Clocked(clock.world.now - begun, clock.sweeps, waits, linked, placement)


def forward(
    path: Path, machine: Machine, shape: tuple[int, int], *, slots: int, at_once: int = 1, warm: bool = False
) -> Clocked:
    """Make a forward pass over sequences by the clock, the second time in a process."""
    config = PruneConfig(str(path), Path("unused"), "taylor", samples=shape[0], seq_len=shape[1], evaluate=False)
    clock = Clock(machine)
    with running(clock), _opened(config) as (sweeper, plan, _):
        config_of_slots = {"gpu_memory": 1 << 40, "host_memory": HOST_MEMORY}
        placement = _settle(sweeper, PruneConfig(**vars(config) | config_of_slots), plan, shape)
        sweeper.pager.slots, sweeper.micro_batch, clock.warm = slots, at_once, warm
        for _ in range(2):
            begun, clock.sweeps = clock.world.now, []
            with _noting_sweeps(clock):
                sweeper.forward(torch.zeros(shape, dtype=torch.int64))
                clock.synchronize()
        return Clocked(clock.world.now - begun, clock.sweeps, dict(clock.waits), dict(clock.linked), placement)


@contextmanager
def _opened(config: PruneConfig) -> Iterator[tuple[Sweeper, Plan, tuple[int, int] | None]]:
    """A sweeper whose model is on `meta`, the plan, and the shape of the method's text."""
    source = Source(config.model, planned=META, scope="units" if config.target == "units" else "matrices")
    with source.open() as sweeper:
        sweeper.skeleton.model.to(META).requires_grad_(False)
        row = METHODS[config.method]
        with _disable_current_modes():  # a plan is made of numbers that are there
            plan = make_plan(config, sweeper.skeleton)
        samples, seq_len = row.calibration
        yield sweeper, plan, (config.samples or samples, config.seq_len or seq_len) if row.needs_text else None


def _settle(sweeper: Sweeper, config: PruneConfig, plan: Plan, shape: tuple[int, int] | None) -> Placement:
    sweeper.micro_batch = config.micro_batch or default_micro_batch(shape[1] if shape else 128)
    with _disable_current_modes():  # a plan runs a layer too, for what is saved of it, which takes none of the time
        found = choose_placement(sweeper, config, plan, Work(shape, None, None), baseline=0, memory=HOST_MEMORY)
    sweeper.micro_batch, sweeper.place, sweeper.scratch = found.micro_batch, found.place, found.scratch
    sweeper.pager.page_cache = found.page_cache
    return found


def _sink(config: PruneConfig, plan: Plan, sweeper: Sweeper) -> Any:
    if config.target == "weights":
        assert plan.sparsity is not None
        return WeightPruner(plan.sparsity, lambda ref, stored, pruned: None)
    if config.target == "layers":
        return LayerScores(plan.layers)
    return UnitScores(sweeper.skeleton.all_units(plan.layers))


@contextmanager
def _noting_sweeps(clock: Clock) -> Iterator[None]:
    """Note what each pass over layers takes: up to where the next one begins, with what comes between them."""
    pages, notes = Pager.pages, list[tuple[int, Any]]()

    def noted(self: Pager, order: Sequence[int], then: Turn = "back") -> Any:
        notes.append((len(order), clock.busy()))
        return pages(self, order, then)

    setattr(Pager, "pages", noted)  # noqa: B010
    try:
        yield
    finally:
        setattr(Pager, "pages", pages)  # noqa: B010
    for (layers, begun), (_, ended) in zip(notes, [*notes[1:], (0, clock.busy())], strict=True):
        clock.sweeps.append(Sweep(layers, ended.since(begun)))


@click.command()
@click.option("--model", "models", type=click.Choice(list(MODELS)), multiple=True, default=tuple(MODELS)[:3])
@click.option("--card", "cards", type=click.Choice(list(CARDS)), multiple=True, default=tuple(CARDS))
@click.option("--method", "methods", type=click.Choice(list(METHODS)), multiple=True, default=NAMES)
@click.option("--tokens", default=65536, show_default=True, help="Computed at once: more of them, fewer operations.")
@click.option("--warm", is_flag=True, help="The page cache holds the checkpoint.")
@click.option("--gpu-memory", type=int, help="GiB; by default the card's.")
@click.option("--host-memory", type=int, help="GiB; what does not fit goes to a scratch disk of its own.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(
    models: Sequence[str],
    cards: Sequence[str],
    methods: Sequence[str],
    tokens: int,
    warm: bool,
    gpu_memory: int | None,
    host_memory: int | None,
    json_file: Path | None,
) -> None:
    """Run, print the table, and write JSON."""
    parts_of = {"up": "up", "down": "down", "disk": "disk", "scratch": "scratch", "arithmetic": "compute"}
    rows = [["model", "card", "method", "seconds", *parts_of, "memory", "ratio", "late"]]
    figures, spill = [], dict[str, Any]()
    if host_memory is not None:
        spill = {"host_memory": host_memory << 30, "scratch": Path("unused")}
    with tempfile.TemporaryDirectory() as directory:
        for model in models:
            write_headers(Path(directory) / model, MODELS[model])
        for model, card, method in ((m, c, each) for m in models for c in cards for each in methods):
            at_once = max(1, tokens // METHODS[method].calibration[1])
            run = {"gpu_memory": (gpu_memory or CARDS[card].gib) << 30, "warm": warm, "at_once": at_once}
            run |= SHORTER.get(method, {}) | spill
            try:
                found = score(Path(directory) / model, machine_of(card), method, **run)
            except StreampruneError as error:
                click.echo(f"{model} {card} {method}: {error}", err=True)
                continue
            parts = [sum(getattr(each.busy, name) for each in found.sweeps) for name in parts_of.values()]
            parts.append(found.waits["memory"])
            cells = [f"{found.seconds:.2f}", *(f"{part:.2f}" for part in parts)]
            cells.append(f"{(found.seconds - parts[-1]) / found.bound:.2f}")
            rows.append([model, card, method, *cells, f"{len(found.late)} of {len(found.sweeps)}"])
            sweeps = [asdict(sweep) for sweep in found.sweeps]
            said = {"model": model, "card": card, "method": method, "seconds": found.seconds}
            figures.append({**said, "waits": found.waits, "linked": found.linked, "sweeps": sweeps})
            click.echo(" ".join(rows[-1]), err=True)
    print(table(rows, markdown=True))
    if json_file:
        json_file.write_text(json.dumps({"tokens": tokens, "warm": warm, "figures": figures}, indent=1) + "\n")


if __name__ == "__main__":
    main()
