"""Rates at which this machine reads and computes, measured in seconds on one layer, or assumed of a card.

Where layers differ, the one that is measured has the shapes that most of them have.
"""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune.methods.needs import FACTORS_OF_H
from streamprune.methods.sinks import Sparsity
from streamprune.methods.sparsegpt import inverse_factor, prune_and_update
from streamprune.paging.device import device_name, is_gpu, synchronize
from streamprune.paging.pager import Page
from streamprune.planning.cards import CARDS
from streamprune.planning.stage import Stage
from streamprune.streaming.binder import Binder, Perturbation
from streamprune.streaming.costs import Sizes, Task
from streamprune.streaming.sweeper import Sweeper

FILE = "rates.json"
MEASURE_SECONDS = 1.5  # for each of reading, forwards, backwards, and the rest
FACTOR_WIDTH = 4096  # at most, of the matrix that is factored; the rate grows with it
UTILISATION = 0.4  # of that, in layers of a few thousand tokens
DISK = 3e9  # bytes/s of an NVMe drive on PCIe 4.0
WORK = ("forward", "backward", "noise", "factors", "updates")  # of a Stage, done at the Rates of the same names
WRITE_SHARE = 0.5  # writing over reading: what is written is also cut, hashed and synced
LINK_BYTES = 256 << 20  # of a copy that the link is measured with
# Units of masks that one core draws and learns from in a second, of 7 to 70 billion parameters (bench/policy_steps.py).
CHOSEN = 1.5e7
# Seconds before work begins: the interpreter, torch and transformers (a plan in a process of its own, two cores); and
# CUDA's first use with the compilation of kernels, by which scoring took longer than planned on an H100, the median of
# six short runs (bench/README.md, Plan against reality).
PROCESS_START, GPU_START = 4.0, 1.5
RATES_FORMAT = 3  # of what is kept of a measurement: those of earlier ones are not read


@dataclass(frozen=True)
class Rates:
    """Rates: bytes/s from the checkpoint into slots; FLOP/s of a layer forwards and backwards; where they come from.

    `noise`, `factors` and `updates` are how much of a Stage's work of that name is done in a second, `link` bytes/s
    between host and GPU, each way, `staging` bytes/s within host memory, `chosen` units of masks/s, and `start` the
    seconds before work begins.
    """

    read: float
    forward: float
    backward: float
    source: str
    noise: float = math.inf
    factors: float = math.inf
    updates: float = math.inf
    link: float = math.inf
    staging: float = math.inf
    chosen: float = CHOSEN
    start: float = PROCESS_START


def assumed(card: str) -> Rates:
    """Return the rates of a row of CARDS, with an NVMe drive."""
    peak, _, link = CARDS[card]
    flops, start = peak * 1e12 * UTILISATION, PROCESS_START + GPU_START
    source = f"{card} at {UTILISATION:.0%} of its {peak:.0f} TFLOP/s, {link:.0f} GB/s each way, disk {DISK / 1e9:.0f}"
    return Rates(DISK, flops, flops, source, link=link * 1e9, start=start)


def seconds(stage: Stage, rates: Rates) -> float:
    """Estimate the seconds of a stage: the longest of disk, link, staging and computing; the others hide behind it.

    What is written, and masks, which a pass waits for and is learnt from, come to that.
    """
    computing = sum(getattr(stage, name) / getattr(rates, name) for name in WORK)
    link = max(stage.up, stage.down) / rates.link  # it goes both ways at the same time
    # The scratch disk is taken to be as fast as the checkpoint's, or the same.
    reading = (stage.disk + stage.moved) / rates.read
    beside = stage.written / (rates.read * WRITE_SHARE) + stage.chosen / rates.chosen
    return max(reading, link, computing, stage.staged / rates.staging) + beside


def default_cache() -> Path:
    """Return the directory $XDG_CACHE_HOME/streamprune, or ~/.cache/streamprune."""
    # Not Path.home, which raises where a container's user has no home.
    return Path(os.environ.get("XDG_CACHE_HOME") or Path(os.path.expanduser("~"), ".cache")) / "streamprune"


def known(sweeper: Sweeper, seq_len: int, cache: Path) -> Rates | None:
    """Return the rates that were measured here before for layers of these sizes, if there are any."""
    try:
        rates = Rates(**_saved(cache)[_key(sweeper, seq_len)])
    except (KeyError, TypeError):  # not there, or another version's
        return None
    numbers = [value for name, value in asdict(rates).items() if name != "source"]
    return rates if all(isinstance(number, int | float) and number > 0 for number in numbers) else None


def measured(sweeper: Sweeper, seq_len: int, cache: Path) -> Rates:
    """Measure the rates of this machine with this model's layers, unless they are known; keep them in `cache`."""
    rates = known(sweeper, seq_len, cache)
    if rates is None:
        gpu = is_gpu(sweeper.skeleton.device)
        rates = Rates(
            _read(sweeper),
            *_compute(sweeper, seq_len),
            "measured here",
            *_beside(sweeper),
            link=_link(sweeper.skeleton.device) if gpu else math.inf,
            staging=_staging(sweeper.skeleton.device) if gpu else math.inf,
            start=PROCESS_START + GPU_START * gpu,
        )
        # A file of this process's own, renamed when it is whole: several processes may measure at the same time.
        new = cache / f"{FILE}.{os.getpid()}"
        with suppress(OSError):  # measured again next time
            cache.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(_saved(cache) | {_key(sweeper, seq_len): asdict(rates)}, indent=1))
            new.rename(cache / FILE)
    return rates


def _saved(cache: Path) -> dict[str, Any]:
    try:
        found = json.loads((cache / FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(sweeper: Sweeper, seq_len: int) -> str:
    """Name what rates depend on: the device, the disk, and the sizes of a layer's call."""
    skeleton = sweeper.skeleton
    device = device_name(skeleton.device) if is_gpu(skeleton.device) else platform.processor()
    shapes = sorted(tuple(shape) for shape in skeleton.shapes(Sizes(sweeper).commonest).values())
    disk = os.stat(skeleton.checkpoint.path).st_dev
    return repr(
        (RATES_FORMAT, device, torch.get_num_threads(), str(skeleton.dtype), shapes, sweeper.micro_batch, seq_len, disk)
    )


def _read(sweeper: Sweeper) -> float:
    """Measure the bytes/s of a sweep that computes nothing."""
    checkpoint, start = sweeper.skeleton.checkpoint, time.perf_counter()
    before = checkpoint.bytes_read
    with sweeper.pager.pages(range(sweeper.n_layers)) as pages:
        for _ in pages:
            if time.perf_counter() - start > MEASURE_SECONDS:
                break
    return (checkpoint.bytes_read - before) / (time.perf_counter() - start)


def _compute(sweeper: Sweeper, seq_len: int) -> tuple[float, float]:
    """Measure FLOP/s of a layer forwards, and backwards with its weights' gradients and the forward pass they need."""
    skeleton, batch, sizes = sweeper.skeleton, sweeper.micro_batch, Sizes(sweeper)
    layer = sizes.commonest
    ids = torch.zeros((1, seq_len), dtype=torch.int64)
    call = skeleton.record(ids)[layer]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=skeleton.dtype, device=skeleton.device)

    weights = {name: draw(*shape) * 0.02 for name, shape in skeleton.shapes(layer).items()}
    matrices = skeleton.matrices(layer)
    hidden = draw(batch, seq_len, skeleton.config.hidden_size)
    work = Task(sizes, (batch, seq_len)).flops([layer])

    def forward() -> None:
        with torch.no_grad():
            skeleton.run_layer(layer, weights, call, hidden)

    def backward() -> None:
        leaves = {name: weight.detach().requires_grad_(name in matrices) for name, weight in weights.items()}
        output = skeleton.run_layer(layer, leaves, call, hidden.detach().requires_grad_())
        output.backward(hidden)

    return work / _seconds_of(forward, skeleton.device), 3 * work / _seconds_of(backward, skeleton.device)


def _beside(sweeper: Sweeper) -> tuple[float, float, float]:
    """Measure the rates of noise (weights/s), triangular factors (FLOP/s) and SparseGPT's columns (weights/s)."""
    skeleton, sizes = sweeper.skeleton, Sizes(sweeper)
    layer, width = sizes.commonest, sizes.most(lambda each: max(each.inputs), range(sweeper.n_layers))
    width = min(FACTOR_WIDTH, width)
    tensors = {name: torch.randn(entry.shape).to(entry.dtype) for name, entry in skeleton.entries[layer].items()}
    page = Page(layer, {name: tensor.to(skeleton.device) for name, tensor in tensors.items()})
    binder, scored = Binder(skeleton), sweeper.scored[layer]
    drawn = sum(page.tensors[name].numel() for name in scored)
    noise = _seconds_of(lambda: binder.bind(page, Perturbation(0.01, (0, 0, 0)), scored), skeleton.device)
    dtype = torch.float64 if skeleton.dtype == torch.float64 else torch.float32
    x = torch.randn((width, width), dtype=dtype, device=skeleton.device)
    gram = x.T @ x
    factors = _seconds_of(lambda: inverse_factor(gram.clone(), 0.01), skeleton.device)
    factor, dead = inverse_factor(gram.clone(), 0.01), torch.zeros(width, dtype=torch.bool, device=skeleton.device)
    updates = _seconds_of(lambda: prune_and_update(x, factor, dead, Sparsity(0.5)), skeleton.device)
    return drawn / noise, FACTORS_OF_H * width**3 / factors, x.numel() / updates


def _link(device: torch.device) -> float:
    """Measure the bytes/s of pinned memory to a GPU and back, and return the lower."""
    there = torch.empty(LINK_BYTES, dtype=torch.uint8, device=device)
    here = torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    return LINK_BYTES / max(_seconds_of(partial(to.copy_, of), device) for to, of in ((there, here), (here, there)))


def _staging(device: torch.device) -> float:
    """Measure the bytes/s at which one thread copies memory to pinned memory."""
    here, pinned = (torch.empty(LINK_BYTES, dtype=torch.uint8, pin_memory=each) for each in (False, True))
    return LINK_BYTES / _seconds_of(lambda: pinned.copy_(here), device)


def _seconds_of(run: Callable[[], object], device: torch.device) -> float:
    run()  # the first time takes longer: kernels are loaded, memory is taken
    synchronize(device)
    taken, start = 0, time.perf_counter()
    while time.perf_counter() - start < MEASURE_SECONDS:
        run()
        synchronize(device)
        taken += 1
    return (time.perf_counter() - start) / taken
