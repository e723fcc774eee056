"""Source of a run: a model, opened for sweeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from streamprune.errors import CheckpointError
from streamprune.kernels.launch import Backend
from streamprune.model.skeleton import Skeleton
from streamprune.output import sparse24
from streamprune.paging import device as devices
from streamprune.paging.pager import Pager
from streamprune.pipeline.progress import Progress
from streamprune.storage.checkpoint import Checkpoint, resolve_model
from streamprune.storage.reader import ReaderKind
from streamprune.streaming.sweeper import Sweeper
from streamprune.values import AUTO

STAGED = "host memory cannot be registered with the GPU (ulimit -l), so copies are staged"


@dataclass(frozen=True)
class Source:
    """Model, and how it is computed with and read; the options of `PruneConfig` by the same names.

    Attributes:
        model: directory or hub id.
        micro_batch: sequences per layer call.
        scope: what is scored and moved: the matrices that "units" are cut from, or all "matrices" of a layer.
        backend: of the kernels, where it is not the device's own.
        decompress: take compressed weights too, by way of a dense copy.
        planned: a device that need not be there: nothing is read but config.json and headers.
    """

    model: str
    device: str | None = None
    dtype: str = AUTO
    micro_batch: int = 1
    scope: Literal["units", "matrices"] = "units"
    trust_remote_code: bool = False
    reader: ReaderKind = "buffered"
    read_threads: int | None = None
    backend: Backend | None = None
    decompress: bool = False
    planned: torch.device | None = None

    @contextmanager
    def open(self, progress: Progress | None = None) -> Iterator[Sweeper]:
        """Open the model for sweeps, as long as the block runs: checkpoint, skeleton and pager.

        Raises:
            StreampruneError: a model that cannot be read, a device that is not there.
        """
        where = self.planned or devices.compute_device(self.device)
        path = resolve_model(self.model, trust_remote_code=self.trust_remote_code)
        with ExitStack() as stack:
            if self.decompress:
                path = stack.enter_context(sparse24.decompressed(path))
            checkpoint = stack.enter_context(Checkpoint(path, self.reader))
            if sparse24.is_compressed(checkpoint.config):
                raise CheckpointError(f"{path} holds compressed 2:4 weights; prune the dense model it came from")
            dtype = devices.compute_dtype(self.dtype, where, checkpoint)
            skeleton = Skeleton(
                checkpoint,
                dtype,
                where,
                attentions=devices.attentions(where, dtype),
                trust_remote_code=self.trust_remote_code,
                load=self.planned is None,
            )
            stack.callback(skeleton.release)
            transfers = devices.paging_device(where, planned=self.planned is not None)
            pager = Pager(
                checkpoint,
                skeleton.entries,
                transfers,
                readers=self.read_threads or transfers.read_threads,
                progress=progress.advance if progress is not None else lambda nbytes, **facts: None,
            )
            sweeper = Sweeper(skeleton, pager, self.micro_batch, self.scope, self.backend)
            if progress is not None:
                sweeper.staged = partial(progress.say, STAGED)
            stack.callback(sweeper.close)
            yield sweeper
