"""Stores for what a method keeps between sweeps: in memory, on scratch or in the journal, as it is or narrower."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, MutableMapping
from pathlib import Path

import torch
from torch import Tensor

from streamprune.storage.journal import Journal, Key
from streamprune.storage.scratch import read_at, scratch_file, write_at

BLOCK_BYTES = 64 << 20
MakeStore = Callable[[str], MutableMapping[Key, Tensor]]


class _Places(MutableMapping[Key, Tensor]):
    """Base of stores that know which keys they hold; a place outlives its key, and serves again when it comes back."""

    def __init__(self) -> None:
        self._held: set[Key] = set()

    def __delitem__(self, key: Key) -> None:
        self._held.remove(key)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


class Memory(_Places):
    """Store of tensors on the host, copied into large blocks that stay.

    Kept where they were made, among a layer's activations, they would leave holes in the heap, more with every layer. A
    block is larger than what the C library ever takes from its heap, so it lies apart.
    """

    def __init__(self) -> None:
        super().__init__()
        self._places: dict[Key, Tensor] = {}
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

    def _room(self, value: Tensor) -> Tensor:
        nbytes = -(-value.nbytes // 64) * 64  # as in a slot: enough for any dtype and for vector loads
        if self._used + nbytes > len(self._block):
            self._block, self._used = torch.empty(max(BLOCK_BYTES, nbytes), dtype=torch.uint8), 0
        place = self._block[self._used : self._used + value.nbytes].view(value.dtype).view(value.shape)
        self._used += nbytes
        return place


class Scratch(_Places):
    """Store of tensors in a file without a name on a scratch disk; they come back as new ones in host memory.

    Raises:
        OutputError: the disk is full, or fails.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory, self._descriptor, self._end = directory, scratch_file(directory), 0
        self._places: dict[Key, tuple[int, torch.Size, torch.dtype]] = {}

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def __getitem__(self, key: Key) -> Tensor:
        if key not in self._held:
            raise KeyError(key)
        offset, shape, dtype = self._places[key]
        tensor = torch.empty(shape, dtype=dtype)
        read_at(self._descriptor, tensor, offset, self._directory)
        return tensor

    def __setitem__(self, key: Key, value: Tensor) -> None:
        place = self._places.get(key)
        if place is None or place[1:] != (value.shape, value.dtype):
            place = self._places[key] = self._end, value.shape, value.dtype
            self._end += value.nbytes
        write_at(self._descriptor, value.cpu().contiguous(), place[0], self._directory)
        self._held.add(key)


class Narrow(MutableMapping[Key, Tensor]):
    """Store that keeps float32 tensors in a narrower dtype within another store; they come back as float32."""

    def __init__(self, store: MutableMapping[Key, Tensor], dtype: torch.dtype) -> None:
        self._store, self._dtype = store, dtype

    def __getitem__(self, key: Key) -> Tensor:
        value = self._store[key]
        return value.float() if value.dtype == self._dtype else value

    def __setitem__(self, key: Key, value: Tensor) -> None:
        self._store[key] = value.to(self._dtype) if value.dtype == torch.float32 else value

    def __delitem__(self, key: Key) -> None:
        del self._store[key]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._store)

    def __len__(self) -> int:
        return len(self._store)


def make_store(
    name: str, *, journal: Journal | None = None, scratch: Path | None = None, dtype: str = "float32"
) -> MutableMapping[Key, Tensor]:
    """Make the store `name` of a method: in the journal of a run that can be resumed, on scratch, or in memory."""
    if journal is not None:
        store: MutableMapping[Key, Tensor] = journal.store(name)
    else:
        store = Memory() if scratch is None else Scratch(scratch)
    return store if dtype == "float32" else Narrow(store, getattr(torch, dtype))
