"""`streamprune plan` for models that nobody has to have: checkpoints of real headers and no contents.

    python bench/plans.py [--policy] [-- OPTIONS OF THE PLAN]

Writes config.json and sparse shards (headers, and files of the right length without blocks on the disk) in the shapes
of Llama-2-13B, Llama-3-70B and Mixtral-8x7B, and prints what the command says of them. The README shows it.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from random_model import save_tokenizer

from streamprune.model.families import FAMILIES
from streamprune.texts.documents import embedded_text

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "dtype": "bfloat16",
    "tie_word_embeddings": False,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama-2-13b": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
    },
    "llama-3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "mixtral-8x7b": {
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
    },
}
PLANS = [
    ("llama-2-13b", "--assume rtx4090 --host-memory 64GiB"),
    ("llama-2-13b", "--assume rtx4090 --host-memory 64GiB --method sparsegpt --granularity 2:4 --calibration c4.txt"),
    ("llama-3-70b", "--assume rtx4090 --host-memory 64GiB --method taylor"),
    ("llama-3-70b", "--assume rtx4090 --host-memory 64GiB --method gblm --calibration c4.txt --scratch /scratch"),
    ("mixtral-8x7b", "--assume rtx4090 --host-memory 64GiB --method taylor --stock"),
    ("mixtral-8x7b", "--assume rtx4090 --host-memory 64GiB --method block-influence --granularity layers"),
]
# 64 updates at the same probabilities: what a pass reads is read 10 times and not 600.
POLICIES = [
    (name, f"--assume rtx4090 --gpu-memory 22GiB --host-memory 60GiB --method bernoulli --set per_pass={each}")
    for name in ("llama-2-13b", "llama-3-70b")
    for each in (1, 8, 64)
] + [
    (name, "--assume rtx4090 --gpu-memory 22GiB --host-memory 60GiB --method bernoulli")
    for name in ("llama-2-7b", "llama-2-13b", "llama-3-70b")
]


def write_headers(path: Path, fields: dict[str, Any]) -> None:
    """A checkpoint of one sparse file a layer, and one for the rest."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(LLAMA | fields))
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    shards: dict[str, dict[str, Any]] = {}
    for name, shape in stored_shapes(fields.get("model_type", "llama"), model).items():
        parts = name.split(".")
        shards.setdefault(f"layer-{parts[2]}" if parts[1] == "layers" else "rest", {})[name] = shape
    weight_map = {}
    for shard, tensors in shards.items():
        header, position = {}, 0
        for name, shape in tensors.items():
            size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
            position += size
            weight_map[name] = f"{shard}.safetensors"
        encoded = json.dumps(header).encode()
        with (path / f"{shard}.safetensors").open("wb") as stream:
            stream.write(struct.pack("<Q", len(encoded)) + encoded)
            stream.truncate(8 + len(encoded) + position)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def stored_shapes(model_type: str, model: Any) -> dict[str, list[int]]:
    """Shapes by name as checkpoints have them: a matrix for each expert."""
    family, shapes = FAMILIES[model_type], {}
    renamed, fused = dict(family.stored_as), {each.parameter: each for each in family.fused}
    for name, parameter in model.named_parameters():
        start, inside = re.fullmatch(r"(model\.layers\.\d+\.)?(.*)", name).groups(default="")
        if inside in fused:
            for stored, place in fused[inside].places(parameter.shape):
                shapes[start + stored] = list(parameter[place].shape)
        else:
            shapes[start + renamed.get(inside, inside)] = list(parameter.shape)
    return shapes


@click.command()
@click.argument("more", nargs=-1)
@click.option("--policy", is_flag=True, help="Instead those of bernoulli, by updates that share a pass.")
def main(more: tuple[str, ...], policy: bool) -> None:
    """Print the plans, with MORE options."""
    with tempfile.TemporaryDirectory() as directory:
        # A plan loads the tokenizer and opens the text, as the run will.
        Path(directory, "c4.txt").write_text(embedded_text("calibration"))
        for name, fields in MODELS.items():
            write_headers(Path(directory) / name, fields)
            save_tokenizer(Path(directory) / name)
        for name, options in POLICIES if policy else PLANS:
            arguments = ["plan", "--model", name, "--no-evaluate", *options.split(), *more]
            print(f"$ streamprune {' '.join(arguments)}", flush=True)
            command = [sys.executable, "-m", "streamprune", *arguments]
            subprocess.run(command, cwd=directory, check=False, stderr=subprocess.STDOUT)
            print(flush=True)


if __name__ == "__main__":
    main()
