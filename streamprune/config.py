"""The options of a run: one frozen object, validated once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from streamprune import values
from streamprune.errors import UsageError
from streamprune.values import STANDARD_INPUT

Target = Literal["units", "layers", "weights"]
STATE_DTYPES = ("float32", "bfloat16")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")
DEFAULT_RATIOS = {"units": 0.2, "layers": 0.2, "weights": 0.5}
MOST_M = 64  # of N:M; beyond, weights of a row are as good
N_OF_M = re.compile(r"([0-9]{1,3}):([0-9]{1,3})")
CHOICES = {
    "sampling": ("random", "first", "records"),
    "bos": ("auto", "always", "never"),
    "allocation": ("uniform", "global"),
    "normalize": ("zscore", "raw"),
    "compensate_target": ("own", "stream"),
    "reader": ("buffered", "direct"),
    "dtype": COMPUTE_DTYPES,
    "state_dtype": STATE_DTYPES,
}
# What each field may be given as, and becomes; None stays None where that is the default.
TYPES: Mapping[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("model", "calibration"), values.source),
    **dict.fromkeys(("output", "scratch"), values.path),
    "evaluate": values.source_or_off,
    **dict.fromkeys(("method", "granularity", "field"), values.text),
    **dict.fromkeys(("allocation", "normalize", "emit", "compensate_target"), values.text),
    **dict.fromkeys(("sampling", "bos", "reader"), values.text),
    "settings": values.settings,
    "layers": values.layer_range,
    **dict.fromkeys(("ratio", "attention_ratio", "mlp_ratio", "min_keep", "compensate_ridge"), values.number),
    **dict.fromkeys(("round_to", "compensate_tokens", "samples", "seq_len", "seed"), values.whole_number),
    **dict.fromkeys(("micro_batch", "read_threads"), values.whole_number),
    **dict.fromkeys(("max_shard_size", "gpu_memory", "host_memory"), values.size),
    **dict.fromkeys(("dtype", "state_dtype"), values.dtype),
    "device": values.device,
    **dict.fromkeys(("contiguous", "stock", "compress", "compensate"), values.switch),
    **dict.fromkeys(("resume", "overwrite", "trust_remote_code"), values.switch),
}
# Options that mean something for some of what can be removed only.
ONLY_FOR: Mapping[str, tuple[Target, ...]] = {
    "attention_ratio": ("units",),
    "mlp_ratio": ("units",),
    "allocation": ("units",),
    "normalize": ("units",),
    "min_keep": ("units",),
    "round_to": ("units",),
    "stock": ("units", "layers"),
    "emit": ("units",),
    "contiguous": ("layers",),
    "compress": ("weights",),
    "compensate": ("units", "layers"),
}


@dataclass(frozen=True)
class PruneConfig:
    """Everything that decides a pruned checkpoint. The same names as the command line's options.

    Attributes:
        model: directory or hub id. output: directory to make.
        method: a row of `streamprune methods`. settings: its own numbers (`--set`).
        granularity: what goes: "units" (KV groups and channels), whole "layers", single "weights" of each row, or all
            but N of every M weights as "N:M".
        ratio: fraction of the prunable parameters of the prunable layers to remove, in [0, 1); by default 0.2, of
            weights 0.5. N:M has its own.
        attention_ratio, mlp_ratio: set attention and MLP apart.
        layers: prunable layers [A, B); by default [4, L − 2); with `stock` and for weights all.
        allocation: units per layer: "uniform", or "global" by comparing all layers; None for the method's own.
        normalize: what "global" compares: the scores' "zscore" in each layer and kind, or "raw" ones per parameter.
        min_keep: fraction of each kind of unit that "global" leaves in every layer, one unit at least.
        contiguous: remove one run of layers, that with the lowest sum of scores.
        round_to: kept MLP widths are multiples of this.
        stock: one width for all layers, loadable by the stock classes.
        emit: "mistral" writes a bias-free Llama as model_type mistral, which takes any head count.
        compress: write 2:4 weights in the sparse-24-bitmask format of compressed-tensors.
        compensate: re-fit o and down to their pruned inputs by least squares, on `compensate_tokens` tokens of the
            calibration text, with `compensate_ridge` times the mean of the Gram matrix's diagonal on its diagonal (None
            for 0.001 with the target "own", else 0.1, or inputs per token where that is more);
            `compensate_target`: the layer's "own" output before pruning, or what brings the residual "stream" nearest
            to the dense model's; None for the latter where the family allows it.
        calibration: file or directory of texts, "-" for standard input, hub data set "name[/configuration][:split]", or
            None for the embedded text.
        field: of the text, or of the messages of a conversation, in JSON records and tables.
        samples, seq_len: calibration sequences and their length in tokens; None for what the method's paper takes
            where a calibration text is given, and for 10 x 128 of the embedded one.
        sampling: "random" seeded windows of the text, "first" for consecutive ones, or "records" for the starts of
            seeded records.
        bos: whether every sequence begins with BOS: "auto" where the tokenizer puts one before a text, "always",
            "never".
        micro_batch: sequences computed at once; None for about 2048 tokens.
        dtype: compute dtype; None for float32 on a CPU and the checkpoint's own on a GPU.
        evaluate: text for perplexity before and after, as `calibration`; None for the embedded held-out text, False for
            none.
        max_shard_size: bytes of an output shard.
        gpu_memory, host_memory: bytes that the run may hold on the GPU and in its process; None for what is free.
            What a budget leaves over keeps layers, so that they are read less often.
        scratch: directory for hidden states, and what a method keeps between sweeps, that fit in neither.
        state_dtype: of what a method keeps between sweeps: "float32", or "bfloat16" in half the bytes.
        resume: keep a journal beside the output, and go on from the one that an earlier run left there.
        reader: "buffered", with layers around the page cache that it cannot keep, or "direct", all of them.
        read_threads: 2 to 8; by default 2, and 4 beside a GPU.

    Values that are as good are taken too: paths as strings, sizes as "20GiB", layers as "4:28", numbers as text or
    numpy's, torch's dtypes and devices.

    Raises:
        UsageError: a value of another type, or out of range.
    """

    model: str
    output: Path
    method: str = "moreau-gs"
    settings: Mapping[str, Any] = field(default_factory=dict)
    granularity: str = "units"
    ratio: float | None = None
    attention_ratio: float | None = None
    mlp_ratio: float | None = None
    layers: tuple[int, int] | None = None
    allocation: Literal["uniform", "global"] | None = None
    normalize: Literal["zscore", "raw"] = "zscore"
    min_keep: float = 0.1
    contiguous: bool = False
    round_to: int = 1
    stock: bool = False
    emit: Literal["mistral"] | None = None
    compress: bool = False
    compensate: bool = False
    compensate_tokens: int = 65536
    compensate_ridge: float | None = None
    compensate_target: Literal["own", "stream"] | None = None
    calibration: str | None = None
    field: str = "text"
    samples: int | None = None
    seq_len: int | None = None
    sampling: Literal["random", "first", "records"] = "random"
    bos: Literal["auto", "always", "never"] = "auto"
    seed: int = 0
    micro_batch: int | None = None
    dtype: str | None = None
    device: str | None = None
    evaluate: str | Literal[False] | None = None
    max_shard_size: int = 5_000_000_000
    gpu_memory: int | None = None
    host_memory: int | None = None
    scratch: Path | None = None
    state_dtype: str = "float32"
    resume: bool = False
    reader: Literal["buffered", "direct"] = "buffered"
    read_threads: int | None = None
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            given = getattr(self, each.name)
            if given is not None or each.default is not None:
                object.__setattr__(self, each.name, TYPES[each.name](_flag(each.name), given))
        self._check_choices()
        self._check_numbers()
        self._check_combinations()
        if self.ratio is None:
            n_of_m = self.n_of_m
            ratio = 1 - n_of_m[0] / n_of_m[1] if n_of_m else DEFAULT_RATIOS[self.granularity]
            object.__setattr__(self, "ratio", ratio)

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """(N, M) where N of every M weights stay."""
        match = N_OF_M.fullmatch(self.granularity)
        return (int(match[1]), int(match[2])) if match else None

    @property
    def target(self) -> Target:
        """What is removed, without the pattern."""
        targets: dict[str, Target] = {"units": "units", "layers": "layers"}
        return targets.get(self.granularity, "weights")

    def _check_choices(self) -> None:
        if self.granularity not in DEFAULT_RATIOS:
            n_of_m = self.n_of_m
            if n_of_m is None or not 0 < n_of_m[0] < n_of_m[1] <= MOST_M:
                raise UsageError(
                    f"--granularity {self.granularity}: choose units, layers, weights, or N:M with N below M, "
                    f"M at most {MOST_M} (2:4)"
                )
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise UsageError(f"{_flag(name)} {value}: choose {' or '.join(choices)}")
        if self.emit not in (None, "mistral"):
            raise UsageError(f"--emit {self.emit}: only mistral can be written")

    def _check_numbers(self) -> None:
        for name in ("ratio", "attention_ratio", "mlp_ratio", "min_keep"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"{_flag(name)} {value}: must be at least 0 and below 1")
        for name in (
            "samples",
            "round_to",
            "micro_batch",
            "max_shard_size",
            "compensate_tokens",
            "gpu_memory",
            "host_memory",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{_flag(name)} {value}: must be at least 1")
        if self.compensate_ridge is not None and not 0 <= self.compensate_ridge < math.inf:
            raise UsageError(f"--compensate-ridge {self.compensate_ridge}: must be at least 0 and finite")
        if self.read_threads is not None and not 2 <= self.read_threads <= 8:
            raise UsageError(f"--read-threads {self.read_threads}: must be 2 to 8")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}: must be at least 0 and below 2^63")
        if self.seq_len is not None and self.seq_len < 2:
            raise UsageError(f"--seq-len {self.seq_len}: must be at least 2, one token predicts the next")

    def _check_combinations(self) -> None:
        if self.calibration in STANDARD_INPUT and self.evaluate in STANDARD_INPUT:
            raise UsageError("--calibration - and --evaluate -: standard input can be read once; give a file for one")
        if self.emit is not None and not self.stock:
            raise UsageError(f"--emit {self.emit} writes one width for all layers: pass --stock with it")
        if self.n_of_m is not None and self.ratio not in (None, 1 - self.n_of_m[0] / self.n_of_m[1]):
            raise UsageError(f"--ratio does not go with --granularity {self.granularity}, which sets it; leave it out")
        for name, targets in ONLY_FOR.items():
            default = type(self).__dataclass_fields__[name].default
            if getattr(self, name) != default and self.target not in targets:
                raise UsageError(
                    f"{_flag(name)} does not go with --granularity {self.granularity}, only with "
                    f"{' and '.join(targets)}; leave it out"
                )
        for name in ("compensate_tokens", "compensate_ridge", "compensate_target"):
            if not self.compensate and getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise UsageError(f"{_flag(name)} means something with --compensate only; add that, or leave it out")
        if self.compensate and self.target == "layers" and self.compensate_target == "own":
            raise UsageError(
                "--compensate-target own: layers that go leave no output of their own; leave it out with layers"
            )
        if self.compensate and self.settings.get("bias") == "yes":
            raise UsageError(
                "--set bias=yes: with --compensate the fit takes the place of biases; leave one of them out"
            )
        if self.compress and self.n_of_m != (2, 4):
            raise UsageError("--compress stores weights of --granularity 2:4 only; leave it out")
        if self.stock and self.allocation == "global":
            raise UsageError("--allocation global gives every layer its own width: leave --stock out")
        if self.allocation == "global" and (self.attention_ratio is not None or self.mlp_ratio is not None):
            raise UsageError(
                "--allocation global has one budget for all kinds of unit: leave --attention-ratio and --mlp-ratio out"
            )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
