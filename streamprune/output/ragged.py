"""Checkpoints whose layers differ in width: the modelling file that goes with them; its classes registered.

transformers has the config schema (`per_layer_config`) but no Llama-like model that reads it. The file
emitted beside the weights is `_ragged_template.py`, the one for `llama`, with another family's names put in.
`register` runs those very texts as modules: one source serves a checkpoint read with `trust_remote_code=True`
and one read after `import streamprune`.
"""

from __future__ import annotations

import importlib.abc
import importlib.resources
import importlib.util
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from streamprune.errors import UsageError

TASKS = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")


@dataclass(frozen=True)
class RaggedFamily:
    """One row of the table.

    Attributes:
        model_type: of the dense model.
        module: package of the family in `transformers.models`.
        prefix: of `<prefix>ForCausalLM`, `<prefix>DecoderLayer` and `<prefix>PreTrainedModel`.
        text_prefix: of `<text_prefix>Config` and `<text_prefix>Model`.
        attention_norms: norms of the decoder layer that only the attention block uses.
        mlp_norms: norms of the decoder layer that only the MLP uses.
    """

    model_type: str
    module: str
    prefix: str
    text_prefix: str
    attention_norms: tuple[str, ...] = ("input_layernorm",)
    mlp_norms: tuple[str, ...] = ("post_attention_layernorm",)

    @property
    def modeling_module(self) -> str:
        """Name of the emitted module."""
        return f"modeling_streamprune_{self.model_type}"

    @property
    def auto_map(self) -> dict[str, str]:
        """auto class to class name, without the module."""
        return {
            "AutoConfig": f"Streamprune{self.text_prefix}Config",
            "AutoModel": f"Streamprune{self.text_prefix}Model",
            **{f"AutoModelFor{task}": f"Streamprune{self.prefix}For{task}" for task in TASKS},
        }

    @property
    def names(self) -> tuple[str, ...]:
        """What the modelling file says of this family only, in an order that all families keep."""
        return (
            f"streamprune_{self.model_type}",
            f"`{self.model_type}`",
            f"transformers.models.{self.module}.configuration_{self.module}",
            f"transformers.models.{self.module}.modeling_{self.module}",
            f"{self.text_prefix}Config",
            f"{self.text_prefix}Model",
            *(f"{self.prefix}For{task}" for task in TASKS),
            f"{self.prefix}DecoderLayer",
            f"{self.prefix}PreTrainedModel",
            f"ATTENTION_NORMS: tuple[str, ...] = {_literal(self.attention_norms)}",
            f"MLP_NORMS: tuple[str, ...] = {_literal(self.mlp_norms)}",
        )


def _literal(names: tuple[str, ...]) -> str:
    """A tuple as the formatter writes it, with double quotes."""
    return repr(names).replace("'", '"')


_SANDWICH_NORMS = (
    ("input_layernorm", "post_attention_layernorm"),
    ("pre_feedforward_layernorm", "post_feedforward_layernorm"),
)
_POST_NORMS = (("post_attention_layernorm",), ("post_feedforward_layernorm",))

RAGGED_FAMILIES: Mapping[str, RaggedFamily] = {
    family.model_type: family
    for family in (
        RaggedFamily("llama", "llama", "Llama", "Llama"),
        RaggedFamily("mistral", "mistral", "Mistral", "Mistral"),
        RaggedFamily("qwen2", "qwen2", "Qwen2", "Qwen2"),
        RaggedFamily("qwen3", "qwen3", "Qwen3", "Qwen3"),
        RaggedFamily("gemma2", "gemma2", "Gemma2", "Gemma2", *_SANDWICH_NORMS),
        RaggedFamily("gemma3_text", "gemma3", "Gemma3", "Gemma3Text", *_SANDWICH_NORMS),
        RaggedFamily("phi3", "phi3", "Phi3", "Phi3"),
        RaggedFamily("olmo2", "olmo2", "Olmo2", "Olmo2", *_POST_NORMS),
        RaggedFamily("smollm3", "smollm3", "SmolLM3", "SmolLM3"),
        RaggedFamily("granite", "granite", "Granite", "Granite"),
    )
}


def _family(model_type: str) -> RaggedFamily:
    if model_type not in RAGGED_FAMILIES:
        raise UsageError(
            f"{model_type} cannot have layers of different widths; use --stock, or a model of "
            f"{', '.join(RAGGED_FAMILIES)}"
        )
    return RAGGED_FAMILIES[model_type]


def modeling_source(model_type: str) -> str:
    """The text of `modeling_streamprune_<model_type>.py`: one file, with no import of streamprune.

    Raises:
        UsageError: the family has no ragged form.
    """
    template = importlib.resources.files("streamprune.output").joinpath("_ragged_template.py")
    names = dict(zip(RAGGED_FAMILIES["llama"].names, _family(model_type).names, strict=True))
    # In one pass, so that a name put in is not replaced again.
    pattern = "|".join(map(re.escape, names))
    return re.sub(pattern, lambda match: names[match[0]], template.read_text(encoding="utf-8"))


def ragged_config_fields(model_type: str) -> dict[str, Any]:
    """The `model_type`, `architectures` and `auto_map` of config.json, for a dense `model_type`.

    Raises:
        UsageError: the family has no ragged form.
    """
    family = _family(model_type)
    return {
        "model_type": f"streamprune_{model_type}",
        "architectures": [family.auto_map["AutoModelForCausalLM"]],
        "auto_map": {auto: f"{family.modeling_module}.{name}" for auto, name in family.auto_map.items()},
    }


class _ModelingLoader(importlib.abc.ExecutionLoader):
    """Loads a modelling file that is on no disk; tracebacks and `inspect.getsource` show it as if it were."""

    def __init__(self, model_type: str) -> None:
        self.model_type = model_type

    def get_filename(self, fullname: str) -> str:
        return str(Path(__file__).with_name(f"{RAGGED_FAMILIES[self.model_type].modeling_module}.py"))

    def get_source(self, fullname: str) -> str:
        return modeling_source(self.model_type)


def _load_modeling(model_type: str) -> ModuleType:
    """The modelling file of `model_type` as the module `streamprune.modeling_streamprune_<model_type>`."""
    name = f"streamprune.{RAGGED_FAMILIES[model_type].modeling_module}"
    if name not in sys.modules:
        loader = _ModelingLoader(model_type)
        spec = importlib.util.spec_from_loader(name, loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        # Under its name, as pickle and transformers' own look at a class's source find modules.
        sys.modules[name] = module
    return sys.modules[name]


def register() -> None:
    """Makes `AutoConfig`, `AutoModel` and `AutoModelFor…` know the ragged form of every family.

    Safe to call again. Imports torch and transformers.
    """
    import transformers

    for family in RAGGED_FAMILIES.values():
        module = _load_modeling(family.model_type)
        config_class = getattr(module, family.auto_map["AutoConfig"])
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto in family.auto_map.keys() - {"AutoConfig"}:
            model_class = getattr(module, family.auto_map[auto])
            getattr(transformers, auto).register(config_class, model_class, exist_ok=True)
