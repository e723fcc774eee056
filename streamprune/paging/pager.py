"""Paging of layers into permanent device slots, one being read while another is computed on.

On a CPU the readers fill the slot itself. On CUDA they fill pinned chunks, and a copy stream moves those into
the slot. Three waits make that safe, and each is needed (tests/paging/test_pager.py takes them away one by one):

- copied[slot]: compute starts on a slot after the last copy into it.
- consumed[slot]: the copy stream overwrites a slot after the compute that was queued on it.
- the chunk's own event: a reader refills a pinned chunk after the copy out of it.

A slot is held until its layer's gradients are finished, that is until the consumer asks for the next layer. It keeps
its layer until another is read over it, so that a sweep begins with the layers that the one before ended with.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor

from streamprune.paging.device import READ_THREADS, Device
from streamprune.paging.host_memory import available_memory
from streamprune.storage.checkpoint import Checkpoint, TensorEntry, byte_view
from streamprune.storage.reader import DISK_BLOCK

CHUNK_BYTES = 16 << 20  # at least a block
ALIGNMENT = 64  # bytes, of tensors on a device; enough for any dtype and for vector loads

Turn = Literal["back", "again"]  # how a sweep is followed by the next


@dataclass(frozen=True)
class Page:
    """Layer in its slot: tensors as stored, by their names inside the layer, views into the slot."""

    layer: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Step:
    """Turn of a layer in a sweep.

    Attributes:
        read: the layer must be read; else the slot holds it.
        after: the last step before this one that uses the slot, −1 if none does: the slot is filled when that one is
            through.
        kept: nothing is read over the layer in this sweep.
    """

    layer: int
    slot: int
    read: bool
    after: int
    kept: bool = True


def schedule(order: Sequence[int], held: Sequence[int | None], then: Turn, busy: int = 1) -> list[Step]:
    """Choose the slot of each layer in a sweep: the one that holds it, else the one whose layer is needed last.

    Args:
        held: the layer of each slot now; at least two slots.
        then: whether the next sweep comes "back" through `order` or passes it "again": what is needed after this sweep.
        busy: steps before a step whose slots it does not take, while there are others: they are computed on, or left.
    """
    future = [*order, *(reversed(order) if then == "back" else order)]
    uses: dict[int, list[int]] = {}
    for time_of_use, layer in reversed(list(enumerate(future))):
        uses.setdefault(layer, []).append(time_of_use)  # the next one last
    slots, steps, last_use, busy = list(held), list[Step](), [-1] * len(held), min(busy, len(held) - 1)

    def next_use(slot: int) -> float:
        if (layer := slots[slot]) is None:
            return math.inf
        times = uses.get(layer, [])
        return times[-1] if times else math.inf

    for number, layer in enumerate(order):
        read = layer not in slots
        if read:
            # The slot before is computed on while this one fills.
            free = set(range(len(slots))) - {step.slot for step in steps[-busy:]}
            slot = max(free, key=lambda s: (slots[s] is None, next_use(s), -s))
            if last_use[slot] >= 0:
                steps[last_use[slot]] = replace(steps[last_use[slot]], kept=False)
        else:
            slot = slots.index(layer)
        steps.append(Step(layer, slot, read, last_use[slot] if read else -1))
        slots[slot], last_use[slot] = layer, number
        uses[layer].pop()
    return steps


@dataclass(frozen=True)
class _Read:
    """Read of `nbytes` at `offset` of shard `file` to `position` in the slot; `stays`: also in the page cache."""

    file: int
    offset: int
    position: int
    nbytes: int
    stays: bool


@dataclass
class _Slot:
    """Slot: device memory for one layer.

    Attributes:
        layer: the one that it holds, None before any.
        copied, consumed: events of the last copy into it and of the last compute on it.
        views: of its memory as each layer's tensors, made at its first visit: a sweep visits thousands.
    """

    buffer: Tensor
    layer: int | None
    copied: Any
    consumed: Any
    views: dict[int, dict[str, Tensor]] = field(default_factory=dict)


class Pager:
    """Pager of a model's layers: slots on the device, and the threads that fill them.

    Two slots are enough; with more, the layers at which one sweep ends are there when the next one begins.

    Args:
        checkpoint: read from.
        entries: for each layer, its tensors by their names inside the layer.
        device: from `paging_device`.
        readers: threads that read.
        poison: fill a slot with NaN when its layer is released and not kept (tests).
        progress: called when a layer is released: its bytes, those `read` for it, `layer`, seconds `waited` for it.

    Attributes:
        slots: how many layers the device may hold, at least 2; memory is taken when they are first needed. To be set
            between sweeps, upwards.
        slot_bytes: bytes of a slot, which the largest layer fits.
        page_cache: bytes of the page cache that layers may take, to be set between sweeps; half of what is free.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        entries: Sequence[Mapping[str, TensorEntry]],
        device: Device,
        *,
        readers: int = READ_THREADS,
        poison: bool = False,
        progress: Callable[..., None] = lambda nbytes, **facts: None,
    ) -> None:
        self.checkpoint, self.entries, self.device, self.poison = checkpoint, entries, device, poison
        self.readers, self.slots, self._progress = readers, 2, progress
        layouts = [_lay_out(layer, as_in_file=device.direct) for layer in entries]
        self._starts, self.slot_bytes = [starts for starts, _ in layouts], max(end for _, end in layouts)
        self._slots: list[_Slot] = []
        self._chunks: queue.Queue[tuple[Tensor, Any]] | None = None
        self.page_cache = available_memory() // 2
        self._passing: int | None = None

    @property
    def _chunk_count(self) -> int:
        """Number of pinned chunks: while a thread reads one, another is on its way to the device."""
        return 0 if self.device.direct else 2 * self.readers

    @property
    def chunk_bytes(self) -> int:
        """Bytes of pinned host memory; none where readers write the slots themselves."""
        return self._chunk_count * CHUNK_BYTES

    def layer_bytes(self) -> int:
        """Return the bytes of all layers: what one sweep reads at the most."""
        return sum(map(self.bytes_of, range(len(self.entries))))

    def bytes_of(self, layer: int) -> int:
        """Return the bytes of one layer as stored."""
        return sum(entry.nbytes for entry in self.entries[layer].values())

    def skip(self, planned: Iterable[int], passed: Iterable[int] = ()) -> None:
        """Tell the progress that layers `planned` are not passed, since an earlier run has; `passed` are instead."""
        nbytes = sum(map(self.bytes_of, planned)) - sum(map(self.bytes_of, passed))
        if nbytes:
            self._progress(0, skipped=nbytes)

    def to_read(self, sweeps: Iterable[tuple[Sequence[int], Turn]]) -> Iterator[list[int]]:
        """Yield the layers that each of these sweeps will read, one after another, given what the slots hold now."""
        held = self._held()
        for order, then in sweeps:
            steps = schedule(order, held, then)
            for step in steps:
                held[step.slot] = step.layer
            yield [step.layer for step in steps if step.read]

    def stays_in_cache(self, layer: int) -> bool:
        """Tell whether a layer, once read, is left in the page cache.

        The same layers are, from sweep to sweep; those above them are read around it. Were all of them left there, each
        would push out those that the next sweep asks for first.
        """
        return sum(map(self.bytes_of, range(layer + 1))) <= self.page_cache

    def _held(self) -> list[int | None]:
        return [self._slots[number].layer if number < len(self._slots) else None for number in range(self.slots)]

    @contextmanager
    def pages(self, order: Sequence[int], then: Turn = "back") -> Iterator[Iterator[Page]]:
        """Give the layers of `order` as pages, one at a time; a page is valid until the next one is asked for.

        This is a context manager, so that the filling thread is stopped however the block ends. `then` says what to
        keep layers for: a next sweep that comes "back" the same way, or one that goes it "again".
        """
        steps = schedule(order, self._held(), then)
        if self._chunks is None:
            chunks: queue.Queue[Any] = queue.Queue()
            for _ in range(self._chunk_count):
                chunks.put((self.device.chunk(CHUNK_BYTES), None))
            self._chunks = chunks  # all of them: readers would wait for those that there was no memory for
        while len(self._slots) <= max((step.slot for step in steps), default=-1):
            # Fresh memory may still be in use by compute that was queued before it was freed.
            self._slots.append(_Slot(self.device.buffer(self.slot_bytes), None, None, self.device.record_consumed()))
        handover = _Handover()
        # A daemon, since Ctrl-C may come at any point, also while the sweep is being ended: the thread would then wait
        # for ever, and the process for the thread.
        thread = threading.Thread(target=self._fill, args=(steps, handover), name="streamprune-pager", daemon=True)
        try:
            thread.start()
            yield self._pages(steps, handover)
        except (MemoryError, RuntimeError) as error:
            error.add_note(f"layer {self._passing}")  # where memory ran out
            raise
        finally:
            handover.stop()
            if thread.ident is not None:
                thread.join()
            # Copies that nobody waited for (after an error) end before the slots are used again or freed; and what
            # was queued on the slots last holds for the next sweep's first copies too.
            self.device.compute_waits(self.device.record_copied())
            consumed = self.device.record_consumed()
            for slot in self._slots:
                slot.consumed = consumed

    def _pages(self, steps: Sequence[Step], handover: _Handover) -> Iterator[Page]:
        for number, step in enumerate(steps):
            start = time.perf_counter()
            handover.take()
            waited = time.perf_counter() - start
            slot = self._slots[step.slot]
            self.device.compute_waits(slot.copied)
            self._passing = step.layer
            if step.layer not in slot.views:
                slot.views[step.layer] = self._views(step.layer, slot.buffer)
            yield Page(step.layer, slot.views[step.layer])
            if self.poison and not step.kept:
                slot.buffer.fill_(0xFF)  # NaN in every float dtype
            slot.consumed = self.device.record_consumed()
            handover.release(number)
            nbytes = self.bytes_of(step.layer)
            self._progress(nbytes, read=nbytes if step.read else 0, layer=step.layer, waited=waited)

    def _fill(self, steps: Sequence[Step], handover: _Handover) -> None:
        try:
            with ThreadPoolExecutor(self.readers, thread_name_prefix="streamprune-reader") as readers:
                for step in steps:
                    if not handover.wait_for(step.after):
                        return
                    slot = self._slots[step.slot]
                    if step.read:
                        slot.layer = None  # until all of it is there: a read that fails leaves parts of two layers
                        self.device.copy_waits(slot.consumed)
                        reads = [readers.submit(self._read, slot.buffer, read) for read in self._reads(step.layer)]
                        try:
                            for done in reads:
                                done.result()
                        except BaseException:
                            readers.shutdown(cancel_futures=True)  # each of them would try the dead disk again
                            raise
                        slot.copied, slot.layer = self.device.record_copied(), step.layer
                    handover.put(None)
        except BaseException as error:
            handover.put(error)

    def _read(self, slot: Tensor, read: _Read) -> None:
        target = slot[read.position : read.position + read.nbytes]
        if self.device.direct:
            self._fetch(read, target)
        else:
            assert self._chunks is not None, "a sweep makes them before it reads"
            chunk, event = self._chunks.get()
            try:
                if event is not None:
                    self.device.chunk_free(event)
                start = read.offset % DISK_BLOCK  # as in the file, for direct reads
                source = chunk[start : start + read.nbytes]
                self._fetch(read, source)
                event = self.device.copy(target, source)
            finally:
                self._chunks.put((chunk, event))

    def _fetch(self, read: _Read, target: Tensor) -> None:
        self.checkpoint.read_into(read.file, read.offset, byte_view(target), stays=read.stays)

    def _reads(self, layer: int) -> Iterator[_Read]:
        stays = self.stays_in_cache(layer)
        for name, entry in self.entries[layer].items():
            done = 0
            while done < entry.nbytes:
                offset = entry.offset + done
                size = min(CHUNK_BYTES - offset % DISK_BLOCK, entry.nbytes - done)
                yield _Read(entry.file, offset, self._starts[layer][name] + done, size, stays)
                done += size

    def _views(self, layer: int, slot: Tensor) -> dict[str, Tensor]:
        starts = self._starts[layer]
        return {
            name: slot[starts[name] : starts[name] + entry.nbytes].view(entry.dtype).view(entry.shape)
            for name, entry in self.entries[layer].items()
        }


class _Handover:
    """Exchange between the filling thread and the consumer: filled slots one way, word of their release the other."""

    def __init__(self) -> None:
        self._filled: queue.Queue[BaseException | None] = queue.Queue()
        self._released, self._stopped = -1, False
        self._changed = threading.Condition()

    def take(self) -> None:
        """Wait until the next step's slot is filled; raise the error that the filling thread met."""
        error = self._filled.get()
        if error is not None:
            raise error

    def put(self, error: BaseException | None) -> None:
        self._filled.put(error)

    def wait_for(self, step: int) -> bool:
        """Wait until the consumer has released the slot of that step, and tell whether the sweep goes on."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._released >= step)
            return not self._stopped

    def release(self, step: int) -> None:
        with self._changed:
            self._released = step
            self._changed.notify()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify()


def _lay_out(entries: Mapping[str, TensorEntry], *, as_in_file: bool) -> tuple[dict[str, int], int]:
    """Lay a layer's tensors out in a slot: the byte at which each starts, and the byte at which the last one ends.

    With `as_in_file` a tensor lies among the slot's blocks as among the file's, so that a direct read can put whole
    blocks in their place.
    """
    starts, end = {}, 0
    for name, entry in entries.items():
        follows_file = as_in_file and entry.offset % entry.dtype.itemsize == 0
        starts[name] = end + ((entry.offset - end) % DISK_BLOCK if follows_file else -end % ALIGNMENT)
        end = starts[name] + entry.nbytes
    return starts, end
