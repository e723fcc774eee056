"""Tiny random models of every family, built and run by transformers itself."""

from __future__ import annotations

import json
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from streamprune.model.families import FAMILIES
from streamprune.model.skeleton import Skeleton
from streamprune.paging.device import HostDevice
from streamprune.paging.pager import Pager
from streamprune.storage.checkpoint import Checkpoint
from streamprune.storage.reader import DISK_BLOCK
from streamprune.streaming.sweeper import Sweeper

VOCABULARY = 260  # the bytes and a few specials
N_LAYERS = 4

# Grouped KV heads, head sizes that are not hidden/heads, odd MLP widths, biases where the family can have them.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 37,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_SLIDING = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "llama": _COMMON | {"head_dim": 10},
    "mistral": _COMMON | {"head_dim": 8, "sliding_window": 7},
    "qwen2": dict(_COMMON),
    "qwen3": _COMMON | {"head_dim": 10, "attention_bias": True},
    "gemma2": _COMMON | {"head_dim": 10, "query_pre_attn_scalar": 10, "sliding_window": 7, "layer_types": _SLIDING},
    "gemma3_text": _COMMON
    | {"head_dim": 10, "query_pre_attn_scalar": 10, "sliding_window": 7, "layer_types": _SLIDING},
    "phi3": dict(_COMMON),
    "olmo2": dict(_COMMON),
    "smollm3": _COMMON | {"no_rope_layers": [1, 1, 0, 1]},
    "granite": _COMMON
    | {"attention_multiplier": 0.3, "residual_multiplier": 0.7, "logits_scaling": 2.0}
    | {"attention_bias": True, "mlp_bias": True},
    # In plain transformers an expert's rows have to be of whole 16 bytes.
    "mixtral": _COMMON | {"head_dim": 10, "intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {k: v for k, v in _COMMON.items() if k != "num_key_value_heads"},
    "opt": {k: v for k, v in _COMMON.items() if k not in ("num_key_value_heads", "intermediate_size")}
    | {"ffn_dim": 37, "word_embed_proj_dim": 48},
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 48,
        "n_head": 6,
        "n_layer": N_LAYERS,
        "n_positions": 64,
        "n_inner": 37,
        "bos_token_id": 256,
        "eos_token_id": 257,
    },
}
FAMILY_NAMES = tuple(FAMILY_FIELDS)
GROUPED = tuple(name for name, fields in FAMILY_FIELDS.items() if "num_key_value_heads" in fields)
RAGGED = tuple(name for name in FAMILY_NAMES if FAMILIES[name].ragged)
# transformers' preferred way to run experts has no float64; other families have no say in it.
EXPERTS = {"experts_implementation": "eager"}


def tiny_model(
    family: str, *, tied: bool = False, dtype: torch.dtype = torch.float64, seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """A random model whose weights are large enough for every unit to matter; biases and norms are random too."""
    config = AutoConfig.for_model(family, **{**FAMILY_FIELDS[family], "tie_word_embeddings": tied, **fields})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, **EXPERTS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise * 0.15)
            else:
                parameter.add_((noise * 0.1).to(dtype))
    return model.eval()


def save_tiny(path: Path, family: str, **options: Any) -> PreTrainedModel:
    """`tiny_model` saved to `path`, with a byte tokenizer; returns the model."""
    model = tiny_model(family, **options)
    model.save_pretrained(path)
    save_tokenizer(path)
    return model


def save_tokenizer(path: Path) -> None:
    """A byte-level tokenizer without merges: a token per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<s>", "</s>", "<pad>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )
    fast.save_pretrained(path)


def merge_once(path: Path) -> None:
    """Let a saved tokenizer merge a space and a t: llama.cpp knows none that merges nothing."""
    file = path / "tokenizer.json"
    stored = json.loads(file.read_text())
    stored["model"] |= {"vocab": stored["model"]["vocab"] | {"Ġt": VOCABULARY - 1}, "merges": [["Ġ", "t"]]}
    file.write_text(json.dumps(stored))


def make_sweeper(path: Path, *, dtype: torch.dtype = torch.float64, micro_batch: int = 64, **options: Any) -> Sweeper:
    """A sweeper over a saved model on the CPU, with released slots poisoned with NaN."""
    checkpoint = Checkpoint(path)
    skeleton = Skeleton(checkpoint, dtype, torch.device("cpu"), **options)
    return Sweeper(skeleton, Pager(checkpoint, skeleton.entries, HostDevice(), poison=True), micro_batch)


def need_direct(directory: Path) -> None:
    """Skip the test where the directory's filesystem refuses O_DIRECT."""
    probe = directory / "probe"
    probe.write_bytes(bytes(DISK_BLOCK))
    memory = mmap.mmap(-1, DISK_BLOCK)
    try:
        descriptor = os.open(probe, os.O_RDONLY | os.O_DIRECT)
        try:
            os.preadv(descriptor, [memory], 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        pytest.skip(f"{directory} cannot be read with O_DIRECT ({error.strerror}); use --basetemp on another disk")


def token_ids(n: int = 3, seq: int = 12, seed: int = 0) -> torch.Tensor:
    """Random token ids [n, seq]."""
    return torch.randint(0, 256, (n, seq), generator=torch.Generator().manual_seed(seed))


def whole_model_gradients(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of the mean next-token loss for every parameter, by one backward pass through the whole model."""
    model.zero_grad()
    logits = model(ids).logits[:, :-1]
    torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), ids[:, 1:].flatten()).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
