"""Stores for what a method keeps between sweeps: in memory or in the journal, as it is or narrower."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping

import torch
from torch import Tensor

from streamprune.storage.journal import Journal, Key

BLOCK_BYTES = 64 << 20
MakeStore = Callable[[str], MutableMapping[Key, Tensor]]


class Memory(MutableMapping[Key, Tensor]):
    """Store of tensors on the host, copied into large blocks; a place outlives its key, and serves again.

    Kept where they were made, among a layer's activations, they would leave holes in the heap, more with every layer. A
    block is larger than what the C library ever takes from its heap, so it lies apart.
    """

    def __init__(self) -> None:
        self._held, self._places = set[Key](), dict[Key, Tensor]()
        self._block, self._used = torch.empty(0, dtype=torch.uint8), 0

    def __getitem__(self, key: Key) -> Tensor:
        if key not in self._held:
            raise KeyError(key)
        return self._places[key]

    def __setitem__(self, key: Key, value: Tensor) -> None:
        place = self._places.get(key)
        if place is None or place.shape != value.shape or place.dtype != value.dtype:
            place = self._places[key] = self._room(value)
        if place.data_ptr() != value.data_ptr():
            place.copy_(value)
        self._held.add(key)

    def __delitem__(self, key: Key) -> None:
        self._held.remove(key)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def _room(self, value: Tensor) -> Tensor:
        nbytes = -(-value.nbytes // 64) * 64  # as in a slot: enough for any dtype and for vector loads
        if self._used + nbytes > len(self._block):
            self._block, self._used = torch.empty(max(BLOCK_BYTES, nbytes), dtype=torch.uint8), 0
        place = self._block[self._used : self._used + value.nbytes].view(value.dtype).view(value.shape)
        self._used += nbytes
        return place


class Narrow(MutableMapping[Key, Tensor]):
    """Store that keeps float32 tensors in a narrower dtype within another store; whoever takes one out widens it."""

    def __init__(self, store: MutableMapping[Key, Tensor], dtype: torch.dtype) -> None:
        self._store, self._dtype = store, dtype

    def __getitem__(self, key: Key) -> Tensor:
        return self._store[key]

    def __setitem__(self, key: Key, value: Tensor) -> None:
        self._store[key] = value.to(self._dtype) if value.dtype == torch.float32 else value

    def __delitem__(self, key: Key) -> None:
        del self._store[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)


def make_store(name: str, *, journal: Journal | None = None, dtype: str = "float32") -> MutableMapping[Key, Tensor]:
    """Make the store `name` of a method: in the journal of a run that can be resumed, or in memory."""
    store: MutableMapping[Key, Tensor] = Memory() if journal is None else journal.store(name)
    return store if dtype == "float32" else Narrow(store, getattr(torch, dtype))
