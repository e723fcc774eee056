"""Random checkpoints, written one tensor at a time as fast as the disk takes them, however large they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Normals are drawn once: for each of 13 billion weights anew, two cores would take minutes. Their number is a prime,
# so that the rows of a matrix, which repeat them, all begin elsewhere.
NORMALS = 4_194_301
STD = 0.02


def write_model(path: Path, config: Mapping[str, Any], *, max_shard_size: int = 5_000_000_000) -> None:
    """A new directory with config.json and bfloat16 shards; norms are one. Holds one tensor at a time."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    from streamprune.storage.shards import ShardedWriter, TensorSpec

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    model.tie_weights()
    specs = [TensorSpec(name, torch.bfloat16, tuple(p.shape)) for name, p in model.named_parameters()]
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(NORMALS, generator=generator)
    with ShardedWriter(path, specs, max_shard_size) as writer:
        for spec in specs:
            if "norm" in spec.name:
                tensor = torch.ones(spec.shape, dtype=torch.bfloat16)
            else:
                tensor = _weight(spec.shape, normals, generator)
            writer.write(spec.name, tensor)


def _weight(shape: tuple[int, ...], normals: Tensor, generator: torch.Generator) -> Tensor:
    """The normals over and over, begun at a random one and scaled by 0.9 to 1.1, so that no two tensors are equal."""
    first = int(torch.randint(len(normals), (), generator=generator))
    scale = STD * (0.9 + 0.2 * float(torch.rand((), generator=generator)))
    turned = (normals.roll(-first) * scale).bfloat16()
    tensor = torch.empty(torch.Size(shape).numel(), dtype=torch.bfloat16)
    for part in tensor.split(len(turned)):
        part.copy_(turned[: len(part)])
    return tensor.view(shape)


def save_tokenizer(path: Path) -> None:
    """A token per byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(path)
