"""Hidden states of all sequences between layers and between sweeps: on the device, on the host, or on a scratch disk.

Of spilled ones only parts are on the device, a micro-batch at a time, so that it computes on any number of sequences. A
thread carries parts away behind the computing and brings the next one ahead of it.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from streamprune.errors import OutputError
from streamprune.paging.device import Device
from streamprune.storage.scratch import read_at, scratch_file, write_at

Place = Literal["device", "host", "scratch"]
Room = Future[Tensor] | int  # of hidden states: memory that may still be registered, or an offset in the file
WRITES = 2  # parts on their way out
# Parts of spilled hidden states on the device at the same time: two that are read and those after them, two on their
# way out, and what the layer puts out.
PARTS = 7
PIECE_BYTES = 256 << 20


class Activations:
    """Memory or file of a sweeper's hidden states, and the thread that moves them.

    Args:
        place: on the "device", in "host" memory (beside a CPU it is the device's), or in a file on "scratch".
        transfers: moves tensors between the device and the host.
        scratch: directory of the file, which has no name and goes with the process.
        say_staged: is called, by a thread, when host memory cannot be registered: parts go by way of pinned memory.
    """

    def __init__(
        self,
        device: torch.device,
        place: Place,
        transfers: Device,
        scratch: Path | None = None,
        say_staged: Callable[[], object] = lambda: None,
    ) -> None:
        self.device, self.scratch, self.transfers = device, scratch, transfers
        self.on_file = place == "scratch"
        self.spills = self.on_file or (place == "host" and not transfers.direct)
        self._worker: ThreadPoolExecutor | None = None
        self._failed: BaseException | None = None
        self._writes: deque[Future[None]] = deque()
        self._descriptor, self._end, self._live = -1, 0, 0
        self._free: dict[int, list[Room]] = {}  # of hidden states that are gone, by bytes
        self._leaving: deque[list[Future[Tensor]]] = deque()  # memory to give back, in the order of that
        self._registrar: ThreadPoolExecutor | None = None
        self._staging = torch.empty(0, dtype=torch.uint8)
        self._staged, self._say_staged = False, say_staged

    def several(self, count: int, shape: tuple[int, ...], dtype: torch.dtype) -> list[States]:
        """Make `count` new hidden states [n, seq, d], with anything in them.

        Raises:
            OutputError: the scratch disk is full or cannot be written.
        """
        if self.spills:
            return [Spilled(self, shape, dtype) for _ in range(count)]
        if not self.transfers.direct:
            # Each by itself: a GPU's allocator finds no room for all of them together where a part was taken since.
            return [torch.empty(shape, dtype=dtype, device=self.device) for _ in range(count)]
        # One tensor that stays: those that come and go among a layer's activations leave holes in the heap.
        return list(torch.empty((count, *shape), dtype=dtype, device=self.device).unbind())

    def close(self) -> None:
        """End the thread and the file."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)
            self._worker = None
        while self._leaving:  # what of that was called off
            self._give_back()
        if self._registrar is not None:
            self._let_go([room for rooms in self._free.values() for room in rooms])
            self._free.clear()
            self._registrar.shutdown()
            self._registrar = None
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def room(self, nbytes: int) -> Room:
        """Take room for hidden states: host memory, or an offset in the file.

        Raises:
            OutputError: the scratch disk is full or cannot be written.
        """
        self._live += 1
        if self._free.get(nbytes):
            return self._free[nbytes].pop()
        if not self.on_file:
            # By a thread, ahead of the sweep: a GPU takes seconds to register what all boundaries need.
            if self._registrar is None:
                self._registrar = ThreadPoolExecutor(1, thread_name_prefix="streamprune-arena")
            return self._registrar.submit(self._take, nbytes)
        if self._descriptor < 0:
            self._descriptor = scratch_file(self.scratch)
        offset, self._end = self._end, self._end + nbytes
        try:
            # Taken now: what is full is full before the sweep.
            os.posix_fallocate(self._descriptor, offset, nbytes)
        except OSError as error:
            raise OutputError(
                f"--scratch {self.scratch}: {error.strerror}; {self._end:,} bytes of hidden states go there, "
                "choose another"
            ) from error
        return offset

    def _take(self, nbytes: int) -> Tensor:
        memory, registered = self.transfers.arena(nbytes)
        if not registered:
            self._staged = True
            self._say_staged()
        return memory

    def release(self, nbytes: int, place: Room) -> None:
        """Give back the room of hidden states that are gone, for others to take."""
        self._live -= 1
        self._free.setdefault(nbytes, []).append(place)
        if not self._live:  # the next ones may be of another size, and would find this room of no use
            self._let_go([room for rooms in self._free.values() for room in rooms])
            self._free.clear()
            self._end = 0

    def _let_go(self, rooms: list[Room]) -> None:
        """Give back memory, after all that was queued on it."""
        arenas = [room for room in rooms if isinstance(room, Future)]
        if not arenas:
            return
        self._leaving.append(arenas)
        if self._worker is not None:
            self._worker.submit(self._give_back)
        else:
            self._give_back()

    def _give_back(self) -> None:
        for arena in self._leaving.popleft():
            self.transfers.release(arena.result())

    def bring(self, place: Room, offset: int, buffer: Tensor) -> Future[None]:
        """Start to fill a new tensor on the device; the future is done when its values are there."""

        def work() -> None:
            host = buffer if self.transfers.direct else self._host(place, offset, buffer)
            if isinstance(place, int):
                read_at(self._descriptor, host, place + offset, self.scratch)
            elif self._staged:
                host.copy_(_view(place.result(), offset, buffer))
            if host is not buffer:
                # The worker waits, so that whoever waits for the worker needs no event.
                self.transfers.chunk_free(self.transfers.copy(buffer, host))

        return self._submit(work)

    def fetch(self, place: Room, offset: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return a part in host memory, to be read only, once all that was carried away before has arrived."""
        if isinstance(place, Future):
            self._submit(lambda: None).result()
            return place.result()[offset : offset + shape.numel() * dtype.itemsize].view(dtype).view(shape)
        host = torch.empty(shape, dtype=dtype)
        self._submit(lambda: read_at(self._descriptor, host, place + offset, self.scratch)).result()
        return host

    def carry(self, place: Room, offset: int, value: Tensor) -> None:
        """Start to carry a tensor away; its values must stay until it has gone."""

        def work() -> None:
            host = value.contiguous() if self.transfers.direct else self._host(place, offset, value)
            if not self.transfers.direct:
                self.transfers.chunk_free(self.transfers.copy(host, value))
            if isinstance(place, int):
                write_at(self._descriptor, host, place + offset, self.scratch)
            elif self._staged:
                _view(place.result(), offset, value).copy_(host)

        if len(self._writes) == WRITES:
            self._writes.popleft().result()
        self._writes.append(self._submit(work))

    def _submit(self, work: Callable[[], None]) -> Future[None]:
        """Queue work for the one thread, so that what is read was written before. After a failure all work fails."""
        ready = self.transfers.record_consumed()  # after all that was queued on the tensor's memory

        def run() -> None:
            if self._failed is not None:
                raise self._failed
            try:
                self.transfers.copy_waits(ready)
                work()
            except BaseException as error:
                self._failed = error
                raise

        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="streamprune-activations")
        return self._worker.submit(run)

    def _host(self, place: Room, offset: int, like: Tensor) -> Tensor:
        """View host memory in the shape of a part: where it stays, or pinned, on its way from there and to there."""
        if isinstance(place, Future):
            memory = place.result()  # before it is asked whether copies are staged
            if not self._staged:
                return _view(memory, offset, like)
        if len(self._staging) < like.nbytes:
            self._staging = self.transfers.chunk(like.nbytes)
        return _view(self._staging, 0, like)


def _view(memory: Tensor, offset: int, like: Tensor) -> Tensor:
    return memory[offset : offset + like.nbytes].view(like.dtype).view(like.shape)


class Spilled:
    """Hidden states [n, seq, d] outside the device. `states[start:stop]` is a new tensor there, to be read only."""

    def __init__(self, owner: Activations, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = torch.Size(shape), dtype
        self._owner, self._of_one = owner, self.shape[1:].numel() * dtype.itemsize
        self._place = owner.room(self.nbytes)
        self._coming: dict[tuple[int, int], tuple[Tensor, Future[None]]] = {}

    def __del__(self) -> None:
        if hasattr(self, "_place"):
            self._owner.release(self.nbytes, self._place)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences."""
        return self.shape.numel() * self.dtype.itemsize

    def __getitem__(self, part: slice) -> Tensor:
        """Return a part, and start to bring the one after it."""
        start, stop = part.start, part.stop
        self.ahead(part)
        buffer, coming = self._coming.pop((start, stop))
        if stop < len(self):
            self.ahead(slice(stop, min(stop + stop - start, len(self))))
        coming.result()
        return buffer

    def __setitem__(self, part: slice, value: Tensor) -> None:
        """Start to write a part; `value` must not change afterwards."""
        # What is on its way to the device there is older than this value.
        for start, stop in [key for key in self._coming if key[0] < part.stop and part.start < key[1]]:
            del self._coming[start, stop]
        self._owner.carry(self._place, part.start * self._of_one, value.detach())

    def fetch(self, part: slice) -> Tensor:
        """Return a part in host memory, to be read only."""
        shape = torch.Size((part.stop - part.start, *self.shape[1:]))
        return self._owner.fetch(self._place, part.start * self._of_one, shape, self.dtype)

    def ahead(self, part: slice) -> None:
        """Start to bring a part to the device, unless it is on its way."""
        if (part.start, part.stop) not in self._coming:
            shape = (part.stop - part.start, *self.shape[1:])
            buffer = torch.empty(shape, dtype=self.dtype, device=self._owner.device)
            coming = self._owner.bring(self._place, part.start * self._of_one, buffer)
            self._coming[part.start, part.stop] = buffer, coming


States = Tensor | Spilled  # hidden states [n, seq, d]; parts of the first are views


def ahead(states: States, part: slice) -> None:
    """Announce that `states[part]` will be asked for soon."""
    if isinstance(states, Spilled):
        states.ahead(part)


def pieces(states: States) -> Iterator[Tensor]:
    """Yield pieces of hidden states in host memory, to be read only: as many sequences as PIECE_BYTES hold, or one."""
    step = max(1, PIECE_BYTES * len(states) // max(1, states.nbytes))
    for start in range(0, len(states), step):
        part = slice(start, min(start + step, len(states)))
        yield states[part].detach().cpu() if isinstance(states, Tensor) else states.fetch(part)


def whole(states: States) -> Tensor:
    """Return all hidden states in host memory, to be read only."""
    return torch.cat(list(pieces(states)))
