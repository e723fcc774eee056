"""Writer of sharded safetensors checkpoints, whose tensors may come in any order."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamprune.errors import OutputError
from streamprune.storage.checkpoint import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE, TensorEntry, byte_view
from streamprune.storage.directory import sync_directory, sync_path, write_json


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of a tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ShardedWriter:
    """Writer of tensors of known shapes to one model.safetensors, or to shards and an index.

    All headers are written first, so tensors may come in any order and none is held back. Use as a
    context manager; leaving it normally checks that every tensor came.

    Args:
        directory: exists already.
        specs: the tensors, in the order in which the headers list them.
        max_shard_size: bytes; a tensor larger than that gets a shard of its own.
        written: names that an earlier writer of the same specs has written there, whose files are taken over, though
            it may have come to none; None where there was no such writer.

    Raises:
        OutputError: the disk is full, or a tensor is missing or not as announced.
    """

    def __init__(
        self, directory: Path, specs: Sequence[TensorSpec], max_shard_size: int, written: Iterable[str] | None = None
    ) -> None:
        self.directory = directory
        self.entries: dict[str, TensorEntry] = {}
        self._pending = {spec.name for spec in specs}.difference(written or ())
        self._taken_over = written is not None
        self.files: list[str] = []
        shards = _split(specs, max_shard_size)
        for number, shard in enumerate(shards):
            name = SINGLE_FILE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            self.files.append(name)
            self._create(directory / name, number, shard)
        if len(shards) > 1:
            self._write_index()

    def __enter__(self) -> ShardedWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is None and self._pending:
            raise OutputError(f"tensors never written: {', '.join(sorted(self._pending)[:3])} ...")

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one announced tensor (any device; contiguous or not)."""
        entry = self.entries.get(name)
        if entry is None:
            raise OutputError(f"{name} was never announced to the writer")
        if tensor.dtype != entry.dtype or tuple(tensor.shape) != entry.shape:
            raise OutputError(
                f"{name} came as {list(tensor.shape)} {tensor.dtype}, announced as {list(entry.shape)} {entry.dtype}"
            )
        if entry.nbytes:
            # Opened each time: a checkpoint can have more shards than a process may have open files.
            with _opened(self.directory / self.files[entry.file], os.O_WRONLY) as descriptor:
                _write_all(descriptor, byte_view(tensor.detach().cpu().contiguous()), entry.offset)
        self._pending.discard(name)

    def sync(self) -> None:
        """Wait until what has been written is on the disk, under its name."""
        sync_directory(self.directory)
        sync_path(self.directory.parent)

    def _create(self, file: Path, number: int, shard: Sequence[TensorSpec]) -> None:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        position = 0
        for spec in shard:
            header[spec.name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [position, position + spec.nbytes],
            }
            position += spec.nbytes
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)  # tensors begin at a multiple of 8 bytes, as safetensors itself has it
        if self._taken_over and (not file.is_file() or file.stat().st_size != 8 + len(encoded) + position):
            raise OutputError(f"{file} is not what an earlier run has left there; remove {self.directory.parent}")
        create = 0 if self._taken_over else os.O_CREAT | os.O_EXCL
        with _opened(file, os.O_WRONLY | create) as descriptor:
            # Taken now, so that a full disk is found before anything is written.
            os.posix_fallocate(descriptor, 0, 8 + len(encoded) + position)
            _write_all(descriptor, memoryview(struct.pack("<Q", len(encoded)) + encoded), 0)
        offset = 8 + len(encoded)
        for spec in shard:
            self.entries[spec.name] = TensorEntry(spec.name, spec.dtype, spec.shape, number, offset, spec.nbytes)
            offset += spec.nbytes

    def _write_index(self) -> None:
        total = sum(entry.nbytes for entry in self.entries.values())
        weight_map = {name: self.files[entry.file] for name, entry in self.entries.items()}
        write_json(self.directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


@contextmanager
def _opened(file: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(file, flags, 0o666)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        done += os.pwrite(descriptor, buffer[done:], offset + done)


def _split(specs: Sequence[TensorSpec], max_shard_size: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards
