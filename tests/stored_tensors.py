"""Tensors of every dtype and shape, and checkpoints that safetensors itself writes of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

from streamprune.storage.checkpoint import STORED_DTYPES, byte_view

GENERATOR_SEED = 7


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bytes as `dtype`, so that NaN, infinities and subnormals are among the values."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED + sum(shape))
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    count = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in dtype, shape and every byte (NaN included)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or bytes(byte_view(a.contiguous())) == bytes(byte_view(b.contiguous()))


EVERY_DTYPE = {
    f"{name}.{shape}": random_tensor(dtype, *shape)
    for name, dtype in STORED_DTYPES.items()
    for shape in ((3, 5), (7,), (), (0, 4), (2, 3, 4))
}


def save(path: Path, *shards: Mapping[str, torch.Tensor]) -> Path:
    """A checkpoint directory in one file, or in several with an index."""
    path.mkdir()
    (path / "config.json").write_text("{}")
    if len(shards) == 1:
        save_file(dict(shards[0]), path / "model.safetensors", metadata={"format": "pt"})
        return path
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(shard), path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path
