"""Rehearsal of a method before its sweeps: what it would start on a GPU is compiled while the first layers are read.

The method itself runs, once for layers of each shape, on tensors that hold nothing (`meta`): an operation that has a
kernel compiles it then, for these shapes and dtypes, and starts nothing. So no list says which kernels a method needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from streamprune.config import PruneConfig
from streamprune.errors import KernelError
from streamprune.kernels import gram
from streamprune.kernels.launch import KernelFailure, compiling, has_triton
from streamprune.methods.sinks import LayerScores, Sink, UnitScores, WeightPruner
from streamprune.methods.table import METHODS
from streamprune.model.masking import output_matrices
from streamprune.model.units import TensorRef, kept_lines
from streamprune.paging.device import is_gpu
from streamprune.planning.decision import Plan
from streamprune.planning.stage import Work
from streamprune.recovery.least_squares import repair_micro_batch
from streamprune.streaming.binder import Perturbation
from streamprune.streaming.gradients import Consumer, PowerCollector, PowersConsumer
from streamprune.streaming.inputs import Sums
from streamprune.streaming.statistics import Statistics
from streamprune.streaming.sweeper import Sweeper

aten = torch.ops.aten
META = torch.device("meta")
REFERENCE = "use --kernels torch, which is slower and draws other noise"


def refuse_without_kernels(config: PruneConfig, device: torch.device) -> None:
    """Refuse a GPU where nothing compiles kernels: the reference takes their place only where it is asked for.

    Raises:
        KernelError: Triton is not installed.
    """
    if config.kernels != "torch" and is_gpu(device) and not has_triton():
        raise KernelError(f"Triton is not installed, so {device} has no kernels: pip install triton, or {REFERENCE}")


@contextmanager
def naming_the_reference() -> Iterator[None]:
    """Turn the failure of a kernel into an error that names what does without it."""
    try:
        yield
    except KernelFailure as failure:
        raise KernelError(f"{failure}; {REFERENCE}") from failure


def compile_ahead(sweeper: Sweeper, config: PruneConfig, plan: Plan, work: Work) -> None:
    """Begin to compile the kernels that method and repair will start, in threads of their own; on a CPU are none."""
    device = sweeper.skeleton.device
    if not is_gpu(device) or sweeper.backend == "torch":
        return

    def compile_all() -> None:
        # A method of one's own may ask what `meta` cannot answer: its kernels are then compiled as they are started.
        with suppress(Exception), compiling(device):
            rehearse(sweeper, config, plan, work)

    threading.Thread(target=compile_all, name="streamprune-rehearsal", daemon=True).start()


def rehearse(sweeper: Sweeper, config: PruneConfig, plan: Plan, work: Work) -> None:
    """Run the method on `meta`, from its first sweep to its scores, and then the sums of the repair."""
    layers = _of_each_shape(sweeper, plan.layers)
    statistics = _Rehearsal(sweeper, layers, work.calibration or (0, 0))
    with _Answers():
        METHODS[config.method].score(statistics, plan.settings, _sink(sweeper, config, plan, layers))
    if work.repair is not None and plan.repair == "stream":
        seq_len = None if work.calibration is None else work.calibration[1]
        _rehearse_repair(sweeper, plan, repair_micro_batch(sweeper.micro_batch, seq_len, work.repair[1]), work.repair)


def _rehearse_repair(sweeper: Sweeper, plan: Plan, micro_batch: int, shape: tuple[int, int]) -> None:
    """Sum the Gram matrices of what is left of the inputs of each layer's last matrix, of micro-batches of `shape`."""
    skeleton, sums = sweeper.skeleton, torch.promote_types(sweeper.skeleton.dtype, torch.float32)
    widths = set()
    for layer in (layer for layer in plan.layers if layer in plan.form.kept):
        member = output_matrices(skeleton, layer)[-1]
        widths.add(len(kept_lines(member, skeleton.geometries[layer], plan.form.kept[layer][member.kind])))
    tokens = {(part.stop - part.start) * shape[1] for part in sweeper.micro_batches(shape[0], micro_batch)}
    for columns, count in product(widths, tokens):
        x = torch.empty(count, columns, dtype=skeleton.dtype, device=META)
        gram(torch.empty(columns, columns, dtype=sums, device=META), x, backend=sweeper.backend)


def _sink(sweeper: Sweeper, config: PruneConfig, plan: Plan, layers: Sequence[int]) -> Sink:
    if config.target == "weights":
        assert plan.sparsity is not None, "the plan has a pattern wherever weights go"
        return WeightPruner(plan.sparsity, lambda ref, stored, pruned: None, sweeper.backend)
    if config.target == "layers":
        return LayerScores(layers, sweeper.backend)
    return UnitScores(sweeper.skeleton.all_units(layers), sweeper.backend)


def _of_each_shape(sweeper: Sweeper, layers: Sequence[int]) -> list[int]:
    """List the first of the layers whose scored matrices have the same shapes and stored dtypes."""
    first: dict[Any, int] = {}
    for layer in layers:
        entries = sweeper.skeleton.entries[layer]
        first.setdefault(
            tuple((name, entries[name].shape, entries[name].dtype) for name in sweeper.scored[layer]), layer
        )
    return list(first.values())


class _Rehearsal(Statistics):
    """Source of statistics without a model: each matrix once, on `meta`, in the shapes and dtypes of a run."""

    def __init__(self, sweeper: Sweeper, layers: Sequence[int], shape: tuple[int, int]) -> None:
        super().__init__(sweeper, None, layers, 0, store=lambda name: {})
        self.samples, self._seq_len = shape
        # Micro-batches are alike but for the last.
        parts = sweeper.micro_batches(self.samples)
        self._parts = sorted({part.stop - part.start for part in parts}, reverse=True)

    def _matrices(self, of: Callable[[TensorRef], bool] = lambda ref: True) -> Iterator[tuple[TensorRef, Tensor]]:
        for layer in self.layers:
            for name, ref in self.sweeper.scored[layer].items():
                if of(ref):
                    entry = self.sweeper.skeleton.entries[layer][name]
                    yield ref, torch.empty(entry.shape, dtype=entry.dtype, device=META)

    def _computed(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.sweeper.skeleton.dtype, device=META)

    def weights(self, consume: Callable[[TensorRef, Tensor], object]) -> None:
        for ref, weight in self._matrices():
            consume(ref, weight)

    def gradients(self, consume: Consumer, perturbation: Perturbation | None = None) -> float:
        dtype = torch.promote_types(self.sweeper.skeleton.dtype, torch.float32)
        for ref, weight in self._matrices():
            if perturbation is not None:
                perturbation.move(self._computed(*weight.shape), weight, ref.layer, ref.tensor, self.backend)
            consume(ref, weight, torch.empty(weight.shape, dtype=dtype, device=META))
        return 0.0

    def gradient_powers(self, consume: PowersConsumer, powers: Sequence[int]) -> float:
        shape = (self.samples, self._seq_len)
        for ref, weight in self._matrices():
            collector = PowerCollector(consume, powers, shape, self.backend, ref, weight, len(self._parts))
            for count in self._parts:
                collector.add_ends(*(self._computed(count, self._seq_len, width) for width in reversed(weight.shape)))
        return 0.0

    def inputs(
        self,
        kind: type[Sums],
        consume: Callable[[TensorRef, Tensor, Sums], Tensor | None],
        of: Callable[[TensorRef], bool] = lambda ref: True,
        *,
        prunes: bool = False,
    ) -> None:
        for ref, weight in self._matrices(of):
            columns = ref.matrix(weight).shape[1]
            sums = kind(columns, self._computed(1, columns), self.backend)
            for count in self._parts:
                sums.add(self._computed(count * self._seq_len, columns))
            consume(ref, weight, sums)

    def hidden(self, consume: Callable[[int, Iterator[tuple[Tensor, Tensor]]], None]) -> None:
        return

    def losses_without(self) -> dict[int, float]:
        return dict.fromkeys(self.layers, 0.0)


class _Answers(TorchDispatchMode):
    """Mode that answers what a method asks of numbers that nobody knows: true, 0 and 1, and zeros on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, op = kwargs or {}, func._overloadpacket
        if op is aten.rand:  # as many as a matrix has, on the CPU
            return torch.empty(args[0], device=META)
        if op is aten._local_scalar_dense and args[0].is_meta:
            dtype = args[0].dtype
            return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 0
        if op is aten._to_copy and args[0].is_meta and kwargs.get("device", META) != META:
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if op is aten.copy_ and args[1].is_meta and not args[0].is_meta:
            return args[0]
        return func(*args, **kwargs)
