"""A model opened for sweeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch

from streamprune.errors import CheckpointError, UsageError
from streamprune.model.skeleton import Skeleton
from streamprune.output import sparse24
from streamprune.pipeline.progress import Progress
from streamprune.storage.checkpoint import Checkpoint, resolve_model
from streamprune.storage.reader import ReaderKind
from streamprune.streaming.device import PlannedDevice, paging_device
from streamprune.streaming.pager import GPU_READ_THREADS, READ_THREADS, Pager
from streamprune.streaming.sweeper import Sweeper


@contextmanager
def open_model(
    model: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    micro_batch: int = 1,
    scope: Literal["units", "matrices"] = "units",
    pruned: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    reader: ReaderKind = "buffered",
    read_threads: int | None = None,
    planned: torch.device | None = None,
) -> Iterator[Sweeper]:
    """A model ready for sweeps: checkpoint, skeleton and pager. With `pruned`, also one of compressed weights.

    For a `planned` device, which need not be there, nothing is read but config.json and headers.
    """
    where = planned or compute_device(device)
    path = resolve_model(model, trust_remote_code=trust_remote_code)
    with ExitStack() as stack:
        if pruned:
            path = stack.enter_context(sparse24.decompressed(path))
        checkpoint = stack.enter_context(Checkpoint(path, reader))
        if sparse24.is_compressed(checkpoint.config):
            raise CheckpointError(f"{path} holds compressed 2:4 weights; prune the dense model it came from")
        compute = compute_dtype(dtype, where, checkpoint)
        skeleton = Skeleton(checkpoint, compute, where, trust_remote_code=trust_remote_code, load=planned is None)
        threads = read_threads or (READ_THREADS if where.type == "cpu" else GPU_READ_THREADS)
        advance = progress.advance if progress is not None else lambda nbytes, **facts: None
        transfers = paging_device(where) if planned is None else PlannedDevice(where)
        pager = Pager(checkpoint, skeleton.entries, transfers, readers=threads, progress=advance)
        sweeper = Sweeper(skeleton, pager, micro_batch, scope)
        stack.callback(sweeper.close)
        yield sweeper


def compute_device(name: str | None) -> torch.device:
    """The torch device of `--device`; by default the first GPU, or the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: not a device; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UsageError(
            f"--device {name} is not available here; use cpu" + (", or cuda" if torch.cuda.is_available() else "")
        )
    return device


def compute_dtype(name: str | None, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The compute dtype: as asked; else float32 on a CPU (few are fast in bfloat16), the stored one on a GPU."""
    if name is not None:
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    # Most bytes: old exports keep a float32 rotary buffer beside float16 weights.
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
