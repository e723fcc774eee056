"""Placement of hidden states and layers in a run, so that it fits into its budget and reads least."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from streamprune.config import PruneConfig
from streamprune.errors import StreampruneError, UsageError
from streamprune.figures import human, table
from streamprune.methods.table import METHODS
from streamprune.paging.device import free_memory, is_gpu
from streamprune.paging.hidden_states import Place
from streamprune.paging.pager import Turn
from streamprune.paging.state import STATE_SLOTS
from streamprune.planning.decision import Plan
from streamprune.planning.footprint import stages
from streamprune.planning.rates import DISK, Rates, seconds
from streamprune.planning.refusal import refusal
from streamprune.planning.stage import Kept, Stage, Work
from streamprune.recovery.options import RecoverConfig
from streamprune.streaming.costs import Sizes
from streamprune.streaming.sweeper import Sweeper

MARGIN = 0.05  # of what tensors may take, for holes in the heap
# What tensors leave between them in a CPU's heap at the most, where they are too small for pages of their own: as much
# as they are, and no more than this; measured with models of 20 to 540 MB.
HOLES = 128 << 20
DRIFT = 32 << 20  # what the same process takes before its first tensor, more or less from run to run
GPU_SHARE = 0.9  # of what is free, where no budget is given
CACHE_SHARE = 0.8  # of the memory that a run leaves free, for layers in the page cache
# What placements are compared by beside DISK, whatever is there: bytes/s of a link of PCIe 4.0.
LINK = 25e9
# Operations/s at which updates of a policy are taken to be computed, by kind of device, whatever is there: what is
# learnt depends on how many share a pass.
GPU_FLOPS, CPU_FLOPS = 100e12, 0.1e12
MOST_UPDATES = 16  # that share a pass by themselves


@dataclass(frozen=True)
class Placement:
    """Places where things stay in a run.

    Attributes:
        held: what stays beyond what has to. place: where hidden states stay. state: what the method keeps does.
        scratch: directory of what goes to a disk. micro_batch: sequences per layer call. stages: what each takes.
        device_bytes, host_bytes: the peaks; beside a CPU the first is 0.
        page_cache: bytes of the page cache that layers may take.
        halved: the micro-batch is smaller than by default, so sums differ in their last bits.
    """

    held: Kept
    place: Place
    state: Place
    scratch: Path | None
    micro_batch: int
    stages: Sequence[Stage]
    device_bytes: int
    host_bytes: int
    page_cache: int
    halved: bool = False


def choose_placement(
    sweeper: Sweeper, config: PruneConfig, plan: Plan, work: Work, *, baseline: int, memory: int
) -> Placement:
    """Choose the placement that waits least for what is read and moved, within the budget.

    Args:
        baseline: bytes of the process without any tensors of the model.
        memory: bytes that the process and the page cache have together.

    Raises:
        StreampruneError: nothing fits; it names the smallest budget that would do.
    """
    gpu = is_gpu(sweeper.skeleton.device)
    limits, room = memory_limits(config, sweeper, baseline, memory)
    sizes, needed = Sizes(sweeper), list[tuple[tuple[int, int], Sequence[Stage]]]()

    def left(host: int) -> int:
        """Return the bytes that the page cache has for layers beside `host` bytes of tensors."""
        free = memory - baseline - host - holes(host, gpu)
        return max(0, int(CACHE_SHARE * free)) if config.reader == "buffered" else 0

    # Smaller micro-batches come last: sums differ by them in their last bits, by where things stay they do not.
    for micro_batch in _micro_batches(config, sweeper.micro_batch):
        options = [
            (stages(sizes, config, plan, work, where, state, micro_batch, _least(gpu)), where, state)
            for where in places(config, gpu)
            for state in _state_places(config, plan, gpu)
        ]
        # What spills least first.
        options.sort(key=lambda option: max(stage.scratch for stage in option[0]))
        for found, where, state in options:
            device, host = _peaks(found, gpu)
            needed.append(((device, host), found))
            if device > room[0] or host > room[1]:
                continue
            make = partial(stages, sizes, config, plan, work, where, state, micro_batch)
            held, found = _keep(sweeper, config, plan, make, room[0] if gpu else room[1], left)
            device, host = _with_slots(sweeper, found, held)
            halved = config.micro_batch is None and micro_batch < sweeper.micro_batch
            peaks = (device, baseline + host + holes(host, gpu), left(host))
            return Placement(held, where, state, config.scratch, micro_batch, found, *peaks, halved)

    def lacks(each: tuple[tuple[int, int], Sequence[Stage]]) -> tuple[int, int]:
        (device, host), _ = each
        return max(0, device - room[0]) + max(0, host - room[1]), device + host

    smallest, made_of = min(needed, key=lacks)
    budgets = int(smallest[0] / (1 - MARGIN)) + 2**20, budget_of(smallest[1], gpu) + baseline + DRIFT
    lacking = smallest[0] > room[0]
    raise StreampruneError(refusal(config, plan, made_of, budgets, limits, gpu=gpu, on_device=lacking))


def updates_per_pass(placement: Placement, steps: int, gpu: bool) -> int:
    """Count the updates of a policy that should share a pass: as many as compute for as long as it reads.

    Args:
        placement: of a run in which each has a pass for itself. steps: how many there are.
    """
    (stage,) = (each for each in placement.stages if each.name.startswith("scoring"))
    reading = max((stage.disk + stage.moved) / DISK, stage.up / LINK if gpu else 0.0)
    computing = stage.forward / (GPU_FLOPS if gpu else CPU_FLOPS)
    return max(1, min(MOST_UPDATES, steps, math.ceil(reading / computing)))


def passes_line(config: PruneConfig, plan: Plan) -> str:
    """Say how many passes over the layers a policy makes; nothing of other methods."""
    trials = METHODS[config.method].trials
    if trials is None:
        return ""
    passes, masks, _ = trials(plan.settings)
    updates = f"{plan.settings['steps']} updates, {plan.settings['per_pass'] or 1} a pass"
    how = ", as the repair leaves them" if plan.settings["repaired"] == "yes" else ""
    return f"{config.method}: {updates}, {passes} passes over the layers, {masks} masks in each{how}"


def places(config: PruneConfig | RecoverConfig, gpu: bool) -> list[Place]:
    """List the places where hidden states may stay, the fastest first."""
    places: list[Place] = ["device"]
    if gpu:
        places.append("host")
    if config.scratch is not None:
        places.append("scratch")
    return places


def _least(gpu: bool) -> Kept:
    """Return what a run keeps at least: on a CPU state that comes from scratch passes memory that is short."""
    return Kept() if gpu else Kept(state_slots=2)


def _state_places(config: PruneConfig, plan: Plan, gpu: bool) -> list[Place]:
    """List the places where the method's state may stay; on a CPU a run that can be resumed has it in its journal."""
    spill = config.scratch is not None and plan.state_bytes > 0 and (gpu or not config.resume)
    return ["host", "scratch"] if spill else ["host"]


def memory_limits(
    config: PruneConfig | RecoverConfig, sweeper: Sweeper, baseline: int, memory: int
) -> tuple[tuple[int, int], list[int]]:
    """Return the bytes that the device (0 where it is the CPU) and the process may hold, and of them tensors.

    Args:
        baseline, memory: as of `choose_placement`.

    Raises:
        UsageError: a budget of a GPU's memory, and a run on a CPU.
    """
    gpu = is_gpu(sweeper.skeleton.device)
    if config.gpu_memory is not None and not gpu:
        raise UsageError("--gpu-memory: the run computes on a CPU; leave it out, or give --device cuda")
    limits = _limits(config, sweeper, gpu, memory)
    host = int((limits[1] - baseline) * (1 - MARGIN))
    if not gpu:
        host = max(host - HOLES, host // 2)
    return limits, [int(limits[0] * (1 - MARGIN)), host]


def holes(tensors: int, gpu: bool) -> int:
    """Count the bytes that tensors in a CPU's heap leave between them at the most; beside a GPU they are pinned."""
    return 0 if gpu else min(HOLES, tensors)


def budget_of(tensors: int, gpu: bool) -> int:
    """Count the bytes of memory, beside the process's own, that are enough for so many bytes of tensors."""
    return int((tensors + holes(tensors, gpu)) / (1 - MARGIN)) + 2**20


def _limits(config: PruneConfig | RecoverConfig, sweeper: Sweeper, gpu: bool, memory: int) -> tuple[int, int]:
    host = config.host_memory if config.host_memory is not None else memory
    if not gpu:
        return 0, host
    if not sweeper.skeleton.loaded and config.gpu_memory is not None:  # of a card that need not be there
        return config.gpu_memory, host
    # Embeddings and head are there already, and are among what is planned: so they count as free.
    loaded = sweeper.skeleton.resident_bytes if sweeper.skeleton.loaded else 0
    free = free_memory(sweeper.skeleton.device)
    # Another process may hold some of what a budget counts on.
    device = int(free * GPU_SHARE) if config.gpu_memory is None else min(config.gpu_memory - loaded, free)
    return device + loaded, host


def _micro_batches(config: PruneConfig, default: int) -> list[int]:
    """List the micro-batches to try: what the user says, else the default, and halves of it where memory is short."""
    if config.micro_batch is not None:
        return [config.micro_batch]
    sizes = [default]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _peaks(found: Sequence[Stage], gpu: bool) -> tuple[int, int]:
    """Return the peak bytes of tensors on the device and in the process."""
    if gpu:
        return max(sum(stage.device.values()) for stage in found), max(sum(stage.host.values()) for stage in found)
    return 0, max(sum(stage.device.values()) + sum(stage.host.values()) for stage in found)


def _with_slots(sweeper: Sweeper, found: Sequence[Stage], held: Kept) -> tuple[int, int]:
    """Return the peak bytes as `_peaks` does, with the slots that are kept beside the two that have to be."""
    gpu, slots = is_gpu(sweeper.skeleton.device), (held.slots - 2) * sweeper.pager.slot_bytes
    device, host = _peaks(found, gpu)
    return (device + slots, host) if gpu else (0, host + slots)


def _keep(
    sweeper: Sweeper,
    config: PruneConfig,
    plan: Plan,
    make: Callable[[Kept], list[Stage]],
    room: int,
    left: Callable[[int], int],
) -> tuple[Kept, list[Stage]]:
    """Choose what is kept within `room` bytes of what computes, and give the stages with that.

    Weights and state save as much by the byte at each turn of a sweep, but all of either saves more than parts of both:
    of either first, what waits less for the link, and for the disk where what is `left` for the page cache does not
    hold the layers. Graphs save arithmetic, and get what is left then. On a CPU without a budget nothing is kept.
    """
    gpu = is_gpu(sweeper.skeleton.device)
    least = _least(gpu)
    if not gpu and config.host_memory is None:
        found = make(least)
        return least, _with_reading(sweeper, found, least.slots, left(_with_slots(sweeper, found, least)[1]))
    nothing = make(least)
    scoring, with_graph = (
        next(stage for stage in stages if stage.name.startswith("scoring"))
        for stages in (nothing, make(replace(least, graphs=1)))
    )
    saves = with_graph.backward < scoring.backward  # what has no backward sweep keeps no graph
    slot, of_state = sweeper.pager.slot_bytes, len(plan.layers)
    block = scoring.device.get("state of layers", 0) // min(least.state_slots, of_state)
    options = []
    for order in (("weights", "state"), ("state", "weights")) if block else (("weights",),):
        rest, held = room - _peaks(nothing, gpu)[not gpu], least
        for what in order:
            if what == "weights":
                held = replace(held, slots=max(2, min(sweeper.n_layers, 2 + rest // slot)))
                rest -= (held.slots - 2) * slot
            else:
                held = replace(
                    held, state_slots=max(least.state_slots, min(of_state, least.state_slots + rest // block))
                )
                rest -= (held.state_slots - least.state_slots) * block
        for_graphs = room - (held.slots - 2) * slot

        def fits(graphs: int, held: Kept = held, most: int = for_graphs) -> bool:
            return _peaks(make(replace(held, graphs=graphs)), gpu)[not gpu] <= most

        # The most that fit: the more there are, the more is held.
        some = range(1, sweeper.n_layers - plan.layers[0] + 1) if saves else ()
        held = replace(held, graphs=bisect.bisect_left(some, True, key=lambda graphs: not fits(graphs)))
        found = make(held)
        found = _with_reading(sweeper, found, held.slots, left(_with_slots(sweeper, found, held)[1]))
        # Added up, not the longest: a sweep in which one of them is uneven waits for each in turn.
        waits = sum(stage.disk / DISK + (stage.up + stage.down) / LINK for stage in found)
        options.append((waits, held, found))
    _, held, found = min(options, key=lambda option: option[0])
    return held, found


def _with_reading(sweeper: Sweeper, found: Sequence[Stage], slots: int, cache: int) -> list[Stage]:
    """Fill in the bytes that each stage reads: in turn, since one begins with the layers that the last one left."""
    pager, gpu = sweeper.pager, is_gpu(sweeper.skeleton.device)
    before, pager.slots, pager.page_cache = (pager.slots, pager.page_cache), slots, cache
    passes: list[tuple[Sequence[int], Turn]] = [(order, "back") for stage in found for order in stage.passes]
    stay, cached = {layer for layer in range(sweeper.n_layers) if pager.stays_in_cache(layer)}, set[int]()
    to_read, result = pager.to_read(passes), []
    for stage in found:
        read = disk = 0
        for layer in (layer for _ in stage.passes for layer in next(to_read)):
            read += pager.bytes_of(layer)
            if layer not in cached:
                disk += pager.bytes_of(layer)
                cached |= {layer} & stay
        result.append(replace(stage, read=read, disk=disk, up=stage.up + read * gpu))
    pager.slots, pager.page_cache = before
    return result


def forecast_table(placement: Placement, sweeper: Sweeper, found: Rates | None) -> str:
    """Draw a table with a row per stage: bytes held, read and written, and seconds where rates are known."""
    gpu = placement.device_bytes > 0
    extra = (placement.held.slots - 2) * sweeper.pager.slot_bytes
    baseline = placement.host_bytes - max(
        sum(s.host.values()) + (not gpu) * (sum(s.device.values()) + extra) for s in placement.stages
    )
    link = ["link"] if gpu else []
    rows = [["stage", *(["GPU"] if gpu else []), "memory", "scratch", "read", *link, "written", "TFLOP", "seconds"]]
    for stage in placement.stages:
        device, host = sum(stage.device.values()) + extra, baseline + sum(stage.host.values())
        held = [human(device), human(host)] if gpu else [human(device + host)]
        taken = "-" if found is None else f"{seconds(stage, found):,.0f}"
        over = [max(stage.up, stage.down)] if gpu else []
        moved = [human(each) for each in (stage.scratch, stage.read, *over, stage.written)]
        rows.append([stage.name, *held, *moved, f"{(stage.forward + stage.backward) / 1e12:,.1f}", taken])
    lines = [table(rows), placement_line(placement, sweeper)]
    largest = max(placement.stages, key=lambda stage: sum(stage.device.values()))
    parts = sorted(largest.device.items(), key=lambda item: -item[1])
    lines.append(f"{largest.name} holds {', '.join(f'{human(size)} of {name}' for name, size in parts if size)}")
    read, disk = (sum(getattr(stage, name) for stage in placement.stages) for name in ("read", "disk"))
    cached = f"; the page cache gives {human(read - disk)} of what is read" if read > disk else ""
    source = f"; {found.source}; {found.start:.0f} s more until work begins" if found else ""
    lines.append(f"up to {placement.micro_batch} sequences are computed at once{cached}{source}")
    return "\n".join(lines)


def placement_line(placement: Placement, sweeper: Sweeper) -> str:
    """Describe a placement in one line."""
    where = {"device": "stay in memory", "host": "go to host memory", "scratch": f"go to {placement.scratch}"}
    state = f", the method's state to {placement.scratch}" if placement.state == "scratch" else ""
    gpu = f"{human(placement.device_bytes)} on the GPU and " if placement.device_bytes else ""
    fewer = f"; {placement.micro_batch} sequences at once, fewer than by default" if placement.halved else ""
    held = placement.held
    kept = f"{held.slots} of {sweeper.n_layers} layers are kept" if held.slots > 2 else "two layers at a time"
    kept += f", the state of {held.state_slots}" if held.state_slots > STATE_SLOTS else ""
    kept += f", the graphs of {held.graphs}" if held.graphs else ""
    return (
        f"planned: {gpu}{human(placement.host_bytes)} of memory at the most; {kept}, hidden states "
        f"{where[placement.place]}{state}{fewer}"
    )


def placement_facts(placement: Placement) -> dict[str, Any]:
    """Return what streamprune.json says of a placement."""
    return {
        **vars(placement.held),
        "hidden_states": placement.place,
        "state": placement.state,
        "planned_gpu": placement.device_bytes,
        "planned_host": placement.host_bytes,
        "planned_read": {stage.name: stage.read for stage in placement.stages},
        "planned_disk": {stage.name: stage.disk for stage in placement.stages},
    }
