"""Memory of a streamed training: where the hidden states of its sweeps stay, and how many layers beside two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streamprune.errors import StreampruneError
from streamprune.figures import human
from streamprune.methods.needs import GRADIENTS
from streamprune.paging.device import is_gpu
from streamprune.paging.hidden_states import Place
from streamprune.planning.placement import MARGIN, memory_limits, places
from streamprune.streaming.costs import Sizes, Task
from streamprune.streaming.sweeper import Sweeper

OF_ADAPTERS = 4  # numbers of each of an adapter's: itself, its gradient, and Adam's two moments
OF_SAVED = 2  # where they are saved after each step, a third of them in turn: put together, and as a file's bytes


def place_training(
    sweeper: Sweeper, config: Any, shape: tuple[int, int], adapter_bytes: int, *, baseline: int, memory: int
) -> str:
    """Place the hidden states of forward and backward sweeps over a batch within the budget; say what was chosen.

    What is held is counted as for a method that takes gradients of whole matrices: what the adapters' graphs hold of a
    layer is less than its gradients.

    Args:
        config: has `gpu_memory`, `host_memory`, `scratch` and `resume`.
        shape: sequences of a batch, and tokens of each.
        baseline: bytes of the process without any tensors. memory: bytes that it may have.

    Raises:
        StreampruneError: nothing fits; it names the smallest budget that would do. UsageError: as `memory_limits`.
    """
    gpu = is_gpu(sweeper.skeleton.device)
    limits, room = memory_limits(config, sweeper, baseline, memory)
    sizes, needed = Sizes(sweeper), list[tuple[int, int]]()
    for place in places(config, gpu):
        device, host = _held(sizes, shape, place, gpu)
        host += (OF_ADAPTERS + OF_SAVED * config.resume) * adapter_bytes
        needed.append((device, host))
        if device <= room[0] and host <= room[1]:
            sweeper.place, sweeper.scratch = place, config.scratch
            if gpu or config.host_memory is not None:
                left = room[0] - device if gpu else room[1] - host
                sweeper.pager.slots = min(sweeper.n_layers, 2 + max(0, left) // sweeper.pager.slot_bytes)
            where = {"device": "in memory", "host": "in the host's memory", "scratch": "on scratch"}[place]
            on_gpu = f"{human(device)} on the GPU and " if gpu else ""
            return f"planned: {on_gpu}{human(baseline + host)} of memory at the most; hidden states stay {where}"
    raise StreampruneError(_refusal(needed, limits, baseline, gpu, config.scratch))


def _held(sizes: Sizes, shape: tuple[int, int], place: Place, gpu: bool) -> tuple[int, int]:
    """Count the bytes of a sweep there and back, on the device and in the process."""
    task = Task(sizes, shape, sizes.sweeper.micro_batch, place, range(sizes.sweeper.n_layers))
    cost = GRADIENTS.cost(task)
    device, host = sum(cost.device.values()), sum(cost.host.values()) + sizes.sweeper.pager.chunk_bytes
    return (device, host) if gpu else (0, device + host)


def _refusal(
    needed: list[tuple[int, int]], limits: tuple[int, int], baseline: int, gpu: bool, scratch: Path | None
) -> str:
    device, host = min(needed, key=sum)
    budgets = [f"--host-memory {_mebibytes((host / (1 - MARGIN)) + baseline)}"]
    if gpu:
        budgets.insert(0, f"--gpu-memory {_mebibytes(device / (1 - MARGIN))}")
    have = f"{human(limits[0])} on the GPU and {human(limits[1])} of memory" if gpu else f"{human(limits[1])} of memory"
    spill = "" if scratch is not None else ", give --scratch for hidden states"
    return f"a step of --streamed does not fit into {have}: it takes {' and '.join(budgets)}; lower --batch{spill}"


def _mebibytes(nbytes: float) -> str:
    return f"{-(-int(nbytes) >> 20) + 1}MiB"
