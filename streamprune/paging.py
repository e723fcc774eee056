"""Layers into two permanent device slots, one being read while the other is computed on.

On a CPU the readers fill the slot itself. On CUDA they fill pinned chunks, and a copy stream moves those into
the slot. Three waits make that safe, and each is needed (tests/test_paging.py takes them away one by one):

- copied[slot]: compute starts on a slot after the last copy into it.
- consumed[slot]: the copy stream overwrites a slot after the compute that was queued on it.
- the chunk's own event: a reader refills a pinned chunk after the copy out of it.

A slot is held until its layer's gradients are finished, that is until the consumer asks for the next layer.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from streamprune.checkpoint import Checkpoint, TensorEntry, byte_view

CHUNK_BYTES = 16 << 20
RING_CHUNKS = 4  # two in flight to the device while two are being read
READERS = 2
ALIGNMENT = 64  # bytes; enough for any dtype and for vector loads


class Device(Protocol):
    """What paging asks of a device. Events are opaque; recording and waiting only queue work."""

    direct: bool  # readers may write the slot's memory themselves

    def buffer(self, nbytes: int) -> Tensor:
        """Device memory, uint8 [nbytes]."""

    def chunk(self, nbytes: int) -> Tensor:
        """Host memory that the device can copy from, uint8 [nbytes]."""

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Queue a copy of a chunk on the copy stream; the event of its completion."""

    def record_copied(self) -> Any:
        """An event after all copies queued so far."""

    def record_consumed(self) -> Any:
        """An event after all compute queued so far."""

    def compute_waits(self, copied: Any) -> None:
        """Compute queued from now on starts after the event."""

    def copy_waits(self, consumed: Any) -> None:
        """Copies queued from now on start after the event."""

    def chunk_free(self, event: Any) -> None:
        """Block the calling reader until its chunk has been copied out."""


class HostDevice:
    """A CPU: memory is memory, everything is finished when it returns."""

    direct = True

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    chunk = buffer

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source)

    def record_copied(self) -> None: ...

    def record_consumed(self) -> None: ...

    def compute_waits(self, copied: None) -> None: ...

    def copy_waits(self, consumed: None) -> None: ...

    def chunk_free(self, event: None) -> None: ...


class CudaDevice:
    """One GPU: pinned chunks, a copy stream beside the current one, CUDA events."""

    direct = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.compute = torch.cuda.current_stream(device)
        self.copies = torch.cuda.Stream(device)

    def buffer(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)

    def chunk(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self.copies):
            target.copy_(source, non_blocking=True)
        return self.copies.record_event()

    def record_copied(self) -> torch.cuda.Event:
        return self.copies.record_event()

    def record_consumed(self) -> torch.cuda.Event:
        return self.compute.record_event()

    def compute_waits(self, copied: torch.cuda.Event) -> None:
        self.compute.wait_event(copied)

    def copy_waits(self, consumed: torch.cuda.Event) -> None:
        self.copies.wait_event(consumed)

    def chunk_free(self, event: torch.cuda.Event) -> None:
        event.synchronize()


def paging_device(device: torch.device) -> Device:
    """The paging side of a torch device."""
    return CudaDevice(device) if device.type == "cuda" else HostDevice()


@dataclass(frozen=True)
class Page:
    """A layer in its slot: tensors as stored, by their names inside the layer, views into the slot."""

    layer: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class _Read:
    """One read: `nbytes` at `offset` of shard `file` to byte `position` of the slot."""

    file: int
    offset: int
    position: int
    nbytes: int


class Pager:
    """Two slots and the threads that fill them.

    Args:
        checkpoint: read from.
        entries: for each layer, its tensors by their names inside the layer.
        device: from `paging_device`.
        poison: fill a slot with NaN when its layer is released (tests).
        progress: called with a layer's bytes when it is released.

    Attributes:
        resident_bytes: bytes of the slots and chunks.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        entries: Sequence[Mapping[str, TensorEntry]],
        device: Device,
        *,
        poison: bool = False,
        progress: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self.checkpoint, self.entries, self.device, self.poison = checkpoint, entries, device, poison
        self._progress = progress
        size = max(sum(_aligned(entry.nbytes) for entry in layer.values()) for layer in entries)
        self._slots = [device.buffer(size) for _ in range(2)]
        count = 0 if device.direct else RING_CHUNKS
        self._chunks: queue.Queue[tuple[Tensor, Any]] = queue.Queue()
        for _ in range(count):
            self._chunks.put((device.chunk(CHUNK_BYTES), None))
        self.resident_bytes = 2 * size + count * CHUNK_BYTES
        # Fresh memory may still be in use by compute that was queued before it was freed.
        self._consumed: list[Any] = [device.record_consumed()] * 2
        # Dropping pages that would stay in the cache makes every later sweep read the disk again.
        self._drop_cache = self.layer_bytes() > psutil.virtual_memory().available // 2

    def layer_bytes(self) -> int:
        """Bytes of all layers: what one sweep reads."""
        return sum(map(self.bytes_of, range(len(self.entries))))

    def bytes_of(self, layer: int) -> int:
        """Bytes of one layer as stored."""
        return sum(entry.nbytes for entry in self.entries[layer].values())

    @contextmanager
    def pages(self, order: Sequence[int]) -> Iterator[Iterator[Page]]:
        """The layers of `order`, one at a time; a page is valid until the next one is asked for.

        A context manager, so that the filling thread is stopped however the block ends.
        """
        handover = _Handover(self._consumed)
        # A daemon, since Ctrl-C may come at any point, also while the sweep is being ended: the thread would then wait
        # for ever, and the process for the thread.
        thread = threading.Thread(target=self._fill, args=(order, handover), name="streamprune-pager", daemon=True)
        try:
            thread.start()
            yield self._held(order, handover)
        finally:
            handover.stop()
            if thread.ident is not None:
                thread.join()
            # Copies that nobody waited for (after an error) end before the slots are used again or freed; and what
            # was queued on the slots last holds for the next sweep's first copies too.
            self.device.compute_waits(self.device.record_copied())
            self._consumed = [self.device.record_consumed()] * 2

    def _held(self, order: Sequence[int], handover: _Handover) -> Iterator[Page]:
        for number, layer in enumerate(order):
            copied = handover.take()
            slot = self._slots[number % 2]
            self.device.compute_waits(copied)
            yield Page(layer, self._views(layer, slot))
            if self.poison:
                slot.fill_(0xFF)  # NaN in every float dtype
            handover.release(number % 2, self.device.record_consumed())
            self._progress(self.bytes_of(layer))

    def _fill(self, order: Sequence[int], handover: _Handover) -> None:
        try:
            with ThreadPoolExecutor(READERS, thread_name_prefix="streamprune-reader") as readers:
                for number, layer in enumerate(order):
                    consumed = handover.acquire(number % 2)
                    if handover.stopped:
                        return
                    if consumed is not None:
                        self.device.copy_waits(consumed)
                    slot = self._slots[number % 2]
                    for done in [readers.submit(self._read, slot, read) for read in self._reads(layer)]:
                        done.result()
                    handover.put(self.device.record_copied())
        except BaseException as error:
            handover.put(error)

    def _read(self, slot: Tensor, read: _Read) -> None:
        target = slot[read.position : read.position + read.nbytes]
        if self.device.direct:
            self._fetch(read, target)
        else:
            chunk, event = self._chunks.get()
            try:
                if event is not None:
                    self.device.chunk_free(event)
                source = chunk[: read.nbytes]
                self._fetch(read, source)
                event = self.device.copy(target, source)
            finally:
                self._chunks.put((chunk, event))

    def _fetch(self, read: _Read, target: Tensor) -> None:
        self.checkpoint.read_into(read.file, read.offset, byte_view(target), drop_cache=self._drop_cache)

    def _reads(self, layer: int) -> Iterator[_Read]:
        position = 0
        for entry in self.entries[layer].values():
            for start in range(0, entry.nbytes, CHUNK_BYTES):
                size = min(CHUNK_BYTES, entry.nbytes - start)
                yield _Read(entry.file, entry.offset + start, position + start, size)
            position += _aligned(entry.nbytes)

    def _views(self, layer: int, slot: Tensor) -> dict[str, Tensor]:
        views, position = {}, 0
        for name, entry in self.entries[layer].items():
            views[name] = slot[position : position + entry.nbytes].view(entry.dtype).view(entry.shape)
            position += _aligned(entry.nbytes)
        return views


class _Handover:
    """Slots between the filling thread and the consumer."""

    def __init__(self, consumed: Sequence[Any]) -> None:
        self.stopped = False
        self._filled: queue.Queue[Any] = queue.Queue()
        self._free: list[queue.Queue[Any]] = [queue.Queue(), queue.Queue()]
        for free, event in zip(self._free, consumed, strict=True):
            free.put(event)

    def take(self) -> Any:
        """The copied event of the next slot; raises what the filling thread met."""
        item = self._filled.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def put(self, item: Any) -> None:
        self._filled.put(item)

    def acquire(self, slot: int) -> Any:
        """Wait until the consumer lets go of `slot`; its consumed event, None at first."""
        return self._free[slot].get()

    def release(self, slot: int, consumed: Any) -> None:
        self._free[slot].put(consumed)

    def stop(self) -> None:
        self.stopped = True
        for free in self._free:
            free.put(None)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
