"""Blocks of bytes outside the device, in pieces on their way to its slots and back.

From registered memory the device copies by itself; a thread asks it for some pieces at a time, so that weights pass
between them: whole layers of state would keep the link from the readers, and leave it idle when these have no chunks
left to read into. From other memory, and from a file on a scratch disk, two threads bring blocks ahead of the computing
and carry them away behind it: by way of chunks that the device can copy from, or, where it is direct, between the file
and the slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from typing import Any, Protocol

from torch import Tensor

from streamprune.paging.device import Device
from streamprune.paging.pager import CHUNK_BYTES

CHUNKS = 2  # each way: one is read or written, or waits, while the other is on the link
Span = tuple[Tensor, int]  # bytes of a slot, and the offset at which they lie among the blocks
Arrival = Callable[[], Any]  # waits until all is queued or done, and returns the device's event of it, if there is one


class Store(Protocol):
    """Interface of what blocks lie in: memory, or a file."""

    def read(self, tensor: Tensor, offset: int) -> None:
        """Fill a tensor in host memory with the bytes at `offset`."""

    def write(self, tensor: Tensor, offset: int) -> None:
        """Write a tensor in host memory to the bytes at `offset`."""

    def close(self) -> None:
        """Let go of it."""


class Arena:
    """Host memory, uint8 [nbytes], in which blocks lie."""

    def __init__(self, memory: Tensor, device: Device) -> None:
        self.memory, self._device = memory, device

    def close(self) -> None:
        self._device.release(self.memory)

    def read(self, tensor: Tensor, offset: int) -> None:
        tensor.copy_(self.memory[offset : offset + len(tensor)])

    def write(self, tensor: Tensor, offset: int) -> None:
        self.memory[offset : offset + len(tensor)].copy_(tensor)


class Linked:
    """Carrier between slots and registered memory: the device copies, each way on a stream of its own."""

    def __init__(self, memory: Tensor, up: Device, down: Device) -> None:
        self._memory, self._up, self._down = memory, up, down
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="streamprune-state")

    def bring(self, parts: Sequence[Span], consumed: Any, carried: Arrival | None) -> Arrival:
        """Start to fill parts of a slot, after the compute on it and after what was carried out of it."""

        def work() -> Any:
            after(self._up.copy_waits, consumed)
            after(self._up.copy_waits, carried and carried())
            queued = deque[Any]()
            for piece, offset in _pieces(parts, CHUNK_BYTES):
                if len(queued) == CHUNKS:
                    self._up.chunk_free(queued.popleft())
                queued.append(self._up.copy(piece, self._memory[offset : offset + len(piece)]))
            return self._up.record_copied()

        return self._thread.submit(work).result

    def carry(self, parts: Sequence[Span], consumed: Any) -> Arrival:
        """Start to carry parts out of a slot, after the compute on it."""
        after(self._down.copy_waits, consumed)
        for part, offset in parts:
            self._down.copy(self._memory[offset : offset + len(part)], part)
        event = self._down.record_copied()
        return lambda: event

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)


class Staged:
    """Carrier between slots and what the device cannot copy from, by two threads, in order.

    Raises:
        StreampruneError: as the store does, when a wait for what it was asked for is over.
    """

    def __init__(self, store: Store, up: Device, down: Device, slot_bytes: int) -> None:
        self._store, self._up, self._down = store, up, down
        self._size, count = min(CHUNK_BYTES, slot_bytes), 0 if up.direct else CHUNKS
        self._coming = deque[tuple[Tensor, Any]]((up.chunk(self._size), None) for _ in range(count))
        self._leaving = [down.chunk(self._size) for _ in range(count)]
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="streamprune-state-reader")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="streamprune-state-writer")

    def bring(self, parts: Sequence[Span], consumed: Any, carried: Arrival | None) -> Arrival:
        """Start to fill parts of a slot, as `Linked.bring` does."""

        def work() -> Any:
            # Before the first is read: where the device is direct that goes into the slot itself.
            after(self._up.copy_waits, carried and carried())
            after(self._up.copy_waits, consumed)
            if self._up.direct:
                for part, offset in parts:
                    self._store.read(part, offset)
            else:
                for part, offset in _pieces(parts, self._size):
                    self._bring_piece(part, offset)
            return self._up.record_copied()

        return self._reader.submit(work).result

    def _bring_piece(self, part: Tensor, offset: int) -> None:
        chunk, event = self._coming.popleft()
        after(self._up.chunk_free, event)
        self._store.read(chunk[: len(part)], offset)
        self._coming.append((chunk, self._up.copy(part, chunk[: len(part)])))

    def carry(self, parts: Sequence[Span], consumed: Any) -> Arrival:
        """Start to carry parts out of a slot, as `Linked.carry` does; they have arrived when the wait is over."""

        def work() -> None:
            after(self._down.copy_waits, consumed)
            if self._down.direct:
                for part, offset in parts:
                    self._store.write(part, offset)
            else:
                self._carry_pieces(parts)

        return self._writer.submit(work).result

    def _carry_pieces(self, parts: Sequence[Span]) -> None:
        queued = deque[tuple[Tensor, int, Any]]()
        for (part, offset), chunk in zip(_pieces(parts, self._size), cycle(self._leaving)):
            if len(queued) == CHUNKS:
                self._write(*queued.popleft())
            staged = chunk[: len(part)]
            queued.append((staged, offset, self._down.copy(staged, part)))
        while queued:
            self._write(*queued.popleft())

    def _write(self, staged: Tensor, offset: int, copied: Any) -> None:
        self._down.chunk_free(copied)
        self._store.write(staged, offset)

    def close(self) -> None:
        """End the threads."""
        for pool in (self._reader, self._writer):
            pool.shutdown(cancel_futures=True)


def _pieces(parts: Sequence[Span], size: int) -> Iterator[Span]:
    for part, offset in parts:
        for start in range(0, len(part), size):
            yield part[start : start + size], offset + start


def staging_bytes(slot_bytes: int) -> int:
    """Count the bytes of host memory that `Staged` takes beside a device that is not direct."""
    return 2 * CHUNKS * min(CHUNK_BYTES, slot_bytes)


def after(wait: Callable[[Any], None], event: Any) -> None:
    """Call `wait` with an event, if there is one."""
    if event is not None:
        wait(event)
