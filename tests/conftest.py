"""Tiny random models of every family, built and run by transformers itself, and the fixtures that files share."""

from __future__ import annotations

import mmap
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton's first import: its kernels then run on CPU tensors

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from streamprune.cli import main
from streamprune.kernels import noise_seed, perturb
from streamprune.model.families import FAMILIES
from streamprune.model.skeleton import Skeleton
from streamprune.storage.checkpoint import Checkpoint
from streamprune.storage.reader import DISK_BLOCK
from streamprune.streaming.device import HostDevice
from streamprune.streaming.pager import Pager
from streamprune.streaming.statistics import Statistics
from streamprune.streaming.sweeper import Sweeper

pytest.register_assert_rewrite("cli_runner", "plain_methods")
from cli_runner import REMEDY, SHORT, Outcome, Streamprune, check_refusal, snapshot  # noqa: E402
from killed_runs import killing  # noqa: E402, F401
from plain_methods import FAMILIES_TESTED, LAYERS, SEED, SIZES, unit_slices, unit_totals  # noqa: E402

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


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved float32 Llama of 8 layers with its tokenizer, read-only."""
    path = tmp_path_factory.mktemp("models") / "llama"
    save_tiny(path, "llama", dtype=torch.float32, num_hidden_layers=8)
    return path


# The command line.


@pytest.fixture
def streamprune(capsys: pytest.CaptureFixture[str]) -> Streamprune:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return Outcome(stopped.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A free name in a directory of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "pruned"


@pytest.fixture
def refused(streamprune: Streamprune, tmp_path: Path, output: Path) -> Callable[..., str]:
    """Runs a prune that must be refused, checks all that every refusal promises, and returns the message."""

    def run(model: object, *arguments: object, code: int, names: tuple[str, ...], remedy: str = REMEDY) -> str:
        before = snapshot(tmp_path)
        result = streamprune("--model", model, "--output", output, "--quiet", *SHORT, *arguments)
        assert snapshot(tmp_path) == before, "something was written or removed"
        check_refusal(result, code, names, remedy)
        return result.err

    return run


@pytest.fixture
def earlier(streamprune: Streamprune, model: Path, output: Path) -> Path:
    """An output that an earlier run left, with a file that no run writes."""
    done = streamprune("--model", model, "--output", output, "--method", "random", "--no-evaluate", "--quiet")
    assert done.code == 0
    (output / "notes.txt").write_text("mine")
    return output


# The methods.


class Case:
    """A tiny model: saved for the streamed side, in memory for the whole-model side."""

    def __init__(self, family, path):
        self.family, self.path, self.sizes = family, path, SIZES[family]
        self.model = save_tiny(path, family)
        self.ids = token_ids(n=3, seq=12)
        self.kinds = ("channel",) if family == "gpt2" else ("kv_group", "channel")
        self.layer_path = "transformer.h" if family == "gpt2" else "model.layers"
        self.sweeper = make_sweeper(path)
        self.parameters = dict(self.model.named_parameters())
        self.weights = {
            (layer, name): weight.detach().clone()
            for layer in LAYERS
            for name, weight in self.model.get_submodule(f"{self.layer_path}.{layer}").named_parameters()
            if any(unit_slices(self.sizes, kind, 0, {name}) for kind in self.kinds)
        }

    def statistics(self, seed=SEED):
        return Statistics(self.sweeper, self.ids, LAYERS, seed)

    def gradients(self, weights=None, ids=None):
        """Whole-model gradients of the scored weights, with those weights set to `weights`."""
        parameters = {key: self.parameters[f"{self.layer_path}.{key[0]}.{key[1]}"] for key in self.weights}
        with torch.no_grad():
            for key, weight in (weights or {}).items():
                parameters[key].copy_(weight)
        grads = whole_model_gradients(self.model, self.ids if ids is None else ids)
        with torch.no_grad():
            for key, weight in self.weights.items():
                parameters[key].copy_(weight)
        return {key: grads[f"{self.layer_path}.{key[0]}.{key[1]}"] for key in self.weights}

    def noisy(self, sigma, step, draw, delta=None, seed=SEED):
        """w + δ + noise of every scored weight."""
        moved = {}
        for (layer, name), weight in self.weights.items():
            at = noise_seed(seed, step, draw, layer, name)
            shift = None if delta is None else delta[layer, name]
            moved[layer, name] = perturb(torch.empty_like(weight), weight, shift, sigma, at)
        return moved

    def totals(self, elements, **options):
        return unit_totals(self.sizes, self.kinds, LAYERS, elements, **options)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = {}

    def case(family):
        if family not in made:
            made[family] = Case(family, tmp_path_factory.mktemp(family))
        return made[family]

    return case


@pytest.fixture(params=FAMILIES_TESTED)
def case(request, cases):
    return cases(request.param)


# The kernels.


@pytest.fixture
def uninitialised_memory_is_nan():
    """Whatever torch.empty makes holds NaN, so that a kernel which reads it before writing it shows."""
    # On a GPU some operations have no deterministic form (kthvalue, whose values do not depend on it).
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation")
        yield
    torch.use_deterministic_algorithms(False)
