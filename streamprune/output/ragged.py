"""Checkpoints whose layers differ in width: the modelling file that goes with them; its classes registered.

transformers has the config schema (`per_layer_config`) but no Llama-like model that reads it. The file
emitted beside the weights is `_ragged_template.py`, the one for `llama`, with another family's names put in.
The module `streamprune.modeling_streamprune_llama` is that very text: one source serves a checkpoint read with
`trust_remote_code=True` and one read after `import streamprune`.

Importing such a module takes seconds, of which most goes into torch and transformers. So `announce` imports none: a
stand-in for each family's config waits in the table of transformers, and the first use of it imports the module, which
registers the classes themselves.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.resources
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from streamprune.errors import UsageError

CONFIG_TABLE = "transformers.models.auto.configuration_auto"
VLLM_BACKEND = "vllm.model_executor.models.transformers:TransformersForCausalLM"
TASKS = ("CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering")


@dataclass(frozen=True)
class RaggedFamily:
    """Row of the table of families that have a ragged form.

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
        """Names that the modelling file has of this family only, in an order that all families keep."""
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
    """Loads a modelling file that is on no disk; tracebacks and `inspect.getsource` show it as if it were.

    Its classes are registered when it is loaded, whoever asks for it: also an unpickled model does.
    """

    def __init__(self, family: RaggedFamily) -> None:
        self.family = family

    def get_filename(self, fullname: str) -> str:
        return str(Path(__file__).with_name(f"{self.family.modeling_module}.py"))

    def get_source(self, fullname: str) -> str:
        return modeling_source(self.family.model_type)

    def exec_module(self, module: ModuleType) -> None:
        import transformers

        super().exec_module(module)
        config_class = getattr(module, self.family.auto_map["AutoConfig"])
        transformers.AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        for auto in self.family.auto_map.keys() - {"AutoConfig"}:
            model_class = getattr(module, self.family.auto_map[auto])
            getattr(transformers, auto).register(config_class, model_class, exist_ok=True)


class _ConfigTableLoader(importlib.abc.Loader):
    """Loads transformers' table of configs as `loader` does, and puts the stand-ins into it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        _put_stand_ins(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modelling modules, and stands at the import of transformers' table of configs."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == CONFIG_TABLE:
            others = (finder for finder in sys.meta_path if finder is not self)
            spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
            if spec is not None and spec.loader is not None:
                spec.loader = _ConfigTableLoader(spec.loader)
            return spec
        package, _, name = fullname.rpartition(".")
        families = (family for family in RAGGED_FAMILIES.values() if package == "streamprune")
        found = next((family for family in families if family.modeling_module == name), None)
        return None if found is None else importlib.util.spec_from_loader(fullname, _ModelingLoader(found))


def _import_modeling(family: RaggedFamily) -> ModuleType:
    return importlib.import_module(f"streamprune.{family.modeling_module}")


def _put_stand_ins(table: Any) -> None:
    """Put a stand-in into transformers' `table`, by its public `register`, for each family that is not in it yet."""
    for family in RAGGED_FAMILIES.values():
        if f"streamprune_{family.model_type}" not in table.CONFIG_MAPPING:
            table.AutoConfig.register(f"streamprune_{family.model_type}", _stand_in(family))


@functools.cache
def _stand_in(family: RaggedFamily) -> Any:
    """A config class whose every object is one of the family's own class, which is imported for it."""
    from transformers import PreTrainedConfig

    def make(cls: type, *args: Any, **kwargs: Any) -> Any:
        return getattr(_import_modeling(family), family.auto_map["AutoConfig"])(*args, **kwargs)

    members = {"model_type": f"streamprune_{family.model_type}", "__module__": __name__, "__new__": make}
    return type(family.auto_map["AutoConfig"], (PreTrainedConfig,), members)


def __getattr__(name: str) -> Any:
    """The stand-ins under their names: transformers' table of configs can be pickled, and so must they."""
    for family in RAGGED_FAMILIES.values():
        if name == family.auto_map["AutoConfig"]:
            return _stand_in(family)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def announce() -> None:
    """Makes `AutoConfig`, `AutoModel` and `AutoModelFor…` know the ragged form of every family when they meet it.

    Imports neither torch nor transformers. Safe to call again.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
    if CONFIG_TABLE in sys.modules:
        _put_stand_ins(sys.modules[CONFIG_TABLE])


def register() -> None:
    """Makes them know all of them at once.

    Safe to call again. Imports torch and transformers.
    """
    announce()
    for family in RAGGED_FAMILIES.values():
        _import_modeling(family)


def register_with_vllm() -> None:
    """Makes vLLM serve every family by its Transformers backend, without code from checkpoints.

    vLLM calls it in each of its processes, as a plugin (`vllm.general_plugins`), where both are installed.
    """
    from vllm import ModelRegistry

    register()
    for family in RAGGED_FAMILIES.values():
        ModelRegistry.register_model(family.auto_map["AutoModelForCausalLM"], VLLM_BACKEND)
