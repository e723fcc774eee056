"""Low-rank adapters (LoRA, 2106.09685): W + s B A beside each linear layer of the decoder, with PEFT's names and files.

B starts at zero and A as in PEFT, so an adapter begins as the model itself. Experts and their routers have none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamprune.errors import CheckpointError, UsageError
from streamprune.kernels import noise_seed
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import module_of
from streamprune.storage.checkpoint import check_finite, read_json

ADAPTER_CONFIG, ADAPTER_FILE = "adapter_config.json", "adapter_model.safetensors"
MODULE_PREFIX = "base_model.model."  # of a module's name in PEFT's files
MatrixKey = tuple[int, str]  # layer, and the name of its matrix inside it
# What PEFT can do beside plain LoRA, by the field of its config, and the value that leaves it out.
PLAIN: Mapping[str, Any] = {
    **dict.fromkeys(("use_dora", "use_rslora", "lora_bias", "use_qalora"), False),
    **dict.fromkeys(("modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens")),
    **dict.fromkeys(("kasa_config", "use_bdlora", "layer_replication", "arrow_config", "monteclora_config")),
    **{"bias": "none", "alpha_pattern": {}},
}
KEPT_BASE = ("gaussian", "eva", "orthogonal")  # of PEFT's ways to begin, by name, those that leave the weights alone


@dataclass(frozen=True)
class Adapter:
    """Adapter of a model, on the host.

    Attributes:
        alpha: the scale s is alpha over the rank.
        pairs: A [r, d_in] and B [d_out, r] of each matrix, in the order of the layers; float32, in float64 runs that.
    """

    alpha: float
    pairs: Mapping[MatrixKey, tuple[Tensor, Tensor]]

    def scale(self, key: MatrixKey) -> float:
        """Return s of a matrix."""
        return self.alpha / len(self.pairs[key][0])

    @property
    def parameters(self) -> list[Tensor]:
        """A and B of each matrix, in order."""
        return [each for pair in self.pairs.values() for each in pair]

    def delta(self, key: MatrixKey, *, transposed: bool, device: torch.device) -> Tensor:
        """Make s B A of a matrix, [d_out, d_in] or transposed, as PEFT's merge makes it."""
        a, b = (each.detach().to(device) for each in self.pairs[key])
        product = b @ a
        return (product.T if transposed else product) * self.scale(key)


def matrices_of(skeleton: Skeleton) -> dict[MatrixKey, tuple[int, int]]:
    """List the matrices that get adapters, with d_out and d_in."""
    found = {}
    for layer in range(len(skeleton.layers)):
        for name, transposed in skeleton.matrices(layer).items():
            rows, columns = skeleton.shapes(layer)[name]
            found[layer, name] = (columns, rows) if transposed else (rows, columns)
    return found


def new_adapter(skeleton: Skeleton, rank: int, alpha: float, seed: int) -> Adapter:
    """Make an adapter that changes nothing yet: B of zeros, A uniform within ±1/√d_in as PEFT draws it."""
    pairs, dtype = {}, _dtype_of(skeleton)
    for (layer, name), (d_out, d_in) in matrices_of(skeleton).items():
        generator = torch.Generator().manual_seed(noise_seed(seed, layer, name))
        # kaiming_uniform_ with a = √5 is this bound.
        a = (2 * torch.rand(rank, d_in, generator=generator, dtype=dtype) - 1) / math.sqrt(d_in)
        pairs[layer, name] = a, torch.zeros(d_out, rank, dtype=dtype)
    return Adapter(alpha, pairs)


def _dtype_of(skeleton: Skeleton) -> torch.dtype:
    """Return the dtype of adapters: as PEFT has it, float32 beside weights in half precision too."""
    return torch.float64 if skeleton.dtype == torch.float64 else torch.float32


def peft_name(skeleton: Skeleton, key: MatrixKey) -> str:
    """Name a matrix's module as PEFT's files do, without what follows for A and B."""
    layer, name = key
    return f"{MODULE_PREFIX}{skeleton.family.layers}.{layer}.{module_of(name)}"


def peft_tensors(skeleton: Skeleton, adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors of an adapter by PEFT's names."""
    return {
        f"{peft_name(skeleton, key)}.lora_{letter}.weight": tensor.detach().contiguous()
        for key, pair in adapter.pairs.items()
        for letter, tensor in zip("AB", pair, strict=True)
    }


def peft_config(skeleton: Skeleton, adapter: Adapter, base: str | None, dropout: float = 0.0) -> Any:
    """Make PEFT's config of an adapter.

    Args:
        base: name or path of the model that it belongs to; None for one that is loaded already.
    """
    from peft import LoraConfig

    (rank,) = {len(a) for a, _ in adapter.pairs.values()}
    alpha: Any = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha  # PEFT takes fractions too
    modules = sorted({module_of(name) for _, name in adapter.pairs})
    return LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=modules,
        fan_in_fan_out=any(any(skeleton.matrices(layer).values()) for layer in range(len(skeleton.layers))),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )


def write_adapter(directory: Path, skeleton: Skeleton, adapter: Adapter, base: str, dropout: float) -> None:
    """Write an adapter as `PeftModel.from_pretrained` reads it."""
    save_file(peft_tensors(skeleton, adapter), directory / ADAPTER_FILE, metadata={"format": "pt"})
    peft_config(skeleton, adapter, base, dropout).save_pretrained(directory)


def read_adapter(directory: Path, skeleton: Skeleton) -> Adapter:
    """Read an adapter that PEFT or `write_adapter` has written, for the model of a skeleton.

    Raises:
        CheckpointError: no adapter, or a damaged one.
        UsageError: another kind than plain LoRA, or one of another model: names layer, wanted and given shapes.
    """
    if not (directory / ADAPTER_CONFIG).is_file():
        raise CheckpointError(f"{directory} has no {ADAPTER_CONFIG}; give the directory of a PEFT adapter")
    config = read_json(directory / ADAPTER_CONFIG)
    _refuse_other_kinds(directory, config)
    tensors = _stored(directory)
    ranks, pairs, dtype = set[int](), {}, _dtype_of(skeleton)
    for key, (d_out, d_in) in matrices_of(skeleton).items():
        name = peft_name(skeleton, key)
        pair = tuple(tensors.pop(f"{name}.lora_{letter}.weight", None) for letter in "AB")
        a, b = pair
        if a is None or b is None:
            raise UsageError(
                f"{directory} has none for layer {key[0]}, {module_of(key[1])}, and only adapters of all linear layers "
                'are taken; use target_modules="all-linear"'
            )
        rank = len(a)
        if (tuple(b.shape), tuple(a.shape)) != ((d_out, rank), (rank, d_in)):
            raise UsageError(
                f"{directory} is of other widths: layer {key[0]}, {module_of(key[1])} wants B {[d_out, rank]} and A "
                f"{[rank, d_in]}, it has {list(b.shape)} and {list(a.shape)}; give the checkpoint it was trained on"
            )
        for each in (a, b):
            check_finite(directory, name, each)
        ranks.add(rank)
        pairs[key] = a.to(dtype), b.to(dtype)
    if tensors:
        raise UsageError(
            f"{directory} adapts {next(iter(tensors)).removeprefix(MODULE_PREFIX)}, which is no linear layer of the "
            f"decoder of {skeleton.checkpoint.path}; give the checkpoint that it was trained on"
        )
    if len(ranks) > 1:
        raise UsageError(f"{directory} has the ranks {sorted(ranks)}; use one rank for all layers")
    return Adapter(float(config["lora_alpha"]), pairs)


def _stored(directory: Path) -> dict[str, Tensor]:
    try:
        return load_file(directory / ADAPTER_FILE)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{directory} has no {ADAPTER_FILE}; save the adapter with save_pretrained(...), which writes safetensors"
        ) from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{directory / ADAPTER_FILE} cannot be read ({error}); download it again") from error


def _refuse_other_kinds(directory: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UsageError(f"{directory} is a {kind or 'nameless'} adapter; use one of LoRA")
    alpha, begun = config.get("lora_alpha"), config.get("init_lora_weights")
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise UsageError(f"{directory} has lora_alpha {json.dumps(alpha)}, which is no number; save the adapter again")
    if isinstance(begun, str) and begun not in KEPT_BASE:
        raise UsageError(
            f"{directory} has init_lora_weights {json.dumps(begun)}, which changes the weights of the model too; save "
            "the adapter with path_initial_model_for_weight_conversion"
        )
    for name, plain in PLAIN.items():
        value = config.get(name, plain)
        if (value or None) != (plain or None):
            raise UsageError(
                f"{directory} has {name} {json.dumps(value)}, which is no plain LoRA; use an adapter without it"
            )
