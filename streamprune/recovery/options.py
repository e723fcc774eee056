"""Options of a recovery: one frozen object, checked once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from streamprune import values
from streamprune.config import PruneConfig
from streamprune.errors import UsageError
from streamprune.schema import Option, default_of, flag_of, option, options_of, refuse_idle, taken

_FILES, _LORA, _TRAINING, _TEXTS = "Model and output", "LoRA", "Training", "Texts"
# Rank and alpha of the papers: LLM-Pruner's recovery (2305.11627), which MoreauPruner's is too, and that of 2406.10576.
LIKE: Mapping[str, tuple[int, float]] = {"llm-pruner": (8, 16.0), "bernoulli": (16, 10.0)}

# Options of other groups that mean something where a model is trained only.
TRAINED = (
    "data",
    "field",
    "cutoff",
    "validation",
    "adapter",
    "resume",
    "seed",
    "micro_batch",
    "host_memory",
    "scratch",
)
CUTOFF = 256  # tokens of a sequence in LLM-Pruner's recovery


def _as_of_a_run(name: str, **changed: Any) -> Any:
    """Make a field of the same option as `PruneConfig` has, but for what is `changed`."""
    (said,) = (each for each in fields(PruneConfig) if each.name == name)
    return field(default=default_of(said), metadata={"option": replace(options_of(PruneConfig)[name], **changed)})


@dataclass(frozen=True)
class RecoverConfig:
    """Options that decide a recovered checkpoint, by the names of the command line's.

    `rank` and `alpha` are those of the paper `like`, where they are not given.

    Raises:
        UsageError: a value of another type or out of range, or values that do not go together.
    """

    model: str = field(metadata={"option": Option(values.source, "Model directory or hub id.", _FILES, resolved=True)})
    output: Path = field(metadata={"option": Option(values.path, "Directory to make.", _FILES, changes_bytes=False)})
    data: str | None = option(
        None, values.source, "FILE, directory, - or hub data set: instructions, conversations or text.", _TEXTS
    )
    field: str | None = option(
        None,
        values.text,
        "Field of the text or of messages, in records and tables.",
        _TEXTS,
        shown="instruction and output, messages, or text, as there are",
    )
    cutoff: int | None = option(
        None,
        values.whole_number,
        "Tokens of a sequence, at most.",
        _TEXTS,
        shown="256, or the model's positions",
        minimum=2,
    )
    validation: int | None = option(
        None,
        values.whole_number,
        "Sequences that are held out, for the loss before and after.",
        _TEXTS,
        shown="a twentieth, at most 2000",
        minimum=0,
    )
    like: Literal["llm-pruner", "bernoulli"] = option(
        "llm-pruner", values.text, "Rank and alpha as in this paper: 8 and 16, or 16 and 10.", _LORA, choices=(*LIKE,)
    )
    rank: int | None = option(None, values.whole_number, "Rank of the adapters.", _LORA, shown="--like's", minimum=1)
    alpha: float | None = option(
        None, values.number, "They are scaled by alpha over rank.", _LORA, shown="--like's", minimum=0, below=math.inf
    )
    dropout: float = option(0.05, values.number, "Part of their inputs that is dropped.", _LORA, minimum=0, below=1)
    init_adapter: Path | None = option(None, values.path, "PEFT adapter directory to begin with.", _LORA)  # noqa: RUF009
    adapter: bool = option(False, values.switch, "Keep the adapter as PEFT has it; do not merge it.", _FILES)
    merge: Path | None = option(None, values.path, "PEFT adapter directory to merge, without training.", _FILES)  # noqa: RUF009
    learning_rate: float = option(
        1e-4, values.number, "Learning rate after the warmup; it then falls to 0.", _TRAINING, minimum=0, below=1e38
    )
    batch: int = option(64, values.whole_number, "Sequences of a step.", _TRAINING, minimum=1)
    epochs: float = option(2.0, values.number, "Times that the data are gone through.", _TRAINING, minimum=0, below=1e6)
    steps: int | None = option(
        None, values.whole_number, "Steps, whatever --epochs says.", _TRAINING, shown="those of --epochs", minimum=1
    )
    warmup: int = option(
        100,
        values.whole_number,
        "Steps in which the learning rate rises, of all steps a tenth at the most.",
        _TRAINING,
        minimum=0,
    )
    streamed: bool = option(
        False, values.switch, "Train layer by layer, for models beyond memory: a pass there and back a step.", _TRAINING
    )
    distill: str | None = option(
        None, values.source, "Model directory or hub id of a teacher: learn its logits too.", _TRAINING, resolved=True
    )
    top_k: int = option(
        64, values.whole_number, "Logits of the teacher that are kept of a token.", _TRAINING, minimum=1
    )
    seed: int = _as_of_a_run("seed", help="Seed of adapters, dropout and the order of sequences.")
    bos: str = _as_of_a_run("bos")
    micro_batch: int | None = _as_of_a_run("micro_batch", more="")
    dtype: str = _as_of_a_run("dtype")
    device: str | None = _as_of_a_run("device")
    evaluate: str | Literal[False] | None = _as_of_a_run("evaluate")
    max_shard_size: int = _as_of_a_run("max_shard_size")
    gpu_memory: int | None = _as_of_a_run("gpu_memory")
    host_memory: int | None = _as_of_a_run("host_memory")
    scratch: Path | None = _as_of_a_run(  # noqa: RUF009
        "scratch", help="Directory for the teacher's logits and spilled hidden states.", more=""
    )
    resume: bool = _as_of_a_run("resume")
    overwrite: bool = _as_of_a_run("overwrite")
    trust_remote_code: bool = _as_of_a_run("trust_remote_code")

    def __post_init__(self) -> None:
        # The object is frozen for everybody else; values are converted before anything is compared with them.
        for each in fields(self):
            object.__setattr__(self, each.name, taken(each, getattr(self, each.name)))
        if self.merge is not None:
            self._check_merging()
            return
        refuse_idle(self, "", "")
        self._check_training()
        if self.init_adapter is not None:  # which has its own
            return
        rank, alpha = LIKE[self.like]
        object.__setattr__(self, "rank", self.rank or rank)
        object.__setattr__(self, "alpha", alpha if self.alpha is None else self.alpha)

    def _check_merging(self) -> None:
        """Refuse what a merge without training has no use for."""
        for each in fields(self):
            said = each.metadata["option"]
            trains = said.group in (_TRAINING, _LORA) or each.name in TRAINED
            if trains and getattr(self, each.name) != default_of(each):
                raise UsageError(f"--merge trains nothing: leave {flag_of(each.name)} out")

    def _check_training(self) -> None:
        if self.data is None:
            raise UsageError("--data is missing: give instructions, conversations or a text (or --merge an adapter)")
        if not self.epochs and self.steps is None:
            raise UsageError("--epochs 0: nothing would be learnt; give more, or --merge an adapter")
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise UsageError(f"--batch {self.batch} is no multiple of --micro-batch {self.micro_batch}; choose another")
        if self.init_adapter is not None and (self.rank or self.alpha is not None or self.like != "llm-pruner"):
            raise UsageError("--init-adapter has a rank and alpha of its own; leave --rank, --alpha and --like out")
        if self.scratch is not None and not self.streamed and self.distill is None:
            raise UsageError("--scratch is of --streamed and --distill; add one of them, or leave it out")
        if self.top_k != 64 and self.distill is None:
            raise UsageError("--top-k means something with --distill only; add that, or leave it out")

    def tokens(self, positions: int) -> int:
        """Return the tokens of a sequence at the most, of a model with so many positions.

        Raises:
            UsageError: more were asked for than it has.
        """
        if self.cutoff is not None and self.cutoff > positions:
            raise UsageError(f"--cutoff {self.cutoff}: the model takes at most {positions} positions; lower it")
        return self.cutoff or min(CUTOFF, positions)

    def parts(self, default: int) -> int:
        """Return the sequences computed at once: as given, else the largest divisor of the batch up to `default`."""
        if self.micro_batch is not None:
            return self.micro_batch
        return next(size for size in range(min(default, self.batch), 0, -1) if self.batch % size == 0)
