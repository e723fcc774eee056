"""streamprune_llama: the `llama` architecture with decoder layers of different widths.

config.json gives the widths of the dense model and, under `per_layer_config`, what a layer has instead:
fewer heads (`num_attention_heads`, `num_key_value_heads`), fewer MLP channels (`intermediate_size`), or no
attention or no MLP at all (`skip`; such a block has neither weights nor norm). With `output_biases`, attention
and MLP end with a bias. All else is the transformers model.

Written by streamprune, which pruned the checkpoint. Load it with
`AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`, transformers 5.15 or later. So load the
classifiers for sequences and tokens, and the one for question answering, with heads yet to be trained.

SPDX-License-Identifier: Apache-2.0
"""

import copy
import functools
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

if Version(transformers.__version__).release < (5, 15):
    raise ImportError(f"layers of different widths need transformers 5.15 or later, this is {transformers.__version__}")

from huggingface_hub.dataclasses import strict
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig
from transformers.modeling_layers import (
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
)
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaForCausalLM,
    LlamaModel,
    LlamaPreTrainedModel,
)

# The norms that serve one block only, before or after it.
ATTENTION_NORMS: tuple[str, ...] = ("input_layernorm",)
MLP_NORMS: tuple[str, ...] = ("post_attention_layernorm",)


@strict
class StreampruneLlamaConfig(LlamaConfig):
    """The arguments of `LlamaConfig`, and `per_layer_config`: layer index to the fields that differ there.

    Reading such a field here raises: `config.per_layer_config[i]` has it for layer i, `config.dense()` has
    the width before pruning.
    """

    model_type = "streamprune_llama"

    def __post_init__(self, **kwargs: Any) -> None:
        self._shared_with_copies: dict[str, str | None] = {}
        super().__post_init__(**kwargs)
        dense = self.dense()
        if getattr(dense, "head_dim", None) is None:
            # A layer with fewer heads would otherwise divide the hidden size into larger ones.
            self.head_dim = dense.hidden_size // dense.num_attention_heads
        file = f"modeling_{self.model_type}"
        self.auto_map = {
            "AutoConfig": f"{file}.StreampruneLlamaConfig",
            "AutoModel": f"{file}.StreampruneLlamaModel",
            "AutoModelForCausalLM": f"{file}.StreampruneLlamaForCausalLM",
            "AutoModelForSequenceClassification": f"{file}.StreampruneLlamaForSequenceClassification",
            "AutoModelForTokenClassification": f"{file}.StreampruneLlamaForTokenClassification",
            "AutoModelForQuestionAnswering": f"{file}.StreampruneLlamaForQuestionAnswering",
        }

    # The comparison that a dataclass generates reads every field, those that differ by layer too, and raises.
    __eq__ = PreTrainedConfig.__eq__

    def dense(self) -> "StreampruneLlamaConfig":
        """A copy without overrides, in which every layer has the widths before pruning."""
        config = copy.copy(self)
        config.per_layer_config = None
        return config

    # Each layer is built from a copy of the config, and attention asks its copy which implementation to run.
    # The copies share that one value with the model's config, from which the mask is made: sdpa needs no mask
    # where it is told to be causal, and an eager layer given no mask would look ahead.
    @property
    def _attn_implementation_internal(self) -> str | None:
        return self._shared_with_copies.get("attn_implementation")

    @_attn_implementation_internal.setter
    def _attn_implementation_internal(self, value: str | None) -> None:
        self._shared_with_copies["attn_implementation"] = value

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """Per layer, "reuse" for one that keeps no keys and values.

        The cache asks its first layer that keeps any for the sequence length. A layer 0 without attention,
        unless marked here, would answer 0 forever.
        """
        return ["reuse" if "attention" in skipped(layer) else None for layer in self.per_layer_config]

    def validate_architecture(self) -> None:
        """Every layer has whole KV groups and at least one block; heads need not divide the hidden size."""
        layer: Any
        for layer_idx, layer in enumerate(self.per_layer_config):
            skip = skipped(layer)
            if skip not in ([], ["attention"], ["mlp"]):
                raise ValueError(f'layer {layer_idx}: skip is {skip}, not ["attention"] or ["mlp"].')
            heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
            if heads < 1 or kv_heads < 1 or heads % kv_heads:
                raise ValueError(f"layer {layer_idx}: {heads} heads do not share {kv_heads} KV heads evenly.")

    def validate_rope(self) -> None:
        """As for the dense model: some rope types are checked against the number of heads."""
        LlamaConfig.validate_rope(self.dense())

    def save_pretrained(self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves this file beside config.json, so that what is saved loads without streamprune too."""
        super().save_pretrained(save_directory, push_to_hub, **kwargs)
        source = inspect.getsource(sys.modules[__name__])
        Path(save_directory, f"modeling_{self.model_type}.py").write_text(source, encoding="utf-8")

    def to_dict(self) -> dict[str, Any]:
        """As transformers has it. PEFT asks for it before it looks up what to adapt."""
        name_default_targets()
        return super().to_dict()

    def _remove_keys_not_serialized(self, d: dict[str, Any]) -> None:
        super()._remove_keys_not_serialized(d)
        d.pop("_shared_with_copies", None)


def name_default_targets() -> None:
    """Lets PEFT, where it is imported, adapt by default the modules that it would adapt in the dense model.

    Its public tables go by model_type, and there is no other way to enter one. LoRA has a default for every family.
    """
    constants = sys.modules.get("peft.utils.constants")
    for name, table in vars(constants).items() if constants is not None else ():
        if name.endswith("_MODULES_MAPPING") and LlamaConfig.model_type in table:
            table.setdefault(StreampruneLlamaConfig.model_type, table[LlamaConfig.model_type])
        elif name == "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING":
            table.setdefault(StreampruneLlamaConfig.model_type, ["q_proj", "v_proj", "qkv_proj"])


def skipped(layer_config: PreTrainedConfig) -> list[str]:
    """The blocks that a layer lacks: [], ["attention"] or ["mlp"]."""
    return getattr(layer_config, "skip", [])


class NoMLP(nn.Module):
    """In the place of an MLP that was pruned: adds zero to the residual stream."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        return torch.zeros_like(hidden_states)


# Not an `nn.Module` in so many words: transformers searches the file for such an attention class, and takes
# one that dispatches nothing to mean that the attention implementation of the model cannot be changed.
class NoAttention(NoMLP):
    """In the place of an attention block that was pruned: likewise, and no attention weights."""

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> tuple[Tensor, None]:
        return super().forward(hidden_states), None


def ragged_layer(config: StreampruneLlamaConfig, layer_idx: int) -> LlamaDecoderLayer:
    """Decoder layer `layer_idx`, as wide as its own config says."""
    layer_config: Any = config.per_layer_config[layer_idx]
    layer: Any = LlamaDecoderLayer(layer_config, layer_idx)
    if getattr(config.dense(), "output_biases", False):
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = nn.Parameter(torch.zeros(linear.out_features))
    if "attention" in skipped(layer_config):
        layer.self_attn = NoAttention()
        for norm in ATTENTION_NORMS:
            setattr(layer, norm, nn.Identity())
    if "mlp" in skipped(layer_config):
        layer.mlp = NoMLP()
        for norm in MLP_NORMS:
            setattr(layer, norm, nn.Identity())
    return layer


def without_layers(config: StreampruneLlamaConfig) -> StreampruneLlamaConfig:
    """The config from which the transformers class builds everything but the layers."""
    config = config.dense()
    config.num_hidden_layers = 0
    return config


class StreampruneLlamaModel(LlamaModel):
    """`LlamaModel` with layers of their own widths."""

    config_class = StreampruneLlamaConfig

    def __init__(self, config: StreampruneLlamaConfig) -> None:
        super().__init__(without_layers(config))
        self.config = config
        self.layers = nn.ModuleList(ragged_layer(config, i) for i in range(config.num_hidden_layers))
        self.kv_heads = [0 if "attention" in skipped(c) else c.num_key_value_heads for c in config.per_layer_config]
        self.post_init()

    @functools.wraps(LlamaModel.forward)  # transformers reads its signature
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """As the dense model. A prefix for its KV heads, as PEFT makes it, is cut to the heads of each layer."""
        given = kwargs.get("past_key_values")
        if given is not None and self._is_too_wide(given):
            kwargs["past_key_values"] = self._cut_cache(given)
        return super().forward(*args, **kwargs)

    def _is_too_wide(self, cache: Any) -> bool:
        keys = (getattr(layer, "keys", None) for layer in getattr(cache, "layers", ()))
        return any(k is not None and k.ndim == 4 and k.shape[1] > n for k, n in zip(keys, self.kv_heads, strict=False))

    def _cut_cache(self, cache: Any) -> DynamicCache:
        cut = DynamicCache(config=self.config)
        for layer_idx, (layer, heads) in enumerate(zip(cache.layers, self.kv_heads, strict=True)):
            if heads:
                cut.update(layer.keys[:, :heads], layer.values[:, :heads], layer_idx)
        return cut


# GenerationMixin stands among the bases, though inherited: with remote code transformers looks for it there,
# and otherwise makes a class of its own, which does not pickle.
class StreampruneLlamaForCausalLM(LlamaForCausalLM, GenerationMixin):
    """`LlamaForCausalLM` around `StreampruneLlamaModel`."""

    config_class = StreampruneLlamaConfig

    def __init__(self, config: StreampruneLlamaConfig) -> None:
        super().__init__(without_layers(config))
        self.config = config
        self.model = StreampruneLlamaModel(config)
        self.post_init()


# The heads of transformers ask AutoModel for the body, which knows none of ours where remote code is trusted.
class StreampruneLlamaForSequenceClassification(GenericForSequenceClassification, LlamaPreTrainedModel):
    """A label for a sequence, from its last token."""

    config_class = StreampruneLlamaConfig

    def __init__(self, config: Any) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = StreampruneLlamaModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


class StreampruneLlamaForTokenClassification(GenericForTokenClassification, LlamaPreTrainedModel):
    """A label for every token."""

    config_class = StreampruneLlamaConfig

    def __init__(self, config: Any) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.num_labels = config.num_labels
        self.model = StreampruneLlamaModel(config)
        rates = [getattr(config, name, None) for name in ("classifier_dropout", "hidden_dropout")]
        self.dropout = nn.Dropout(next((rate for rate in rates if rate is not None), 0.1))
        bias = getattr(config, "token_classification_bias", True)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=bias)
        self.post_init()


class StreampruneLlamaForQuestionAnswering(GenericForQuestionAnswering, LlamaPreTrainedModel):
    """Where an answer begins and ends."""

    config_class = StreampruneLlamaConfig

    def __init__(self, config: Any) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = StreampruneLlamaModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()
