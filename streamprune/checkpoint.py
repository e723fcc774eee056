"""safetensors checkpoints: headers, extents and raw reads. Knows nothing of models.

Shards are never memory-mapped: reads into buffers that the caller keeps (readers.py) are faster and leave no
file pages in the process. Pickled weights are refused.
"""

from __future__ import annotations

import json
import math
import os
import struct
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import CheckpointError
from streamprune.readers import Reader, ReaderKind, retried

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FINITE_BLOCK = 1 << 20  # elements
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself

DTYPES = {
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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies: `nbytes` bytes at `offset` (from the start of the file) of `files[file]`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


class Checkpoint:
    """A directory of safetensors shards, opened once. Usable from several threads; close when done.

    Args:
        path: a directory with config.json and model.safetensors or its index.
        reader: how shards are read: "buffered", or "direct", around the page cache.

    Raises:
        CheckpointError: anything missing, truncated, malformed or pointing outside the directory.
    """

    def __init__(self, path: Path, reader: ReaderKind = "buffered") -> None:
        self.path = path
        self.config = read_config(path)
        self.files, expected = _locate_shards(path)
        self.tensors: dict[str, TensorEntry] = {}
        for number, file in enumerate(self.files):
            for entry in read_header(file, number):
                if entry.name in self.tensors:
                    raise CheckpointError(f"{file}: tensor {entry.name} is also in another shard; re-export it")
                self.tensors[entry.name] = entry
        for name, file in expected.items():
            if name not in self.tensors or self.files[self.tensors[name].file] != file:
                raise CheckpointError(
                    f"{path / INDEX_FILE} places {name} in {file.name}, which does not hold it; "
                    "download or export the checkpoint again"
                )
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

    def read_into(self, file: int, offset: int, buffer: memoryview, *, stays: bool = True) -> None:
        """Fill `buffer` with the bytes at `offset` of shard `file`.

        Not `stays`: leave no page of them in the page cache, which could not keep them until they are read again.

        Raises:
            CheckpointError: the file ended first, or could not be read.
        """
        self._reader.read_into(file, offset, buffer, stays=stays)
        with self._lock:
            self.bytes_read += len(buffer)

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored, in memory of its own."""
        entry = self.tensors[name]
        raw = torch.empty(entry.nbytes, dtype=torch.uint8)
        self.read_into(entry.file, entry.offset, byte_view(raw))
        return raw.view(entry.dtype).view(entry.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())


def is_finite(tensor: Tensor) -> bool:
    """Whether it holds no NaN and no infinity. A finite sum proves it without a mask of the tensor's size.

    On a CPU in blocks: a sum in another dtype than the tensor's makes a copy of what it sums.
    """
    blocks = tensor.flatten().split(FINITE_BLOCK) if tensor.device.type == "cpu" else [tensor]
    return all(bool(torch.isfinite(each.sum(dtype=torch.float32)) or torch.isfinite(each).all()) for each in blocks)


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes."""
    array: Any = tensor.view(-1).view(torch.uint8).numpy()
    return memoryview(array)


def resolve_model(model: str, *, trust_remote_code: bool = False) -> Path:
    """The directory of `model`: a path, or a hub id fetched (safetensors and text files only) into its cache."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise CheckpointError(f"{model} is not a directory; give a model directory or a hub id such as org/name")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model*", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.codes"]
    patterns += ["README.md", "*LICENSE*", "*NOTICE*", "*USE_POLICY*"]
    if trust_remote_code:
        patterns.append("*.py")
    try:
        # Some repositories hold the same weights again in their authors' own format.
        ignored = ["consolidated*", "original/*"]
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns, ignore_patterns=ignored))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{model} is neither a directory nor a hub model that can be fetched ({reason})"
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json; give the directory of a transformers checkpoint")
    return read_json(file)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file, or a CheckpointError that names the file."""
    try:
        value = json.loads(retried(partial(file.read_text, encoding="utf-8")))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not readable JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds a {type(value).__name__} where an object is expected")
    return value


def _locate_shards(path: Path) -> tuple[list[Path], dict[str, Path]]:
    """The shard files in order, and where the index says each tensor lies (empty without an index)."""
    if (path / SINGLE_FILE).is_file():
        return [path / SINGLE_FILE], {}
    index_file = path / INDEX_FILE
    if not index_file.is_file():
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in path.glob(pattern))
        if pickles:
            raise CheckpointError(
                f"{path} holds pickled weights only ({pickles[0]}), which can run code when opened; "
                "convert it with save_pretrained(...) in transformers, which writes safetensors"
            )
        raise CheckpointError(
            f"{path} has neither {SINGLE_FILE} nor {INDEX_FILE}; download the weights, or where they are published as "
            "pickles only, convert them with save_pretrained(...) in transformers"
        )
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
            raise CheckpointError(f"{index_file} names the shard {shard.name}, which is missing; download it")
    return shards, expected


def read_header(file: Path, number: int = 0) -> list[TensorEntry]:
    """The tensor entries of one safetensors file, in the order of its header.

    Raises:
        CheckpointError: a header or a tensor that does not fit the file, an unknown dtype.
    """
    try:
        size, text = retried(partial(_header_text, file))
        header = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is not a safetensors file ({error}); download it again") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file} is not a safetensors file (header is no object); download it again")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise CheckpointError(f"{file}: its __metadata__ is no object; download it again")
    return [_entry(file, number, 8 + len(text), size, *item) for item in header.items()]


def _header_text(file: Path) -> tuple[int, bytes]:
    """Bytes of the file, and the header as it is written there."""
    with file.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        prefix = stream.read(8)
        header_size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if header_size > min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{file}: its header claims {header_size} bytes, the file has {size}; download it again"
            )
        return size, stream.read(header_size)


def _entry(file: Path, number: int, base: int, size: int, name: str, fields: Any) -> TensorEntry:
    try:
        dtype_name, shape = str(fields["dtype"]), tuple(int(extent) for extent in fields["shape"])
        begin, end = (int(offset) for offset in fields["data_offsets"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{file}: malformed header entry for {name}; download it again") from error
    if dtype_name not in DTYPES:
        raise CheckpointError(
            f"{file}: {name} is stored as {dtype_name}, which cannot be pruned; "
            f"use a checkpoint in one of {', '.join(DTYPES)}"
        )
    if base + end > size:
        raise CheckpointError(
            f"{file} is truncated: {name} ends at byte {base + end}, the file at {size}; download it again"
        )
    dtype = DTYPES[dtype_name]
    nbytes = math.prod(shape) * dtype.itemsize
    if begin < 0 or min(shape, default=1) < 0 or end - begin != nbytes:
        raise CheckpointError(
            f"{file}: {name} {list(shape)} {dtype_name} needs {nbytes} bytes, its header gives {end - begin}"
        )
    return TensorEntry(name, dtype, shape, number, base + begin, nbytes)
