"""Tiny dense models, and the same models sliced into ragged checkpoints or masked, by hand.

Nothing of this comes from streamprune but the names in config.json and the modelling file, so that what is
tested is not compared with itself.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel

from streamprune.output.ragged import modeling_source, ragged_config_fields

HEADS, GROUPS, HEAD_DIM, CHANNELS = 8, 4, 16, 37
N_REP = HEADS // GROUPS
# head_dim is not hidden_size / heads, and a layer with 6 heads does not divide the hidden size.
BASE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": CHANNELS,
    "num_hidden_layers": 4,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = 8
SLIDING_LAYERS = ["sliding_attention", "full_attention"] * 2
EXTRA: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": SLIDING_LAYERS},
    "qwen3": {"tie_word_embeddings": True},
    "gemma2": {"sliding_window": WINDOW, "query_pre_attn_scalar": HEAD_DIM, "tie_word_embeddings": True},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "query_pre_attn_scalar": HEAD_DIM,
        "layer_types": SLIDING_LAYERS,
        "tie_word_embeddings": True,
    },
    "phi3": {"sliding_window": WINDOW},
    # The norm over all heads divides by a mean that pruning changes; a large epsilon would not scale along.
    "olmo2": {"rms_norm_eps": 1e-12},
    "smollm3": {
        "use_sliding_window": True,
        "sliding_window": WINDOW,
        "no_rope_layers": [1, 0, 1, 0],
        "layer_types": SLIDING_LAYERS[::-1],
    },
    "granite": {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2},
}
FAMILIES = list(EXTRA)
# The stock class itself refuses sdpa for gemma2, which caps its attention logits.
EAGER_ONLY = {"gemma2"}


@dataclass(frozen=True)
class Cut:
    """What a layer keeps: KV groups and channels by index, `()` for a skipped block."""

    groups: tuple[int, ...] = tuple(range(GROUPS))
    channels: tuple[int, ...] = tuple(range(CHANNELS))

    def overrides(self) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        if not self.groups:
            fields["skip"] = ["attention"]
        elif len(self.groups) < GROUPS:
            fields |= {
                "num_attention_heads": N_REP * len(self.groups),
                "num_key_value_heads": len(self.groups),
            }
        if not self.channels:
            fields["skip"] = ["mlp"]
        elif len(self.channels) < CHANNELS:
            fields["intermediate_size"] = len(self.channels)
        return fields


def random_cuts(seed: str) -> list[Cut]:
    """Layer 0 without attention, layer 2 without MLP, layer 1 of 6 heads, layer 3 of 2."""
    rng = random.Random(seed)

    def keep(units: int, n: int) -> tuple[int, ...]:
        return tuple(sorted(rng.sample(range(units), n)))

    return [
        Cut((), keep(CHANNELS, 23)),
        Cut(keep(GROUPS, 3), keep(CHANNELS, 30)),
        Cut(keep(GROUPS, 2), ()),
        Cut(keep(GROUPS, 1)),
    ]


def dense_model(model_type: str, **overrides: Any) -> PreTrainedModel:
    """A tiny model, float32, in which norms and biases are random too."""
    config = AutoConfig.for_model(model_type, **(BASE | EXTRA[model_type] | overrides))
    torch.manual_seed(FAMILIES.index(model_type))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def rows_of_groups(groups: tuple[int, ...], width: int) -> list[int]:
    """The rows of the kept groups in a projection with `width` rows per group."""
    return [group * width + i for group in groups for i in range(width)]


def kept_lines(name: str, cut: Cut, head_dim: int) -> tuple[int, list[int]] | None:
    """(dimension, kept indices) of a tensor of a layer, None where it is not cut."""
    query = rows_of_groups(cut.groups, N_REP * head_dim)
    kv = rows_of_groups(cut.groups, head_dim)
    channels = list(cut.channels)
    module, leaf = name.split(".")[-2:]
    q_end, k_end = HEADS * head_dim, (HEADS + GROUPS) * head_dim
    rows = {
        "q_proj": query,
        "k_proj": kv,
        "v_proj": kv,
        "qkv_proj": query + [q_end + i for i in kv] + [k_end + i for i in kv],
        "gate_proj": channels,
        "up_proj": channels,
        "gate_up_proj": channels + [CHANNELS + i for i in channels],
    }
    if module in rows:
        return 0, rows[module]
    if leaf == "weight" and module in ("o_proj", "down_proj"):
        return 1, query if module == "o_proj" else channels
    return None


def is_skipped(name: str, model_type: str, cut: Cut) -> bool:
    """Whether a tensor of a layer belongs to a block that is gone, its norms included."""
    attention, mlp = ["self_attn."], ["mlp."]
    if model_type in ("gemma2", "gemma3_text"):
        attention += ["input_layernorm", "post_attention_layernorm"]
        mlp += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    elif model_type == "olmo2":
        attention += ["post_attention_layernorm"]
        mlp += ["post_feedforward_layernorm"]
    else:
        attention += ["input_layernorm"]
        mlp += ["post_attention_layernorm"]
    gone = (attention if not cut.groups else []) + (mlp if not cut.channels else [])
    return name.split(".", 3)[3].startswith(tuple(gone))


def slice_state(model: PreTrainedModel, model_type: str, cuts: list[Cut]) -> dict[str, torch.Tensor]:
    """The tensors of the ragged checkpoint."""
    state = {}
    head_dim = model.config.head_dim
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        if name.startswith("model.layers."):
            cut = cuts[int(name.split(".")[2])]
            if is_skipped(name, model_type, cut):
                continue
            lines = kept_lines(name, cut, head_dim)
            if model_type == "olmo2" and ".q_norm." in name:
                lines = 0, rows_of_groups(cut.groups, N_REP * head_dim)
            if model_type == "olmo2" and ".k_norm." in name:
                lines = 0, rows_of_groups(cut.groups, head_dim)
            if lines is not None:
                tensor = tensor.index_select(lines[0], torch.tensor(lines[1]))
        state[name] = tensor.contiguous()
    return state


@torch.no_grad()
def mask_dense(model: PreTrainedModel, model_type: str, cuts: list[Cut]) -> PreTrainedModel:
    """Zeroes, in place, the columns through which the removed units speak."""
    head_dim = model.config.head_dim
    for layer, cut in zip(model.model.layers, cuts, strict=True):
        for projection, name in ((layer.self_attn.o_proj, "o_proj"), (layer.mlp.down_proj, "down_proj")):
            _, kept = kept_lines(f"{name}.weight", cut, head_dim) or (1, [])
            removed = sorted(set(range(projection.in_features)) - set(kept))
            projection.weight[:, removed] = 0
            if not kept and projection.bias is not None:
                projection.bias.zero_()
        if model_type == "olmo2" and cut.groups:
            attention = layer.self_attn
            for projection, norm, width in (
                (attention.q_proj, attention.q_norm, N_REP * head_dim),
                (attention.k_proj, attention.k_norm, head_dim),
            ):
                removed_groups = tuple(sorted(set(range(GROUPS)) - set(cut.groups)))
                projection.weight[rows_of_groups(removed_groups, width)] = 0
                # The mean of squares now runs over the kept heads only.
                norm.weight *= (len(cut.groups) / GROUPS) ** 0.5
    return model


def write_checkpoint(path: Path, model: PreTrainedModel, model_type: str, cuts: list[Cut]) -> None:
    """config.json, the modelling file and the sliced weights, in a new directory."""
    path.mkdir()
    config = model.config.to_dict() | ragged_config_fields(model_type)
    config["per_layer_config"] = {f"{i:02}": cut.overrides() for i, cut in enumerate(cuts) if cut.overrides()}
    (path / "config.json").write_text(json.dumps(config))
    (path / f"modeling_streamprune_{model_type}.py").write_text(modeling_source(model_type))
    save_file(slice_state(model, model_type, cuts), path / "model.safetensors", metadata={"format": "pt"})


def load(path: Path, auto: Any = AutoModelForCausalLM, **kwargs: Any) -> PreTrainedModel:
    """Loads with nothing left over and nothing made up."""
    model, info = auto.from_pretrained(path, dtype=torch.float32, output_loading_info=True, **kwargs)
    left_over = {key: value for key, value in info.items() if value}
    if auto is AutoModel:
        left_over.pop("unexpected_keys", None)
    assert not left_over
    return model.eval()


def tokens() -> torch.Tensor:
    """[2, 3 * WINDOW], without the padding token."""
    return torch.randint(1, BASE["vocab_size"], (2, 3 * WINDOW), generator=torch.Generator().manual_seed(7))


def left_padded() -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), the first row with five padding tokens before its text."""
    input_ids = tokens()
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, :5] = BASE["pad_token_id"]
    attention_mask[0, :5] = 0
    return input_ids, attention_mask
