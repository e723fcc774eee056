"""Sharded safetensors output, written in any order, and a directory that appears only when it is whole."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from streamprune.checkpoint import DTYPE_NAMES, INDEX_FILE, SINGLE_FILE, TensorEntry, byte_view
from streamprune.errors import OutputError

PARTIAL = ".partial-"
OWN_FILE = "streamprune.json"  # in every output, and the only thing that --overwrite takes for one


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
    """Writes tensors of known shapes to one model.safetensors, or to shards and an index.

    All headers are written first, so tensors may come in any order and none is held back. Use as a
    context manager; leaving it normally checks that every tensor came.

    Args:
        directory: exists already.
        specs: the tensors, in the order in which the headers list them.
        max_shard_size: bytes; a tensor larger than that gets a shard of its own.
        written: names that an earlier writer of the same specs has written there; its files are taken over.

    Raises:
        OutputError: the disk is full, or a tensor is missing or not as announced.
    """

    def __init__(
        self, directory: Path, specs: Sequence[TensorSpec], max_shard_size: int, written: Iterable[str] = ()
    ) -> None:
        self.directory = directory
        self.entries: dict[str, TensorEntry] = {}
        self._pending = {spec.name for spec in specs}.difference(written)
        self._taken_over = len(self._pending) < len(specs)
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
        """What has been written is on the disk, under its name."""
        _sync(self.directory)
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
        encoded += b" " * (-len(encoded) % 8)
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


def write_json(file: Path, value: object) -> None:
    """Indented JSON with a final newline, as transformers writes it; file names that are no UTF-8 are escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    file.write_text(text, encoding="utf-8", errors="backslashreplace")


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse an output path that exists (without `overwrite`) or whose parent cannot be written to."""
    if (output.exists() or output.is_symlink()) and not overwrite:
        raise OutputError(f"{output} exists; choose another --output, or pass --overwrite to replace it")
    if (output.exists() or output.is_symlink()) and not output.is_dir():
        what = "a file" if output.exists() else "a link to nothing"
        raise OutputError(f"{output} is {what}; choose another --output")
    if overwrite and output.is_dir() and any(output.iterdir()) and not (output / OWN_FILE).is_file():
        raise OutputError(f"{output} has no {OWN_FILE}, so it is not streamprune's; --overwrite will not remove it")
    check_directory(output.absolute().parent, "--output")


def check_directory(directory: Path, option: str) -> None:
    """Refuse a directory, given by `option`, that can neither be written to nor made."""
    existing = _existing(directory)
    if not existing.is_dir():
        raise OutputError(f"{existing} is no directory; choose another {option}")
    if not os.access(existing, os.W_OK):
        raise OutputError(f"{existing} cannot be written to; choose another {option}")


def check_space(directory: Path, needs: int, what: str = "the output") -> None:
    """Refuse a directory, or one that will be made, on a disk that has less than `needs` bytes free for `what`."""
    existing = _existing(directory)
    free = shutil.disk_usage(existing).free
    if free < needs:
        raise OutputError(f"{existing} has {free:,} bytes free, {what} needs {needs:,}; make room")


def _existing(directory: Path) -> Path:
    """It, or what of its parents is there."""
    directory = directory.absolute()
    while not directory.exists():
        directory = directory.parent
    return directory


@contextmanager
def atomic_directory(output: Path, *, overwrite: bool, temporary: Path | None = None) -> Iterator[Path]:
    """A temporary sibling of `output` that takes its name when the block ends well, and goes away otherwise.

    Args:
        temporary: on the same disk; it stays if the block does not end well.
        output: must not exist, unless `overwrite`; what is there then stays until the new one is whole.

    Raises:
        OutputError: the path is taken, or the disk is full.
    """
    check_output(output, overwrite=overwrite)
    output = output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    keep = temporary is not None
    if temporary is None:
        _remove_dead(output)
        temporary = output.with_name(f".{output.name}{PARTIAL}{secrets.token_hex(4)}")
    lock = None
    try:
        temporary.mkdir(exist_ok=keep)
        lock = _hold(temporary)
        yield temporary
        _sync(temporary)
        check_output(output, overwrite=overwrite)  # somebody may have made it in the meantime
        _replace(output, temporary)
        sync_path(output.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            left = f"{temporary.parent} stays to go on from" if keep else "nothing was left behind"
            raise OutputError(
                f"{output.parent}: {error.strerror} while writing; {left}, make room and repeat"
            ) from error
        raise
    finally:
        if not keep:
            shutil.rmtree(temporary, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _remove_dead(output: Path) -> None:
    """What earlier runs for this output were writing when they were killed: nobody holds it."""
    for partial in output.parent.iterdir():
        if partial.name.startswith(f".{output.name}{PARTIAL}") and (lock := _hold(partial)) is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _hold(directory: Path) -> int | None:
    """A lock that goes with the process; None where another has it, or the filesystem has none."""
    descriptor = None
    try:
        descriptor = os.open(directory, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _replace(output: Path, temporary: Path) -> None:
    """Give `temporary` the name `output`; what had it before comes back if that fails."""
    if not output.exists():
        temporary.rename(output)
        return
    replaced = output.with_name(f".{output.name}.replaced-{secrets.token_hex(4)}")
    try:
        output.rename(replaced)
        temporary.rename(output)
    except BaseException:
        # Also after Ctrl-C between the two: nothing is removed until the new one has the name.
        if not output.exists() and replaced.exists():
            replaced.rename(output)
        raise
    if replaced.is_symlink():
        replaced.unlink()
    else:
        shutil.rmtree(replaced, ignore_errors=True)


def _sync(directory: Path) -> None:
    for path in (*directory.iterdir(), directory):
        sync_path(path)


def sync_path(path: Path) -> None:
    """A file's contents, or a directory's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
