"""Counter of the bytes that a GPU's tensors take while the real code runs on meta tensors, by the virtual clock.

A dispatch mode sees every tensor that torch makes, and a finaliser when its memory goes, so that shapes of 7 to 70
billion parameters are counted where nothing of them is there. What libraries take inside an operation no mode sees; it
is counted by formula: cuBLAS's workspaces, and those of attention and of Cholesky factors.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from streamprune.config import PruneConfig
from streamprune.methods.sinks import LayerScores, UnitScores, WeightPruner
from streamprune.methods.table import METHODS
from streamprune.output.companions import Companions
from streamprune.pipeline.job import Job
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.source import Source
from streamprune.planning.decision import Plan, make_plan
from streamprune.planning.placement import Placement, choose_placement
from streamprune.planning.stage import Work
from streamprune.streaming.perplexity import perplexity
from streamprune.streaming.sweeper import Sweeper, default_micro_batch

aten = torch.ops.aten
BLOCK = 512  # the allocator's
CUBLAS_WORKSPACE = 32 << 20  # bytes, on a Hopper card; for each thread that multiplies
ROUNDED_TOKENS = 128  # FlashAttention's backward pass pads sequences to these


@dataclass
class Counter:
    """Bytes of live tensors of the device, and the most there were.

    Attributes:
        live: bytes of each memory. peak_of: what was live at the peak, by its bytes.
    """

    live: dict[int, int] = field(default_factory=dict)
    now: int = 0
    peak: int = 0
    peak_of: list[int] = field(default_factory=list)

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's memory, unless it was seen before, until it goes."""
        storage = tensor.untyped_storage()
        if storage._cdata in self.live:
            return
        self.take(storage._cdata, storage.nbytes())
        weakref.finalize(storage, self.give, storage._cdata).atexit = False

    def take(self, key: int, nbytes: int) -> None:
        self.live[key] = -(-nbytes // BLOCK) * BLOCK
        self.now += self.live[key]
        if self.now > self.peak:
            self.peak = self.now
            self.peak_of = list(self.live.values())

    def give(self, key: int) -> None:
        self.now -= self.live.pop(key)

    def take_for_a_moment(self, nbytes: int) -> None:
        """Count what an operation takes and gives back before it returns."""
        self.take(-1, nbytes)
        self.give(-1)

    def begin(self) -> None:
        """Begin a stage: its peak is that of its own."""
        self.peak, self.peak_of = self.now, list(self.live.values())


class CountMode(TorchDispatchMode):
    """Mode that shows a counter what operations put out on the device."""

    def __init__(self, counter: Counter) -> None:
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket is aten._unsafe_view:  # which the clock makes anew
            return args[0].view(args[1])
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, Tensor) and each.is_meta:
                self.counter.see(each)
        moment = WORKSPACES.get(func._overloadpacket)
        if moment is not None and args[0].is_meta:
            self.counter.take_for_a_moment(moment(*args))
        return made


def _copies(*operands: Tensor) -> int:
    return sum(each.nbytes for each in operands if isinstance(each, Tensor))


# Bytes that operations on a GPU take beside operands and results. cuSOLVER's solution and cuBLAS's triangular one copy
# what they are given by columns; a factor's workspace is no larger than the matrix.
WORKSPACES: dict[Any, Callable[..., int]] = {
    aten.linalg_cholesky_ex: lambda matrix, *rest, **named: matrix.nbytes,
    aten.cholesky_solve: _copies,
    aten.linalg_solve_triangular: lambda factor, right, **named: factor.nbytes,
}


class _Attention(torch.autograd.Function):
    """FlashAttention's memory: the output and a float32 sum for each row; backwards, gradients in float32 beside them.

    PyTorch's mha_bwd takes dq once more in float32, the rows' dO·O, and where heads share keys and values, gradients of
    these for all heads.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, counter: Counter) -> Tensor:
        rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
        made = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, made, rows)
        ctx.counter = counter
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        q, k, v, _, _ = ctx.saved_tensors
        tokens = -(-q.shape[-2] // ROUNDED_TOKENS) * ROUNDED_TOKENS
        within = 4 * q.shape[:-2].numel() * tokens * (q.shape[-1] + 1)
        if k.shape[1] != q.shape[1]:
            within += 2 * q.nbytes
        made = [torch.empty_like(each) for each in (q, k, v)]
        ctx.counter.take_for_a_moment(within)
        return *made, None


@contextmanager
def counting(clock: Any) -> Iterator[Counter]:
    """Count on a machine of the virtual clock, which is running."""
    counter, inside = Counter(), clock.world.inside

    @contextmanager
    def both() -> Iterator[None]:
        with inside(), CountMode(counter):
            yield

    def attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **named: Any) -> Tensor:
        return _Attention.apply(q, k, v, counter)

    clock.world.inside = both
    with ExitStack() as stack:
        stack.callback(setattr, F, "scaled_dot_product_attention", F.scaled_dot_product_attention)
        F.scaled_dot_product_attention = attention
        stack.enter_context(CountMode(counter))
        yield counter


@dataclass
class Counted:
    """Stages of a run, by their names: bytes counted, and bytes planned by purpose.

    Attributes:
        peaks: bytes of each memory that was taken at a stage's peak.
    """

    placement: Placement
    real: dict[str, int] = field(default_factory=dict)
    peaks: dict[str, list[int]] = field(default_factory=dict)
    parts: dict[str, dict[str, int]] = field(default_factory=dict)

    def ends(self, stage: str, counter: Counter) -> None:
        """Note the peak of a stage that has ended."""
        self.real[stage], self.peaks[stage] = counter.peak, counter.peak_of
        counter.begin()

    def compare(self, slot_bytes: int) -> None:
        """Note what was planned of the stages that have ended; slots are taken when layers first need them."""
        passed = set[int]()
        for stage in (stage for stage in self.placement.stages if stage.name in self.real):
            passed.update(layer for order in stage.passes for layer in order)
            kept = max(0, min(self.placement.held.slots, len(passed)) - 2)
            self.parts[stage.name] = {**stage.device, "kept": kept * slot_bytes}


def count(
    path: Path,
    *,
    repair: tuple[int, int] | None = None,
    evaluation: tuple[int, int] | None = None,
    **options: Any,
) -> Counted:
    """Evaluate, score and repair a checkpoint of headers as the options of a `PruneConfig` say, and count.

    Args:
        repair, evaluation: sequences and tokens of each that they take.
    """
    from clock_rates import machine_of
    from virtual_clock import META, Clock, running

    config = PruneConfig(str(path), Path("unused"), **{"host_memory": 1 << 42, "evaluate": False, **options})
    row, clock = METHODS[config.method], Clock(machine_of("h100"))
    shape = (config.samples or row.calibration[0], config.seq_len or row.calibration[1])
    source = Source(config.model, planned=META, scope="units" if config.target == "units" else "matrices")
    with running(clock), source.open() as sweeper, counting(clock) as counter:
        _begin(sweeper, counter)
        plan = make_plan(config, sweeper.skeleton)
        sweeper.micro_batch = config.micro_batch or default_micro_batch(shape[1])
        work = Work(shape if row.needs_text else None, repair, evaluation)
        with _disable_current_modes():  # a plan runs a layer too, for what is saved of it
            counted = Counted(choose_placement(sweeper, config, plan, work, baseline=0, memory=1 << 40))
        job = _ready(config, plan, sweeper, work, counted.placement)
        if evaluation is not None:
            perplexity(sweeper, torch.zeros(evaluation, dtype=torch.int64))
            counted.ends("perplexity before", counter)
        row.score(job._statistics(), plan.settings, _sink(config, plan, sweeper))
        sweeper.close()
        counted.ends(f"scoring {row.name}", counter)
        if repair is not None:
            job._repair(plan.choice.widths, SimpleNamespace(put_layer=lambda page, made: None))
            counted.ends("repairing", counter)
        counted.compare(sweeper.pager.slot_bytes)
    return counted


def _begin(sweeper: Sweeper, counter: Counter) -> None:
    """Let embeddings and head be on the device, nothing of the layers, and what cuBLAS takes at its first product."""
    model = sweeper.skeleton.model.to("meta").requires_grad_(False)
    for layer in sweeper.skeleton.layers:
        counter.live.update({each.untyped_storage()._cdata: 0 for each in layer.parameters()})
    for each in model.parameters():
        counter.see(each)
    counter.take(-2, 2 * CUBLAS_WORKSPACE)  # autograd multiplies in a thread of its own
    counter.begin()


def _ready(config: PruneConfig, plan: Plan, sweeper: Sweeper, work: Work, placement: Placement) -> Job:
    """Make a job as a run has it, and tell the sweeper where things stay."""
    sweeper.micro_batch, sweeper.place, sweeper.scratch = placement.micro_batch, placement.place, config.scratch
    sweeper.pager.slots, sweeper.graphs = placement.held.slots, placement.held.graphs
    ids, repair = (
        None if shape is None else torch.zeros(shape, dtype=torch.int64) for shape in (work.calibration, work.repair)
    )
    return Job(
        config,
        plan,
        sweeper,
        Progress(),
        ids,
        repair,
        Companions(sweeper.skeleton.checkpoint.path),
        state_slots=placement.held.state_slots,
        state_scratch=config.scratch if placement.state == "scratch" else None,
    )


def _sink(config: PruneConfig, plan: Plan, sweeper: Sweeper) -> Any:
    if plan.sparsity is not None:
        return WeightPruner(plan.sparsity, lambda ref, stored, pruned: None)
    if config.target == "layers":
        return LayerScores(plan.layers)
    return UnitScores(sweeper.skeleton.all_units(plan.layers))
