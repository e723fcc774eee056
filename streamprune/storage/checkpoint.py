"""Checkpoints of safetensors files: headers, extents and raw reads. Nothing here knows of models.

Shards are never memory-mapped: reads into buffers that the caller keeps (reader.py) are faster and leave no
file pages in the process. Pickled weights are refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
import threading
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import CheckpointError
from streamprune.storage.file_kinds import (
    mistaken,
    refuse_adapter,
    refuse_placeholders,
    refuse_unfinished,
    refuse_without_weights,
    unfinished,
)
from streamprune.storage.reader import Reader, ReaderKind, retried

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FINITE_BLOCK = 1 << 20  # elements
FILL_PIECE = 1 << 24  # elements; an embedding of 262,144 words has ten of them and more
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself

STORED_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in STORED_DTYPES.items()}
# The format's other dtypes, with the bits of an element: what has them is known, and never read.
OTHER_DTYPES = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "U16": 16, "U32": 32, "U64": 64, "C64": 64},
}


@dataclass(frozen=True)
class TensorEntry:
    """Place of one tensor: `nbytes` bytes at `offset` (from the start of the file) of `files[file]`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class OtherEntry:
    """Tensor of a dtype that is not read: its dtype as the file has it, and its bytes in `files[file]`."""

    name: str
    dtype: str
    file: int
    nbytes: int


class Checkpoint:
    """Directory of safetensors shards, opened once. Several threads may read from it; close it when done.

    Args:
        path: a directory with config.json and model.safetensors or its index.
        reader: how shards are read: "buffered", or "direct", around the page cache.

    Attributes:
        config: config.json.
        tensors: what can be read, by name, in the order of the headers. others: what is of another dtype.
        misplaced: the shards in which the index places tensors that they do not hold.

    Raises:
        CheckpointError: anything missing, truncated, malformed or pointing outside the directory.
    """

    def __init__(self, path: Path, reader: ReaderKind = "buffered") -> None:
        self.path = path
        self.config = read_config(path)
        refuse_placeholders(path)
        # An output has its weights under the usual names.
        self.files, expected = _locate_shards(path, self.config.pop("transformers_weights", None))
        refuse_unfinished(self.files)
        self.tensors: dict[str, TensorEntry] = {}
        self.others: dict[str, OtherEntry] = {}
        for number, file in enumerate(self.files):
            for entry in read_header(file, number):
                self._place(entry, expected.get(entry.name, file) == file)
        self.misplaced = {name: file for name, file in expected.items() if self._file_of(name) != file}
        for name in self.misplaced:
            self.tensors.pop(name, None)
            self.others.pop(name, None)
        self.bytes_read = 0
        self._reader = Reader(self.files, reader)
        self._lock = threading.Lock()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shards; the checkpoint can be read again afterwards."""
        self._reader.close()

    @cached_property
    def outline(self) -> str:
        """SHA-256 of its config and of its tensors' names, dtypes and shapes: a model's, wherever it lies."""
        tensors = sorted((entry.name, str(entry.dtype), tuple(entry.shape)) for entry in self.tensors.values())
        config = json.dumps(self.config, sort_keys=True)
        return hashlib.sha256(repr((config, tensors)).encode()).hexdigest()

    def read_into(self, file: int, offset: int, buffer: memoryview, *, stays: bool = True) -> None:
        """Fill `buffer` with the bytes at `offset` of shard `file`.

        Not `stays`: leave no page of them in the page cache, which could not keep them until they are read again.

        Raises:
            CheckpointError: the file ended first, or could not be read.
        """
        self._reader.read_into(file, offset, buffer, stays=stays)
        with self._lock:  # several readers add to it
            self.bytes_read += len(buffer)

    def read(self, name: str) -> Tensor:
        """Read one tensor as it is stored, into memory of its own."""
        entry = self.tensors[name]
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        self.read_into(entry.file, entry.offset, byte_view(raw))
        return raw.view(entry.dtype).view(entry.shape)

    def fill(self, name: str, target: Tensor) -> None:
        """Read one tensor into another of its shape, contiguous, of any dtype and device, a piece in memory at a time.

        Raises:
            CheckpointError: it holds NaN or infinity, or could not be read.
        """
        entry, row = self.tensors[name], target.view(-1)
        piece = torch.empty(min(len(row), FILL_PIECE), dtype=entry.dtype)
        for begin in range(0, len(row), FILL_PIECE):
            at = piece[: len(row) - begin]
            self.read_into(entry.file, entry.offset + begin * at.element_size(), byte_view(at))
            check_finite(self.path, name, at)
            row[begin : begin + len(at)].copy_(at)

    def _place(self, entry: TensorEntry | OtherEntry, expected: bool) -> None:
        """Enter a tensor; of one that two shards hold, the index decides, and where it does not, the last counts."""
        if expected or (entry.name not in self.tensors and entry.name not in self.others):
            for entries in (self.tensors, self.others):
                entries.pop(entry.name, None)
            if isinstance(entry, TensorEntry):
                self.tensors[entry.name] = entry
            else:
                self.others[entry.name] = entry

    def _file_of(self, name: str) -> Path | None:
        entry = self.tensors.get(name) or self.others.get(name)
        return None if entry is None else self.files[entry.file]

    def rename(self, names: Mapping[str, str]) -> None:
        """Give tensors other names from now on: new names by those in the files."""
        self.tensors = {
            (new := names.get(name, name)): replace(entry, name=new) for name, entry in self.tensors.items()
        }
        self.others = {(new := names.get(name, name)): replace(entry, name=new) for name, entry in self.others.items()}
        self.misplaced = {names.get(name, name): file for name, file in self.misplaced.items()}

    def keep(self, names: Container[str]) -> list[TensorEntry | OtherEntry]:
        """Forget all tensors but these, and return the forgotten ones."""
        entries: list[TensorEntry | OtherEntry] = [*self.tensors.values(), *self.others.values()]
        self.tensors = {name: entry for name, entry in self.tensors.items() if name in names}
        self.others = {}
        return [entry for entry in entries if entry.name not in names]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def nbytes_in(self, dtype: torch.dtype) -> int:
        """Count the bytes that all tensors take in a dtype."""
        return sum(torch.Size(entry.shape).numel() for entry in self.tensors.values()) * dtype.itemsize


def is_finite(tensor: Tensor, at_once: int = FINITE_BLOCK) -> bool:
    """Tell whether a tensor holds no NaN and no infinity. A finite sum proves it without a mask of the tensor's size.

    Args:
        at_once: elements that are summed together: a sum in another dtype than the tensor's copies what it sums.
    """
    # Sums of large finite numbers may overflow: only then is each element looked at.
    blocks = tensor.flatten().split(at_once)
    return all(bool(torch.isfinite(each.sum(dtype=torch.float32)) or torch.isfinite(each).all()) for each in blocks)


def check_finite(path: Path, what: str, tensor: Tensor, at_once: int = FINITE_BLOCK) -> None:
    """Refuse NaN and infinity in a tensor of the checkpoint at `path`, which is called `what`.

    Raises:
        CheckpointError: there are some.
    """
    if not is_finite(tensor, at_once):
        raise CheckpointError(f"{path}: {what} holds NaN or infinite values; download or export the checkpoint again")


def byte_view(tensor: Tensor) -> memoryview:
    """View the memory of a contiguous CPU tensor as bytes."""
    # As bytes first: numpy has no bfloat16.
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def resolve_model(model: str, *, trust_remote_code: bool = False) -> Path:
    """Find the directory of `model`: a path, or a hub id, which is fetched (safetensors and text files only).

    Raises:
        CheckpointError: neither a directory nor a model of the hub that can be fetched.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"{model} is not a directory; give a model directory or a hub id such as org/name")
    import huggingface_hub
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model*", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.codes"]
    patterns += ["README.md", "*LICENSE*", "*NOTICE*", "*USE_POLICY*"]
    if trust_remote_code:
        patterns.append("*.py")
    try:
        # Some repositories hold the same weights again in their authors' own format.
        ignored = ["consolidated*", "original/*"]
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns, ignore_patterns=ignored))
    except (HTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model} is neither a directory nor a hub model that can be fetched ({reason}); give another --model"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """Read config.json of a model directory.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    file = path / "config.json"
    if file.is_file():
        return read_json(file)
    refuse_adapter(path)
    below = [each.parent for pattern in ("*/config.json", "snapshots/*/config.json") for each in path.glob(pattern)]
    where = f"give {min(below)}, which has one" if below else "give the directory of a transformers checkpoint"
    raise CheckpointError(f"{path} has no config.json; {where}")


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        CheckpointError: the file cannot be read, or holds something else.
    """
    try:
        value = json.loads(retried(partial(file.read_text, encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(_say(file, f"is not readable JSON ({error}); download it again", error)) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__} where an object is expected")
    return value


def _say(file: Path, otherwise: str, error: Exception | None = None) -> str:
    """Say what is wrong with a file: what it is instead, where that can be told, and `otherwise` where it cannot."""
    try:
        return f"{file} {(not isinstance(error, OSError) and mistaken(file)) or otherwise}"
    except OSError:
        return f"{file} {otherwise}"


def _locate_shards(path: Path, named: object = None) -> tuple[list[Path], dict[str, Path]]:
    """List the shard files in order, and say where the index places each tensor (empty without an index).

    Args:
        named: config.json's own name for the file or the index (`transformers_weights`).
    """
    single, index_file = path / SINGLE_FILE, path / INDEX_FILE
    if named is not None:
        single = index_file = path / PurePosixPath(str(named)).name
        if str(named) != single.name or not single.is_file():
            raise CheckpointError(
                f"{path / 'config.json'} names the weights as {named!r}, which is no file of the directory; download "
                "it, or leave transformers_weights out"
            )
    if single.is_file() and single.suffix == ".safetensors":
        return [single], {}
    if not index_file.is_file():
        refuse_without_weights(path, SINGLE_FILE, INDEX_FILE)
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        raise CheckpointError(f"{index_file} has no weight_map; download it again")
    expected: dict[str, Path] = {}
    for name, file in weight_map.items():
        relative = PurePosixPath(str(file))
        # Lexical on purpose: the hub's cache is made of links that point to its blobs.
        if relative.is_absolute() or ".." in relative.parts or "\\" in str(file):
            raise CheckpointError(
                f"{index_file} points outside the model's directory: {name} -> {file}; "
                "use the index as it was published"
            )
        expected[name] = path / relative
    shards = sorted(set(expected.values()))
    for shard in shards:
        if not shard.is_file():
            partial = unfinished(shard)
            what = "missing" if partial is None else f"an unfinished download ({partial.name})"
            raise CheckpointError(f"{index_file} names the shard {shard.name}, which is {what}; download it")
    return shards, expected


def read_header(file: Path, number: int = 0) -> list[TensorEntry | OtherEntry]:
    """Read the tensor entries of one safetensors file, in the order of its header.

    Raises:
        CheckpointError: a header or a tensor that does not fit the file, an unknown dtype.
    """
    try:
        size, text = retried(partial(_header_text, file))
        header = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(_say(file, f"is not a safetensors file ({error}); download it again", error)) from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file (header is no object); download it again")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: its __metadata__ is no object; download it again")
    return [_entry(file, number, 8 + len(text), size, *item) for item in header.items()]


def _header_text(file: Path) -> tuple[int, bytes]:
    """Return the size of a file in bytes, and its header as it is written there."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        # Before it is believed: a damaged length could ask for any amount of memory.
        if header_size > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(_say(file, f"has {size} bytes, its header claims {header_size}; download it again"))
        return size, stream.read(header_size)


def _entry(file: Path, number: int, base: int, size: int, name: str, fields: Any) -> TensorEntry | OtherEntry:
    try:
        dtype_name, shape = str(fields["dtype"]), tuple(int(extent) for extent in fields["shape"])
        begin, end = (int(offset) for offset in fields["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file}: malformed header entry for {name}; download it again") from error
    if dtype_name not in STORED_DTYPES and dtype_name not in OTHER_DTYPES:
        raise CheckpointError(
            f"{file}: {name} is stored as {dtype_name}, which is no dtype of safetensors; "
            f"use a checkpoint in one of {', '.join(STORED_DTYPES)}"
        )
    if base + end > size:
        partial = unfinished(file)
        raise CheckpointError(
            f"{file} is truncated: {name} ends at byte {base + end}, the file at {size}"
            f"{f', and {partial.name} lies beside it' if partial else ''}; download it again"
        )
    bits = STORED_DTYPES[dtype_name].itemsize * 8 if dtype_name in STORED_DTYPES else OTHER_DTYPES[dtype_name]
    nbytes = math.prod(shape) * bits // 8
    if begin < 0 or min(shape, default=1) < 0 or end - begin != nbytes:
        raise CheckpointError(
            f"{file}: {name} {shape} {dtype_name} has {nbytes} bytes, by its header {end - begin}; download it again"
        )
    if dtype_name in OTHER_DTYPES:
        return OtherEntry(name, dtype_name, number, nbytes)
    return TensorEntry(name, STORED_DTYPES[dtype_name], shape, number, base + begin, nbytes)
