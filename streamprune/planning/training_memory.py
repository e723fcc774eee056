"""Memory of a streamed training: where the hidden states of its sweeps stay, and how many layers beside two."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streamprune.errors import StreampruneError
from streamprune.figures import human
from streamprune.methods.needs import GRADIENTS
from streamprune.paging.device import is_gpu
from streamprune.paging.hidden_states import Place
from streamprune.planning.footprint import evaluation, writing
from streamprune.planning.placement import DRIFT, MARGIN, budget_of, holes, memory_limits, places
from streamprune.streaming.costs import Cost, LayerSizes, Shape, Sizes, Task
from streamprune.streaming.sweeper import Sweeper, default_micro_batch

OF_ADAPTERS = 4  # numbers of each of an adapter's: itself, its gradient, and Adam's two moments
OF_SAVED = 2  # where they are saved after each step, a third of them in turn: put together, and as a file's bytes
OF_BRANCH = 4 * 4  # bytes of a matrix's input, product, scaled product and sum in float32, where an adapter is attached
WHERE_IT_DOES_NOT_FIT = {
    "a step": "lower --batch",
    "the perplexity": "leave it out with --no-evaluate",
    "the held-out loss": "leave it out with --validation 0",
    "merging": "keep the adapter apart with --adapter",
}


@dataclass(frozen=True)
class TrainingSizes:
    """Sizes that decide what a streamed training takes, beside the model's.

    Attributes:
        batch: sequences of a step, and tokens of each. measured: the same of the perplexity, and of the loss of what is
            held out, by these names in WHERE_IT_DOES_NOT_FIT.
        adapter_bytes: of the adapter. merged: it is added to the weights in the end.
    """

    batch: Shape
    measured: Mapping[str, Shape] = field(default_factory=dict)
    adapter_bytes: int = 0
    merged: bool = False


def place_training(sweeper: Sweeper, config: Any, given: TrainingSizes, *, baseline: int, memory: int) -> str:
    """Place the hidden states of a training's sweeps, and of what is measured, in the budget; say what was chosen.

    Args:
        config: has `gpu_memory`, `host_memory`, `scratch` and `resume`.
        baseline: bytes of the process without any tensors. memory: bytes that it may have.

    Raises:
        StreampruneError: nothing fits; it names the smallest budget that would do. UsageError: as `memory_limits`.
    """
    gpu = is_gpu(sweeper.skeleton.device)
    limits, room = memory_limits(config, sweeper, baseline, memory)
    sizes, needed = Sizes(sweeper), list[dict[str, tuple[int, int]]]()
    for place in places(config, gpu):
        needed.append(_held(sizes, given, place, config.resume))
        device, host = _most(needed[-1])
        if device <= room[0] and host <= room[1]:
            sweeper.place, sweeper.scratch = place, config.scratch
            if gpu or config.host_memory is not None:
                left = room[0] - device if gpu else room[1] - host
                sweeper.pager.slots = min(sweeper.n_layers, 2 + max(0, left) // sweeper.pager.slot_bytes)
            where = {"device": "in memory", "host": "in the host's memory", "scratch": "on scratch"}[place]
            on_gpu = f"{human(device)} on the GPU and " if gpu else ""
            held = baseline + host + holes(host, gpu)
            return f"planned: {on_gpu}{human(held)} of memory at the most; hidden states stay {where}"
    raise StreampruneError(_refusal(needed, room, limits, baseline, gpu, config.scratch))


def _held(sizes: Sizes, given: TrainingSizes, place: Place, resume: bool) -> dict[str, tuple[int, int]]:
    """Count the bytes on the device and in the process of each stage.

    What is held of a step is counted as for a method that takes gradients of whole matrices: what the adapters' graphs
    hold of a layer is less than its gradients.
    """
    sweeper = sizes.sweeper
    task = Task(sizes, given.batch, sweeper.micro_batch, place, range(sweeper.n_layers))
    stages: dict[str, tuple[Cost, int, int]] = {"a step": (GRADIENTS.cost(task), 0, OF_ADAPTERS + OF_SAVED * resume)}
    widest = sizes.most(lambda layer: layer.widest, task.whole)
    for name, shape in given.measured.items():
        together = Task(sizes, shape, default_micro_batch(shape[1])).tokens_at_once
        branch = 0 if given.merged else OF_BRANCH * widest * together
        stages[name] = evaluation(sizes, shape, place), branch, 1
    if given.merged:
        stages["merging"] = writing(sizes, task.whole, 0), sizes.most(_added_to, task.whole), 1
    found = {}
    for name, (cost, more, adapters) in stages.items():
        device, host = sum(cost.device.values()) + more, sum(cost.host.values()) + adapters * given.adapter_bytes
        host += sweeper.pager.chunk_bytes
        found[name] = (device, host) if task.gpu else (0, device + host)
    return found


def _added_to(layer: LayerSizes) -> int:
    """Count the bytes of a layer to which an adapter is added: all of it, and a matrix, what is added, and the sum."""
    return sum(layer.stored) + 3 * 4 * layer.largest


def _most(stages: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Return the most that any stage holds, on the device and in the process."""
    device, host = zip(*stages.values(), strict=True)
    return max(device), max(host)


def _refusal(
    needed: list[dict[str, tuple[int, int]]],
    room: Sequence[int],
    limits: tuple[int, int],
    baseline: int,
    gpu: bool,
    scratch: Path | None,
) -> str:
    def lacks(held: tuple[int, int]) -> tuple[int, int]:
        return max(0, held[0] - room[0]) + max(0, held[1] - room[1]), sum(held)

    stages = min(needed, key=lambda each: lacks(_most(each)))
    device, host = _most(stages)
    budgets = [f"--host-memory {_mebibytes(budget_of(host, gpu) + baseline + DRIFT)}"]
    if gpu:
        budgets.insert(0, f"--gpu-memory {_mebibytes(device / (1 - MARGIN))}")
    have = f"{human(limits[0])} on the GPU and {human(limits[1])} of memory" if gpu else f"{human(limits[1])} of memory"
    stage = max(stages, key=lambda name: lacks(stages[name]))
    spill = "" if scratch is not None or stage == "merging" else ", or give --scratch for hidden states"
    remedies = f"give {' and '.join(budgets)}, or {WHERE_IT_DOES_NOT_FIT[stage]}{spill}"
    return f"{stage} of --streamed does not fit into {have}; {remedies}"


def _mebibytes(nbytes: float) -> str:
    return f"{-(-int(nbytes) >> 20) + 1}MiB"
