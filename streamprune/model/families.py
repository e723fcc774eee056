"""Table of the model families: where the layers are, which tensors a unit cuts, what stock classes accept.

A unit is an attention KV group (one KV head with its query heads) or an MLP channel. A tensor takes part in
a unit through one of its dimensions, the lines of that dimension being shared out to the units part by part:
`qkv_proj` of Phi-3 has the parts query | key/value | key/value along its rows.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL_NAMES

from streamprune.errors import CheckpointError
from streamprune.model.units import KINDS, Geometry, Kind, Member, Part

Piece = tuple[int, slice]  # (expert, its rows) of a parameter [experts, rows, columns]


@dataclass(frozen=True)
class Fused:
    """Parameter of a layer [experts, rows, columns] that checkpoints hold as matrices, one or more for each expert.

    Attributes:
        parameter: its name inside the layer.
        parts: names of an expert's matrices inside the layer, "{}" for its number, in the order of their rows; all of
            them have as many.
    """

    parameter: str
    parts: tuple[str, ...]

    def places(self, shape: Sequence[int]) -> Iterator[tuple[str, Piece]]:
        """Yield (name of a stored matrix, where it lies in the parameter of this shape), one after another."""
        experts, rows, _ = shape
        each = rows // len(self.parts)
        for expert in range(experts):
            for number, part in enumerate(self.parts):
                yield part.format(expert), (expert, slice(number * each, (number + 1) * each))


@dataclass(frozen=True)
class Family:
    """Row of the table: what is known of one family.

    Attributes:
        model_type: as in config.json.
        layers: path of the layer list in the ForCausalLM model.
        members: the tensors that units cut.
        channels_key: name of the MLP width in config.json.
        stock_heads: "any" number of KV groups, only a count that "divides" the hidden size, or "fixed".
        ragged: whether layers of different widths can be emitted.
        stored_as: (name in the model, name in checkpoints) of tensors that transformers renames on loading; of a
            layer's, the names inside it.
        fused: parameters of a layer that transformers makes of several tensors on loading: the experts.
    """

    model_type: str
    layers: str
    members: tuple[Member, ...]
    channels_key: str = "intermediate_size"
    stock_heads: Literal["any", "divides", "fixed"] = "any"
    ragged: bool = True
    stored_as: tuple[tuple[str, str], ...] = ()
    fused: tuple[Fused, ...] = ()

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Kinds of unit that can be pruned, in the order of KINDS."""
        return tuple(kind for kind in KINDS if any(member.kind == kind for member in self.members))


def _linear(name: str, dim: int, *parts: Part) -> tuple[Member, ...]:
    """List the members of a projection: rows go with their bias, columns leave it."""
    weight = Member(f"{name}.weight", dim, parts)
    return (weight, Member(f"{name}.bias", 0, parts, scored=False)) if dim == 0 else (weight,)


_ATTENTION = (
    *_linear("self_attn.q_proj", 0, "query"),
    *_linear("self_attn.k_proj", 0, "kv"),
    *_linear("self_attn.v_proj", 0, "kv"),
    *_linear("self_attn.o_proj", 1, "query"),
)
_GATED_MLP = (
    *_linear("mlp.gate_proj", 0, "channel"),
    *_linear("mlp.up_proj", 0, "channel"),
    *_linear("mlp.down_proj", 1, "channel"),
)
_LLAMA = _ATTENTION + _GATED_MLP
# OLMo 2 normalises queries and keys over all heads at once, so the norm's weight goes with the heads.
_OLMO2 = (
    *_LLAMA,
    Member("self_attn.q_norm.weight", 0, ("query",), scored=False),
    Member("self_attn.k_norm.weight", 0, ("kv",), scored=False),
)
_PHI3 = (
    *_linear("self_attn.qkv_proj", 0, "query", "kv", "kv"),
    *_linear("self_attn.o_proj", 1, "query"),
    *_linear("mlp.gate_up_proj", 0, "channel", "channel"),
    *_linear("mlp.down_proj", 1, "channel"),
)
# Of Mixtral's experts w1 is gate, w3 up and w2 down.
_MIXTRAL_EXPERTS = (
    Fused(
        "mlp.experts.gate_up_proj",
        ("block_sparse_moe.experts.{}.w1.weight", "block_sparse_moe.experts.{}.w3.weight"),
    ),
    Fused("mlp.experts.down_proj", ("block_sparse_moe.experts.{}.w2.weight",)),
)
_OPT = (*_linear("fc1", 0, "channel"), *_linear("fc2", 1, "channel"))
_GPT_NEOX = (*_linear("mlp.dense_h_to_4h", 0, "channel"), *_linear("mlp.dense_4h_to_h", 1, "channel"))
# GPT-2's Conv1D stores [d_in, d_out].
_GPT2 = (
    Member("mlp.c_fc.weight", 1, ("channel",)),
    Member("mlp.c_fc.bias", 0, ("channel",), scored=False),
    Member("mlp.c_proj.weight", 0, ("channel",)),
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "model.layers", _LLAMA, stock_heads="divides"),
        Family("mistral", "model.layers", _LLAMA),
        Family("qwen2", "model.layers", _LLAMA),
        Family("qwen3", "model.layers", _LLAMA),
        Family("gemma2", "model.layers", _LLAMA, stock_heads="divides"),
        Family("gemma3_text", "model.layers", _LLAMA, stock_heads="divides"),
        Family("phi3", "model.layers", _PHI3),
        Family("olmo2", "model.layers", _OLMO2),
        Family("smollm3", "model.layers", _LLAMA),
        Family("granite", "model.layers", _LLAMA),
        Family(
            "mixtral",
            "model.layers",
            _ATTENTION,
            ragged=False,
            stored_as=(("mlp.gate.weight", "block_sparse_moe.gate.weight"),),
            fused=_MIXTRAL_EXPERTS,
        ),
        Family("opt", "model.decoder.layers", _OPT, "ffn_dim", "fixed", ragged=False),
        Family(
            "gpt_neox",
            "gpt_neox.layers",
            _GPT_NEOX,
            stock_heads="fixed",
            ragged=False,
            stored_as=(("lm_head.weight", "embed_out.weight"),),
        ),
        Family("gpt2", "transformer.h", _GPT2, "n_inner", "fixed", ragged=False),
    )
}
RAGGED_PREFIX = "streamprune_"
# The text models of others, by model_type, where their text_config leaves out its own.
TEXT_FAMILIES = {"gemma3": "gemma3_text", "llava": "llama", "mistral3": "mistral", "mllama": "llama"}


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """Find the family of a config.json; layers of different widths that streamprune wrote are their dense model's.

    Args:
        where: the directory, for the message.

    Raises:
        CheckpointError: no family of that name; the known ones are listed.
    """
    model_type = str(config.get("model_type")).removeprefix(RAGGED_PREFIX)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    kind = f"unknown family {model_type!r}" if config.get("model_type") else "config.json has no model_type"
    raise CheckpointError(f"{where}: {kind}; {_advice(config, where)}known are {', '.join(FAMILIES)}")


def _advice(config: Mapping[str, Any], where: object) -> str:
    """Say what to do about a family that is not known: use its part that is, or the family that may be meant."""
    model_type, part = str(config.get("model_type") or ""), config.get("text_config")
    text = part.get("model_type", TEXT_FAMILIES.get(model_type)) if isinstance(part, Mapping) else None
    if isinstance(text, str) and text in FAMILIES:
        return (
            f"its text model is of the family {text}: copy {where} and write the text_config of its config.json there "
            f'as the whole config.json, with "model_type": "{text}"; its other tensors are left out then; '
        )
    if not model_type:
        named = config.get("architectures")
        named = named if isinstance(named, list) else []
        written = [name for name in FAMILIES if CAUSAL_NAMES.get(name) in named]
        return f'write "model_type": "{written[0]}" into it; ' if written else "write its family there; "
    nearest, known = _nearest(model_type), model_type in CONFIG_MAPPING_NAMES
    if nearest is None:
        return ""
    if known:
        return f"the nearest is {nearest}, whose layers are others: choose a model of that family; "
    return f'write "model_type": "{nearest}" into config.json if that is what is meant; '


def _nearest(model_type: str) -> str | None:
    """Find the family whose name is most like this one, if any is; one that transformers knows must begin alike."""
    if model_type in TEXT_FAMILIES:
        return TEXT_FAMILIES[model_type]
    start = model_type[:2] if model_type in CONFIG_MAPPING_NAMES else ""
    plain = {family.replace("_", ""): family for family in FAMILIES if family.startswith(start)}
    wanted = "".join(filter(str.isalnum, model_type.lower()))
    close = difflib.get_close_matches(wanted, plain, n=1, cutoff=0.5)
    return plain[close[0]] if close else None


def geometry_of(family: Family, config: Any) -> Geometry:
    """Read the sizes of a layer from a transformers config, which fills in what config.json leaves out.

    Where layers have widths of their own, these are the widths before they were pruned.
    """
    config = config.dense() if hasattr(config, "dense") else config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    # GPT-2 leaves n_inner unset for four times the hidden size.
    channels = getattr(config, family.channels_key) or 4 * config.hidden_size
    return Geometry(kv_heads, heads // kv_heads, head_dim, channels)


def layer_geometry(family: Family, usual: Geometry, shapes: Mapping[str, Sequence[int]]) -> Geometry:
    """Return the sizes of one layer: those `usual` in its model, with the numbers of units that its shapes show."""
    one = replace(usual, kv_groups=1, channels=1)
    counts = dict.fromkeys(family.kinds, 0)  # a layer may lack a kind
    for member in family.members:
        if member.tensor in shapes:
            counts[member.kind] = shapes[member.tensor][member.dim] // one.lines(member)
    return replace(
        usual,
        kv_groups=counts.get("kv_group", usual.kv_groups),
        channels=counts.get("channel", usual.channels),
    )


def stock_takes(family: Family, geometry: Geometry, groups: int, hidden_size: int) -> bool:
    """Tell whether the family's own class accepts layers of so many KV groups."""
    heads = groups * geometry.n_rep
    return family.stock_heads == "any" or (heads > 0 and hidden_size % heads == 0)


def unit_costs(family: Family, geometry: Geometry, shapes: Mapping[str, Iterable[int]]) -> dict[Kind, int]:
    """Count the parameters that one unit of each kind takes with it, biases and head-spanning norms included.

    Args:
        shapes: shapes of the layer's tensors, by their names inside the layer.
    """
    costs: dict[Kind, int] = dict.fromkeys(family.kinds, 0)
    for member in family.members:
        if member.tensor in shapes:
            numel = torch.Size(shapes[member.tensor]).numel()
            costs[member.kind] += numel // max(1, geometry.units(member.kind))
    return costs
