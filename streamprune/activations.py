"""Hidden states between a forward and a backward sweep: in memory, or spilled to the host or to a scratch disk.

Spilled, three buffers on the device hold what is being computed on; a thread carries the rest away behind the forward
sweep and brings it back ahead of the backward one. What is still in a buffer at the turn is not brought back.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from streamprune.checkpoint import byte_view
from streamprune.devices import Device
from streamprune.errors import OutputError

Place = Literal["device", "host", "scratch"]
BUFFERS = 3  # a layer's input and output, and one on its way


class Boundaries:
    """The inputs of consecutive layers, and the last one's output: `count` tensors of one shape.

    A forward sweep takes `buffer(i)`, writes it, and calls `save(i)`, for each i upwards; a backward sweep calls
    `take(i)` downwards. At most two buffers are in use at a time: i and i + 1.

    Args:
        shape: [n, seq, d].
        place: where they stay: on the "device", in "host" memory (pinned beside a GPU), or in a file on "scratch".
        transfers: moves tensors between the device and the host.
        scratch: directory of the file, which has no name and goes with the process.

    Raises:
        OutputError: the scratch disk is full or cannot be written.
    """

    def __init__(
        self,
        count: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        place: Place,
        transfers: Device,
        scratch: Path | None = None,
    ) -> None:
        self.count, self.shape, self.dtype, self.place, self.scratch = count, shape, dtype, place, scratch
        self._transfers = transfers
        whole = place == "device" or (place == "host" and transfers.direct)
        # One tensor that stays: those that come and go among a layer's activations leave holes in the heap.
        self._buffers = torch.empty((count if whole else min(BUFFERS, count), *shape), dtype=dtype, device=device)
        self._holds: list[int] = [-1] * len(self._buffers)
        self._moving: dict[int, Future[None]] = {}  # by buffer
        self._worker: ThreadPoolExecutor | None = None
        if whole:
            return
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="streamprune-boundaries")
        # Beside a GPU the file is written from pinned memory, one boundary at a time.
        hosted = count if place == "host" else int(not transfers.direct)
        self._host = [transfers.chunk(self.nbytes).view(dtype).view(shape) for _ in range(hosted)]
        self._file = _scratch_file(scratch, count * self.nbytes) if place == "scratch" else None

    @property
    def nbytes(self) -> int:
        """Bytes of one boundary."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def buffer(self, index: int) -> Tensor:
        """Where boundary `index` is to be written; valid until `index` + 2 is asked for."""
        return self._buffers[self._settled(index % len(self._buffers), index)]

    def save(self, index: int) -> None:
        """Boundary `index` is written; it begins to be carried away."""
        if self._worker is not None:
            self._move(index, self._carry)

    def take(self, index: int) -> Tensor:
        """Boundary `index`, and a start on bringing back the one below; valid until `index` − 2 is asked for."""
        slot = index % len(self._buffers)
        if self._worker is not None:
            self._bring(index)
            self._settled(slot, index)
            if index:
                self._bring(index - 1)
        return self._buffers[slot]

    def close(self) -> None:
        """End the thread and the file."""
        if self._worker is not None:
            self._worker.shutdown()
            if self._file is not None:
                os.close(self._file)
                self._file = None

    def _settled(self, slot: int, index: int) -> int:
        """Wait until nothing moves into or out of a buffer; it is boundary `index`'s from now on."""
        if (moving := self._moving.pop(slot, None)) is not None:
            moving.result()
        self._holds[slot] = index
        return slot

    def _bring(self, index: int) -> None:
        """Start to bring a boundary back, unless its buffer has it."""
        slot = index % len(self._buffers)
        if self._holds[slot] != index:
            self._settled(slot, index)
            self._move(index, self._fetch)

    def _move(self, index: int, work: Callable[[int, Tensor], None]) -> None:
        assert self._worker is not None, "only spilled boundaries move"
        slot = index % len(self._buffers)
        ready = self._transfers.record_consumed()  # after all that was queued on the buffer

        def run() -> None:
            self._transfers.copy_waits(ready)
            work(index, self._buffers[slot])

        self._moving[slot] = self._worker.submit(run)

    def _carry(self, index: int, buffer: Tensor) -> None:
        if not self._host:
            self._write(index, buffer)
            return
        host = self._host[index % len(self._host)]
        self._transfers.chunk_free(self._transfers.copy(host, buffer))
        if self._file is not None:
            self._write(index, host)

    def _fetch(self, index: int, buffer: Tensor) -> None:
        if not self._host:
            self._read(index, buffer)
            return
        host = self._host[index % len(self._host)]
        if self._file is not None:
            self._read(index, host)
        # The worker waits, so that whoever waits for the worker needs no event.
        self._transfers.chunk_free(self._transfers.copy(buffer, host))

    def _write(self, index: int, tensor: Tensor) -> None:
        assert self._file is not None
        view, done = byte_view(tensor), 0
        try:
            while done < len(view):
                done += os.pwrite(self._file, view[done:], index * self.nbytes + done)
        except OSError as error:
            raise OutputError(
                f"--scratch {self.scratch}: {error.strerror}; free some space or choose another"
            ) from error

    def _read(self, index: int, tensor: Tensor) -> None:
        assert self._file is not None
        view, done = byte_view(tensor), 0
        while done < len(view):
            count = os.preadv(self._file, [view[done:]], index * self.nbytes + done)
            if count == 0:
                raise OutputError(f"--scratch {self.scratch}: its file of hidden states was cut off; run again")
            done += count


def _scratch_file(directory: Path | None, nbytes: int) -> int:
    """A file without a name, with room for `nbytes`: what is full is full before the sweep."""
    assert directory is not None, "the planner places nothing on scratch where there is none"
    descriptor = -1
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix="streamprune-boundaries-", dir=directory)
        os.unlink(name)
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if descriptor >= 0:
            os.close(descriptor)
        raise OutputError(
            f"--scratch {directory}: {error.strerror}; {nbytes:,} bytes of hidden states go there, choose another"
        ) from error
    return descriptor
