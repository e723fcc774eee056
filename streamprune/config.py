"""The options of a run: one frozen object, validated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from streamprune.errors import UsageError

DTYPES = ("float32", "bfloat16", "float16", "float64")


@dataclass(frozen=True)
class PruneConfig:
    """Everything that decides a pruned checkpoint. The same names as the command line's options.

    Attributes:
        model: directory or hub id. output: directory to make.
        method: a row of `streamprune methods`. settings: its own numbers (`--set`).
        ratio: fraction of the prunable parameters of the prunable layers to remove, in [0, 1).
        attention_ratio, mlp_ratio: set attention and MLP apart.
        layers: prunable layers [A, B); by default [4, L − 2), with `stock` all.
        round_to: kept MLP widths are multiples of this.
        stock: one width for all layers, loadable by the stock classes.
        emit: "mistral" writes a bias-free Llama as model_type mistral, which takes any head count.
        calibration: file, hub data set "name[:split]", or None for the embedded text.
        field: JSON or parquet column of the text.
        samples, seq_len: calibration sequences and their length in tokens.
        sampling: "random" seeded windows of the tokenised text, or "first" for consecutive ones.
        micro_batch: sequences computed at once; None for about 2048 tokens.
        dtype: compute dtype; None for float32 on a CPU and the checkpoint's own on a GPU.
        evaluate: text file for perplexity before and after, None for the embedded held-out text, False for none.
        max_shard_size: bytes of an output shard.

    Raises:
        UsageError: a value out of range.
    """

    model: str
    output: Path
    method: str = "moreau-gs"
    ratio: float = 0.2
    settings: Mapping[str, Any] = field(default_factory=dict)
    attention_ratio: float | None = None
    mlp_ratio: float | None = None
    layers: tuple[int, int] | None = None
    round_to: int = 1
    stock: bool = False
    emit: Literal["mistral"] | None = None
    calibration: str | None = None
    field: str = "text"
    samples: int = 10
    seq_len: int = 128
    sampling: Literal["random", "first"] = "random"
    seed: int = 0
    micro_batch: int | None = None
    dtype: str | None = None
    device: str | None = None
    evaluate: Path | Literal[False] | None = None
    max_shard_size: int = 5_000_000_000
    overwrite: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "output", Path(self.output))
        if self.evaluate:
            object.__setattr__(self, "evaluate", Path(self.evaluate))
        if self.sampling not in ("random", "first"):
            raise UsageError(f"--sampling {self.sampling}: choose random or first")
        if self.emit not in (None, "mistral"):
            raise UsageError(f"--emit {self.emit}: only mistral can be written")
        for name in ("ratio", "attention_ratio", "mlp_ratio"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 0 and below 1")
        for name in ("samples", "round_to", "micro_batch", "max_shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"--seed {self.seed}: must be at least 0 and below 2^63")
        if self.seq_len < 2:
            raise UsageError(f"--seq-len {self.seq_len}: must be at least 2, one token predicts the next")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype}: choose one of {', '.join(DTYPES)}")
        if self.emit is not None and not self.stock:
            raise UsageError(f"--emit {self.emit} writes one width for all layers: pass --stock with it")
