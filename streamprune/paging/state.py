"""State that a method keeps between its sweeps (δ, sums, norms), on its way with the layers that it belongs to.

It lies in one arena of host memory or in a file on a scratch disk, a block for each layer, sized before the first
sweep. A layer's block is fetched into a slot on the device while the layer before is computed on, and carried back
while the one after is, each way on a stream of its own (blocks.py). What a sweep ends with stays in its slot for the
next one, as the pager's layers do. Three waits make that safe, and each is needed (tests/paging/test_state.py takes
them away one by one):

- fetched[slot]: compute starts on a slot after its state is there.
- consumed[slot]: a block is fetched into a slot, or carried out of it, after the compute that was queued on it.
- carried[slot]: a block is fetched into a slot after what was changed there has left it.

A block that was carried back is not fetched before it has arrived: into the slot that it left another was fetched
since, on the same stream or by the same thread, and after that wait. Of a run that can be resumed the journal takes
what was changed, and waits before that for `carried`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune.paging.blocks import Arena, Arrival, Linked, Span, Staged, Store, after
from streamprune.paging.device import Device
from streamprune.paging.pager import Page, Step, Turn, schedule
from streamprune.storage.journal import Key
from streamprune.storage.reader import DISK_BLOCK
from streamprune.storage.scratch import BlockFile

STATE_SLOTS = 3  # one is computed on, one arrives, one leaves
Name = tuple[str, int, str]  # store, layer, tensor


@dataclass(frozen=True)
class _Place:
    """Place of a tensor in its layer's block."""

    start: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        return self.start + self.shape.numel() * self.dtype.itemsize

    def view(self, block: Tensor) -> Tensor:
        return block[self.start : self.stop].view(self.dtype).view(self.shape)


@dataclass
class _Slot:
    """Slot: device memory for the state of one layer.

    Attributes:
        layer: the one whose state it holds, None before any.
        present: what of it is there. changed: what is newer than in its block.
        fetched, carried: waits for what was last brought into it and carried out of it. consumed: event of the last
            compute on it.
    """

    buffer: Tensor
    layer: int | None = None
    present: set[Name] = field(default_factory=set)
    changed: set[Name] = field(default_factory=set)
    fetched: Arrival | None = None
    consumed: Any = None
    carried: Arrival | None = None


class StateStream:
    """Arena or file of what a method keeps, and the slots through which it passes the device.

    Args:
        blocks: bytes of each layer's state; layers without any are not in it.
        up, down: the device, once for copies to it and once for copies from it, so that both go at the same time.
        dtype: float32 tensors are kept in it.
        scratch: directory of the file; by default it is an arena in host memory.
        saved: a journal's stores, by name: what they hold is taken over, and `save` puts there what was changed.
        say_staged: is called, by a thread, when host memory cannot be registered, so that copies are staged.
        poison: fill a slot with NaN when its layer has passed and is not kept (tests).

    Attributes:
        slots: how many layers' state the device may hold, at least 2; to be set before the first sweep.

    Raises:
        OutputError: the scratch disk is full, or fails; also in a sweep.
    """

    def __init__(
        self,
        blocks: Mapping[int, int],
        up: Device,
        down: Device,
        *,
        dtype: torch.dtype = torch.float32,
        scratch: Path | None = None,
        saved: Mapping[str, MutableMapping[Key, Tensor]] | None = None,
        say_staged: Callable[[], object] = lambda: None,
        poison: bool = False,
    ) -> None:
        self._blocks, self._up, self._down, self.dtype, self._poison = dict(blocks), up, down, dtype, poison
        self.slots, self.slot_bytes = STATE_SLOTS, aligned(max(blocks.values(), default=0))
        self._starts, self._end = dict[int, int](), 0
        for layer, nbytes in self._blocks.items():
            self._starts[layer], self._end = self._end, self._end + aligned(nbytes)
        self._used = dict.fromkeys(self._blocks, 0)
        self._places: dict[Name, _Place] = {}
        self.held: set[Name] = set()
        self._slots: list[_Slot] = []
        self._now: _Slot | None = None
        self._say_staged = say_staged
        self._opened: tuple[Store, Linked | Staged] | None = None
        file = None if scratch is None else BlockFile(scratch, self._end)
        # By a thread, beside the sweeps that keep nothing yet: a GPU takes seconds to register what all layers need.
        self._opener = ThreadPoolExecutor(1, thread_name_prefix="streamprune-arena")
        self._opening = self._opener.submit(self._open, file)
        self._saved, self._unsaved = saved or {}, set[Name]()
        self._take_over()

    def _open(self, file: BlockFile | None) -> tuple[Store, Linked | Staged]:
        """Take the memory in which blocks lie, unless they do in a file, and make what moves them."""
        if file is None:
            memory, registered = self._up.arena(max(1, self._end))
            store: Store = Arena(memory, self._up)
            if registered:
                self._opened = store, Linked(memory, self._up, self._down)
                return self._opened
            self._say_staged()
        else:
            store = file
        try:
            self._opened = store, Staged(store, self._up, self._down, self.slot_bytes)
        except BaseException:  # chunks are refused: nobody else knows of the store
            store.close()
            raise
        return self._opened

    @property
    def _store(self) -> Store:
        return self._opening.result()[0]

    @property
    def _carrier(self) -> Linked | Staged:
        return self._opening.result()[1]

    def _take_over(self) -> None:
        """Put what a journal holds in its place."""
        for store, saved in self._saved.items():
            for layer, tensor in sorted(saved):
                name, value = (store, layer, tensor), saved[layer, tensor]
                place = self._places[name] = self._room(name, value)
                self._store.write(value.contiguous().view(-1).view(torch.uint8), self._starts[layer] + place.start)
                self.held.add(name)

    def close(self) -> None:
        """Let go of all state: no sweep comes."""
        self.held.clear()
        self._unsaved.clear()
        self._opener.shutdown()
        if self._opened is not None:
            store, carrier = self._opened
            carrier.close()
            self._end_copies()
            self._slots.clear()
            store.close()

    def save(self) -> None:
        """Put what was changed since the last time into the journal's stores, when it has arrived in its block."""
        for slot in self._slots if self._unsaved else ():
            if slot is self._now:
                slot.consumed = self._up.record_consumed()
            self._carry(slot)
            after(self._down.chunk_free, slot.carried and slot.carried())
        for name in sorted(self._unsaved):
            store, layer, tensor = name
            if name in self.held:
                place = self._places[name]
                value = torch.empty(place.shape, dtype=place.dtype)
                self._store.read(value.view(-1).view(torch.uint8), self._starts[layer] + place.start)
                self._saved[store][layer, tensor] = value
            elif (layer, tensor) in self._saved[store]:
                del self._saved[store][layer, tensor]
        self._unsaved.clear()

    def store(self, name: str) -> MutableMapping[Key, Tensor]:
        """Return the store `name`: tensors by (layer, tensor), of the layer that is passing."""
        return Streamed(self, name)

    def along(
        self, pages: Iterable[Page], order: Sequence[int], then: Turn, stores: Collection[str] | None = None
    ) -> Iterator[Page]:
        """Yield the pages of a sweep, each with its layer's state on the device.

        Args:
            order: the layers in the order of `pages`. then: how the sweep is followed by the next, as in `Pager.pages`.
            stores: those that the sweep reads, by default all; one that reads nothing leaves all as it is.
        """
        if stores is not None and not any(name[0] in stores for name in self.held):
            yield from pages
            return
        steps = iter(self._begin(order, then))
        coming = next(steps, None)
        if coming is not None:
            self._fetch(coming, stores)
        try:
            for page in pages:
                step = coming
                if step is None or step.layer != page.layer:  # a layer without state
                    yield page
                    continue
                coming = next(steps, None)
                if coming is not None:
                    self._fetch(coming, stores)
                self._now = slot = self._slots[step.slot]
                after(self._up.compute_waits, slot.fetched and slot.fetched())
                yield page
                self._leave(slot, step)
        finally:
            self._now = None
            self._end_copies()

    def _end_copies(self) -> None:
        """Let copies that nobody waited for (after an error) end before the slots are used again or freed."""
        for device in (self._up, self._down):
            device.compute_waits(device.record_copied())

    def _begin(self, order: Sequence[int], then: Turn) -> list[Step]:
        held = [self._slots[number].layer if number < len(self._slots) else None for number in range(self.slots)]
        steps = schedule([layer for layer in order if layer in self._blocks], held, then, busy=STATE_SLOTS - 1)
        while len(self._slots) <= max((step.slot for step in steps), default=-1):
            # Fresh memory may still be in use by compute that was queued before it was freed.
            consumed = self._up.record_consumed()
            self._slots.append(_Slot(self._up.buffer(self.slot_bytes), consumed=consumed))
        return steps

    def _fetch(self, step: Step, stores: Collection[str] | None) -> None:
        """Queue what the sweep reads of a layer's state and is not in the slot yet."""
        slot = self._slots[step.slot]
        if step.read:
            self._carry(slot)  # changed when it was kept at the end of a sweep
            slot.layer, slot.present = step.layer, set()
        wanted = {
            each for each in self.held if each[1] == step.layer and (stores is None or each[0] in stores)
        } - slot.present
        # Also where nothing is: what is put there next comes after what has still to leave.
        slot.fetched = self._carrier.bring(self._parts(slot, wanted), slot.consumed, slot.carried)
        slot.present |= wanted

    def _leave(self, slot: _Slot, step: Step) -> None:
        self._now = None
        slot.consumed = self._up.record_consumed()
        if step.kept:
            return
        self._carry(slot)
        if self._poison:
            after(self._up.compute_waits, slot.carried and slot.carried())
            slot.buffer.fill_(0xFF)  # NaN in every float dtype
            slot.consumed = self._up.record_consumed()

    def _carry(self, slot: _Slot) -> None:
        """Queue what was changed in a slot on its way back to its block."""
        changed = slot.changed & self.held  # what was dropped since needs not go
        slot.changed = set()
        if changed:
            slot.carried = self._carrier.carry(self._parts(slot, changed), slot.consumed)

    def _parts(self, slot: _Slot, names: Iterable[Name]) -> list[Span]:
        """List the parts of a slot that these tensors take; neighbours are one part, and go in one copy."""
        assert slot.layer is not None, "a step that reads has named it"
        parts, begin = list[tuple[int, int]](), self._starts[slot.layer]
        for place in sorted((self._places[name] for name in names), key=lambda place: place.start):
            start = parts.pop()[0] if parts and parts[-1][1] == place.start else place.start
            parts.append((start, aligned(place.stop)))
        return [(slot.buffer[start:stop], begin + start) for start, stop in parts]

    # What the stores do: a method reads and writes the state of the layer that is passing.

    def get(self, name: Name) -> Tensor:
        """Return a tensor on the device, where it lies and in the dtype in which it is kept."""
        slot = self._slot_of(name)
        assert name in slot.present, f"{name} was not fetched for this sweep"
        return self._places[name].view(slot.buffer)

    def put(self, name: Name, value: Tensor) -> None:
        """Take in a tensor; nothing is copied where it lies in its place already."""
        slot, place = self._slot_of(name), self._places.get(name)
        if place is None:
            place = self._places[name] = self._room(name, value)
        target = place.view(slot.buffer)
        if target.data_ptr() != value.data_ptr():
            target.copy_(value)
        for names in (self.held, slot.present, slot.changed):
            names.add(name)
        self._touch(name)

    def drop(self, name: Name) -> None:
        """Forget a tensor; its place stays."""
        self.held.remove(name)
        self._touch(name)

    def _touch(self, name: Name) -> None:
        if name[0] in self._saved:
            self._unsaved.add(name)

    def _slot_of(self, name: Name) -> _Slot:
        assert self._now is not None and self._now.layer == name[1], f"the layer of {name} is not passing"
        return self._now

    def _room(self, name: Name, value: Tensor) -> _Place:
        _, layer, _ = name
        place = _Place(self._used[layer], value.shape, self.dtype if value.dtype == torch.float32 else value.dtype)
        assert place.stop <= self._blocks[layer], f"{name} was not planned"
        self._used[layer] = aligned(place.stop)
        return place


class Streamed(MutableMapping[Key, Tensor]):
    """Mapping of (layer, tensor) to one kind of state."""

    def __init__(self, stream: StateStream, name: str) -> None:
        self._stream, self.name = stream, name

    def __getitem__(self, key: Key) -> Tensor:
        if (self.name, *key) not in self._stream.held:
            raise KeyError(key)
        return self._stream.get((self.name, *key))

    def __setitem__(self, key: Key, value: Tensor) -> None:
        self._stream.put((self.name, *key), value)

    def __delitem__(self, key: Key) -> None:
        self._stream.drop((self.name, *key))

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and (self.name, *key) in self._stream.held

    def __iter__(self) -> Iterator[Key]:
        return (name[1:] for name in self._stream.held if name[0] == self.name)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def aligned(nbytes: int) -> int:
    """Round up to where a tensor may begin in a block: whole blocks of a disk go around its page cache."""
    return -(-nbytes // DISK_BLOCK) * DISK_BLOCK
