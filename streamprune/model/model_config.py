"""Conversion of config.json to transformers' config and to a model on meta, with errors that name the field.

A field is to blame if the same step succeeds without it. Those that the exception speaks of are tried first.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from streamprune.errors import CheckpointError
from streamprune.logs import quiet

# By transformers' names; a family may have others in config.json.
COUNTS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "ffn_dim", "n_inner", "max_position_embeddings", "num_local_experts", "num_experts_per_tok"),
)
IDENTITY = ("model_type", "architectures")  # without them there is nothing to try
SHOWN_VALUE, SHOWN_REASON = 100, 300  # characters in a message


def load_config(path: Path, fields: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
    """Load transformers' config of a model directory, without a quantization_config.

    Args:
        fields: config.json.

    Raises:
        CheckpointError: what transformers cannot read, or what no model can be built from, by the field.
    """
    file = path / "config.json"
    _check_counts(file, fields)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for a bad config.json
        raise _blame(file, fields, error, "read it", _config_of) from error
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # whether weights are quantised is seen in the weights
    config.return_dict = True  # the skeleton asks outputs by name
    if (
        "sliding_attention" in (getattr(config, "layer_types", None) or ())
        and getattr(config, "sliding_window", 0) is None
    ):
        raise CheckpointError(
            f"{file}: layers of sliding_attention need a sliding_window, which is null; give its width"
        )
    return config


def empty_model(
    config: Any,
    path: Path,
    fields: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    attentions: Callable[[str], bool],
    trust_remote_code: bool = False,
) -> tuple[Any, list[str]]:
    """Build the whole model on meta, in evaluation mode; return it, and lines of what there is to say of it.

    An attention implementation that cannot run here gives way to transformers' own choice: sdpa, or eager where the
    model has no sdpa.

    Args:
        path: the model directory. fields: its config.json.
        dtype: what the model is to compute in. attentions: whether an implementation of that name runs there.

    Raises:
        CheckpointError: what transformers cannot build a model from, by the field.
    """
    asked = config._attn_implementation
    if asked in (None, "eager") or attentions(asked):
        try:
            return _build(config, dtype, trust_remote_code).eval(), []
        except Exception:  # transformers raises many kinds; if it is not the attention, so does what follows
            pass
    config._attn_implementation = None if asked != "eager" else asked
    try:
        model = _build(config, dtype, trust_remote_code).eval()
    except Exception as error:  # as above
        raise _blame(
            path / "config.json", fields, error, "build a model", lambda rest: _build(_config_of(rest), dtype, False)
        ) from error
    used = model.config._attn_implementation
    return model, [f"attention {asked!r} of its config.json cannot run here; {used} computes it"]


def meta_model(config: Any) -> Any:
    """Build the whole model on meta, for counting parameters from a config alone."""
    return _build(config, torch.float32, trust_remote_code=False).eval()


def _build(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    # Buffers are real: those that are not persistent, such as rotary frequencies, are in no checkpoint. To draw weights
    # takes seconds of a model of many layers, though none are there.
    with init_empty_weights(include_buffers=False), no_init_weights():
        # Experts one after another: the grouped product that transformers prefers has no float64, and takes only
        # widths of whole 16 bytes. Other families do not look at it.
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=trust_remote_code, experts_implementation="eager"
        )
    model.tie_weights()  # that is a part of drawing them
    return model


def _check_counts(file: Path, fields: Mapping[str, Any]) -> None:
    """Refuse sizes that make no model, also where transformers builds one: no layers, no heads, too few tokens."""
    names: Mapping[str, str] = CONFIG_MAPPING[str(fields["model_type"])].attribute_map

    def count(name: str) -> int | None:
        value = fields.get(names.get(name, name), fields.get(name))
        return value if isinstance(value, int) else None

    for name in COUNTS:
        value = count(name)
        if value is not None and value < 1:
            raise CheckpointError(f"{file}: {names.get(name, name)} is {value}; download it again, or give at least 1")
    heads, kv_heads = count("num_attention_heads"), count("num_key_value_heads")
    if heads is not None and kv_heads is not None and heads % kv_heads:
        raise CheckpointError(
            f"{file}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}; download it again"
        )
    vocabulary, pad = count("vocab_size"), count("pad_token_id")
    if vocabulary is not None and pad is not None and not -vocabulary <= pad < vocabulary:
        raise CheckpointError(
            f"{file}: pad_token_id {pad} is outside the vocabulary of {vocabulary}; give a token of it, or null"
        )
    experts, chosen = count("num_local_experts"), count("num_experts_per_tok")
    if experts is not None and chosen is not None and chosen > experts:
        raise CheckpointError(
            f"{file}: num_experts_per_tok {chosen} is more than num_local_experts {experts}; download it again"
        )


def _config_of(fields: Mapping[str, Any]) -> Any:
    return CONFIG_MAPPING[str(fields["model_type"])].from_dict(copy.deepcopy(dict(fields)))


@contextmanager
def naming_the_field(path: Path, fields: Mapping[str, Any], step: str) -> Iterator[None]:
    """Turn what transformers throws inside the block into an error that names the field; lack of memory passes.

    Raises:
        CheckpointError: in the place of other exceptions.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # as above
        if "DefaultCPUAllocator" in str(error):
            raise
        raise _blame(path / "config.json", fields, error, step, None) from error


def _blame(
    file: Path,
    fields: Mapping[str, Any],
    error: Exception,
    step: str,
    again: Callable[[Mapping[str, Any]], object] | None,
) -> CheckpointError:
    """Make the error that names the field to blame.

    Args:
        step: what transformers was to do, in words.
        again: does the step with other fields; None where that cannot be tried: then the field that is spoken of.
    """
    what = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    reason = _short(" ".join(what.split()) if " " in what else f"{type(error).__name__}: {what}", SHOWN_REASON)
    suspects = _suspects(fields, what)
    with quiet("transformers", logging.CRITICAL):
        for name, spoken_of in suspects.items():
            rest = {key: value for key, value in fields.items() if key != name}
            if spoken_of if again is None else _succeeds(again, rest):
                value = _short(repr(fields[name]), SHOWN_VALUE)
                return CheckpointError(
                    f"{file}: transformers cannot {step} with {name} {value} ({reason}); give it another value, or "
                    "leave it out"
                )
    return CheckpointError(f"{file}: transformers cannot {step} ({reason}); download it again")


def _suspects(fields: Mapping[str, Any], message: str) -> dict[str, bool]:
    """List all fields but the model's kind, and whether the message is about their name or value; these first."""
    words = set(re.findall(r"\w+", message))

    def about(name: str) -> bool:
        value = fields[name]
        return name in words or str(value) in words or (isinstance(value, dict) and repr(message) in repr(value))

    names = sorted((name for name in fields if name not in IDENTITY), key=about, reverse=True)
    return {name: about(name) for name in names}


def _succeeds(attempt: Callable[[Mapping[str, Any]], object], fields: Mapping[str, Any]) -> bool:
    try:
        attempt(fields)
    except Exception:  # of whichever kind: something else is wrong, or this as well
        return False
    return True


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."
