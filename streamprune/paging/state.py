"""State that a method keeps between its sweeps (δ, sums, norms), on its way with the layers that it belongs to.

It lies in one arena of host memory, a block for each layer, sized before the first sweep. A layer's block is fetched
into a slot on the device while the layer before is computed on, and carried back while the one after is, each way on a
stream of its own. What a sweep ends with stays in its slot for the next one, as the pager's layers do. A thread fetches
in pieces, a few of which are on their way at a time, so that weights pass between them: whole layers of state would
keep the link from the readers, and leave it idle when these have no chunks left to read into. Three waits make that
safe, and each is needed (tests/paging/test_state.py takes them away one by one):

- fetched[slot]: compute starts on a slot after its state is there.
- consumed[slot]: a block is fetched into a slot, or carried out of it, after the compute that was queued on it.
- carried[slot]: a block is fetched into a slot after what was changed there has left it.

A block that was carried back is not fetched before it has arrived: into the slot that it left another was fetched
since, on the same stream and after that wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from streamprune.paging.device import Device
from streamprune.paging.pager import ALIGNMENT, Page, Step, Turn, schedule
from streamprune.storage.journal import Key

STATE_SLOTS = 3  # one is computed on, one arrives, one leaves
STATE_PIECE_BYTES, STATE_PIECES = (
    16 << 20,
    2,
)  # of a fetch; with two on their way, the link has work when one is through
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
        present: what of it is there. changed: what is newer than in the arena.
        fetched, consumed, carried: events of the last copy into it, as soon as it is queued, of compute on it, and of
            the last copy out of it.
    """

    buffer: Tensor
    layer: int | None = None
    present: set[Name] = field(default_factory=set)
    changed: set[Name] = field(default_factory=set)
    fetched: Future[Any] | None = None
    consumed: Any = None
    carried: Any = None


class StateStream:
    """Arena of what a method keeps, and the slots through which it passes the device.

    Args:
        blocks: bytes of each layer's state; layers without any are not in it.
        up, down: the device, once for copies to it and once for copies from it, so that both go at the same time.
        dtype: float32 tensors are kept in it, and come back as float32.
        poison: fill a slot with NaN when its layer has passed and is not kept (tests).

    Attributes:
        slots: how many layers' state the device may hold, at least 2; to be set before the first sweep.
        registered: the device copies from the arena and to it beside its computing.
    """

    def __init__(
        self,
        blocks: Mapping[int, int],
        up: Device,
        down: Device,
        *,
        dtype: torch.dtype = torch.float32,
        poison: bool = False,
    ) -> None:
        self._blocks, self._up, self._down, self.dtype, self._poison = dict(blocks), up, down, dtype, poison
        self.slots, self.slot_bytes = STATE_SLOTS, max(blocks.values(), default=0)
        self._starts, self._end = dict[int, int](), 0
        for layer, nbytes in self._blocks.items():
            self._starts[layer], self._end = self._end, self._end + aligned(nbytes)
        self._used = dict.fromkeys(self._blocks, 0)
        self._places: dict[Name, _Place] = {}
        self.held: set[Name] = set()
        self._arena, self.registered = up.arena(max(1, self._end))
        self._slots: list[_Slot] = []
        self._now: _Slot | None = None

    def close(self) -> None:
        """Let go of all state: no sweep comes."""
        self.held.clear()
        self._slots.clear()
        self._up.release(self._arena)

    def store(self, name: str) -> MutableMapping[Key, Tensor]:
        """Return the store `name`: tensors by (layer, tensor), of the layer that is passing."""
        return Streamed(self, name)

    def along(
        self, pages: Iterable[Page], order: Sequence[int], then: Turn, stores: Collection[str] | None = None
    ) -> Iterator[Page]:
        """Yield the pages of a sweep, each with its layer's state on the device.

        Args:
            order: the layers in the order of `pages`. then: how the sweep is followed by the next, as in `Pager.pages`.
            stores: those that the sweep reads, by default all; a sweep that reads none leaves the slots as they are.
        """
        if stores is not None and not stores:
            yield from pages
            return
        fetching = ThreadPoolExecutor(1, thread_name_prefix="streamprune-state")
        steps = iter(self._begin(order, then))
        coming = next(steps, None)
        try:
            if coming is not None:
                self._fetch(coming, stores, fetching.submit)
            for page in pages:
                step = coming
                if step is None or step.layer != page.layer:  # a layer without state
                    yield page
                    continue
                coming = next(steps, None)
                if coming is not None:
                    self._fetch(coming, stores, fetching.submit)
                self._now = slot = self._slots[step.slot]
                assert slot.fetched is not None, "it was asked for"
                self._up.compute_waits(slot.fetched.result())
                yield page
                self._leave(slot, step)
        finally:
            self._now = None
            fetching.shutdown()
            # Copies that nobody waited for (after an error) end before the slots are used again or freed.
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

    def _fetch(self, step: Step, stores: Collection[str] | None, submit: Callable[..., Future[Any]]) -> None:
        """Let a thread queue what the sweep reads of a layer's state and is not in the slot yet."""
        slot = self._slots[step.slot]
        if step.read:
            self._carry(slot)  # changed when it was kept at the end of a sweep
            slot.layer, slot.present = step.layer, set()
        wanted = {
            each for each in self.held if each[1] == step.layer and (stores is None or each[0] in stores)
        } - slot.present
        block, runs = self._block(step.layer), list(self._runs(wanted))
        copies = [(slot.buffer[start:stop], block[start:stop]) for start, stop in runs]
        slot.fetched = submit(self._queue, copies, (slot.consumed, slot.carried))
        slot.present |= wanted

    def _queue(self, copies: Iterable[tuple[Tensor, Tensor]], after: Iterable[Any]) -> Any:
        """Queue copies to the device, not many pieces ahead of the link; return the event of the last one."""
        for event in after:
            self._after(self._up.copy_waits, event)
        pieces = deque[Any]()
        for target, source in copies:
            for to, of in zip(target.split(STATE_PIECE_BYTES), source.split(STATE_PIECE_BYTES), strict=True):
                if len(pieces) == STATE_PIECES:
                    self._up.chunk_free(pieces.popleft())
                pieces.append(self._up.copy(to, of))
        return self._up.record_copied()

    def _leave(self, slot: _Slot, step: Step) -> None:
        self._now = None
        slot.consumed = self._up.record_consumed()
        if step.kept:
            return
        self._carry(slot)
        if self._poison:
            self._after(self._up.compute_waits, slot.carried)
            slot.buffer.fill_(0xFF)  # NaN in every float dtype
            slot.consumed = self._up.record_consumed()

    def _carry(self, slot: _Slot) -> None:
        """Queue what was changed in a slot on its way back to the arena."""
        changed = slot.changed & self.held  # what was dropped since needs not go
        slot.changed = set()
        if not changed:
            return
        assert slot.layer is not None, "only a layer's state is changed"
        self._after(self._down.copy_waits, slot.consumed)
        for start, stop in self._runs(changed):
            self._down.copy(self._block(slot.layer)[start:stop], slot.buffer[start:stop])
        slot.carried = self._down.record_copied()

    def _after(self, wait: Any, event: Any) -> None:
        if event is not None:
            wait(event)

    def _block(self, layer: int) -> Tensor:
        return self._arena[self._starts[layer] : self._starts[layer] + self._blocks[layer]]

    def _runs(self, names: Iterable[Name]) -> Iterator[tuple[int, int]]:
        """Yield the parts of a block that these tensors take; neighbours are one part, and go in one copy."""
        start = stop = 0
        for place in sorted((self._places[name] for name in names), key=lambda place: place.start):
            if place.start == aligned(stop) and stop:
                stop = place.stop
                continue
            if stop:
                yield start, stop
            start, stop = place.start, place.stop
        if stop:
            yield start, stop

    # What the stores do: a method reads and writes the state of the layer that is passing.

    def get(self, name: Name) -> Tensor:
        """Return a tensor on the device: where it lies, or as float32 if it is kept narrower."""
        slot = self._slot_of(name)
        assert name in slot.present, f"{name} was not fetched for this sweep"
        value = self._places[name].view(slot.buffer)
        return value.float() if value.dtype == self.dtype != torch.float32 else value

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
        self._stream.held.remove((self.name, *key))

    def __iter__(self) -> Iterator[Key]:
        return (name[1:] for name in self._stream.held if name[0] == self.name)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def aligned(nbytes: int) -> int:
    """Round up to where a tensor may begin in a slot."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
