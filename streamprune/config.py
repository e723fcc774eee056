"""Options of a run: one frozen object, checked once. Each option is said here, and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from streamprune import values
from streamprune.errors import UsageError
from streamprune.schema import Option, option, refuse_idle, taken
from streamprune.values import AUTO, STANDARD_INPUT

Target = Literal["units", "layers", "weights"]
DEFAULT_RATIOS = {"units": 0.2, "layers": 0.2, "weights": 0.5}
_FILES, _METHOD, _WHAT = "Model and output", "Method", "What goes"
_REPAIR, _TEXTS, _MACHINE = "Repair", "Texts", "Arithmetic and machine"
_RATIO: dict[str, Any] = {"minimum": 0, "below": 1}
_UNITS: dict[str, Any] = {"only_for": ("units",)}
_ON_MACHINE: dict[str, Any] = {"changes_bytes": False}
_REPAIRED: dict[str, Any] = {"only_with": "compensate"}


@dataclass(frozen=True)
class PruneConfig:
    """Options that decide a pruned checkpoint, by the names of the command line's.

    `docs/options.md` says of each what it means, its range and its default; None is what it calls the default in words.
    Values that are as good are taken too: paths as strings, sizes as "20GiB", layers as "4:28", numbers as text or
    numpy's, torch's dtypes and devices.

    A subclass may add fields made by `schema.option`: their checks, the fingerprint of `resume`, the card's recipe, and
    `commands.options` where it is given the class, take them as these.

    Raises:
        UsageError: a value of another type or out of range, or values that do not go together.
    """

    model: str = field(
        metadata={"option": Option(values.source, "Model directory or hub id.", _FILES, resolved=True, card="never")}
    )
    output: Path = field(metadata={"option": Option(values.path, "Directory to make.", _FILES, changes_bytes=False)})
    method: str = option("moreau-gs", values.text, "A row of `streamprune methods`.", _METHOD, card="always")
    settings: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "option": Option(
                values.settings,
                "A number of the method; repeatable.",
                _METHOD,
                more="`streamprune methods` lists them.",
                card="always",
            )
        },
    )
    granularity: str = option(
        "units",
        values.granularity,
        "What goes: units (KV groups and MLP channels), layers, weights of each row, or all but N of M: 2:4, 4:8.",
        _WHAT,
        metavar="WHAT",
        card="always",
    )
    ratio: float | None = option(
        None,
        values.number,
        "Part of the prunable parameters to remove.",
        _WHAT,
        more="They are those of the prunable layers; N:M sets the ratio itself.",
        shown="0.2, of weights 0.5",
        card="always",
        **_RATIO,
    )
    attention_ratio: float | None = option(
        None, values.number, "Part of the KV groups to remove, apart from --ratio.", _WHAT, **_RATIO, **_UNITS
    )
    mlp_ratio: float | None = option(
        None, values.number, "Part of the channels to remove, apart from --ratio.", _WHAT, **_RATIO, **_UNITS
    )
    layers: tuple[int, int] | None = option(
        None,
        values.layer_range,
        "Prunable layers, end-exclusive.",
        _WHAT,
        shown="4:L-2, all of weights and with --stock",
        card="never",  # what it came to is said above the recipe
    )
    allocation: Literal["uniform", "global"] | None = option(
        None,
        values.text,
        "Units per layer: uniform, or global by comparing all layers.",
        _WHAT,
        shown="the method's own",
        choices=("uniform", "global"),
        listed=False,
        **_UNITS,
    )
    normalize: Literal["zscore", "raw"] | None = option(
        None,
        values.text,
        "What global compares: zscore, or raw.",
        _WHAT,
        more="The scores' z-scores in each layer and kind of unit, or the scores themselves, per parameter.",
        shown="zscore",
        choices=("zscore", "raw"),
        listed=False,
        **_UNITS,
    )
    min_keep: float = option(
        0.1,
        values.number,
        "Part of its units that a layer keeps.",
        _WHAT,
        more="It holds for each kind of unit, one at least, where the allocation is global.",
        **_RATIO,
        **_UNITS,
    )
    contiguous: bool = option(
        False,
        values.switch,
        "Remove one run of layers.",
        _WHAT,
        more="It is that with the lowest sum of scores.",
        only_for=("layers",),
    )
    round_to: int = option(
        1, values.whole_number, "Make kept MLP widths multiples of this, such as 64.", _WHAT, minimum=1, **_UNITS
    )
    stock: bool = option(
        False,
        values.switch,
        "One width for all layers: loads without any extra code.",
        _FILES,
        only_for=("units", "layers"),
    )
    emit: Literal["mistral"] | None = option(
        None,
        values.text,
        "Write a bias-free Llama as Mistral (any head count).",
        _FILES,
        more="It goes with --stock.",
        choices=("mistral",),
        **_UNITS,
    )
    compress: bool = option(
        False,
        values.switch,
        "Store 2:4 as sparse-24-bitmask, which only older readers know.",
        _FILES,
        more="It goes with --granularity 2:4; the format is that of compressed-tensors.",
        only_for=("weights",),
    )
    compensate: bool = option(
        False,
        values.switch,
        "Re-fit o and down to what is left of their inputs, by least squares.",
        _REPAIR,
        only_for=("units", "layers"),
    )
    compensate_tokens: int = option(
        65536, values.whole_number, "Calibration tokens, at most.", _REPAIR, minimum=1, **_REPAIRED
    )
    compensate_ridge: float | None = option(
        None,
        values.number,
        "λ over the mean of the Gram matrix's diagonal.",
        _REPAIR,
        more="Of stream it is inputs per token where that is more.",
        shown="0.001 or 0.1, by target own or stream",
        minimum=0,
        below=math.inf,
        **_REPAIRED,
    )
    compensate_target: Literal["own", "stream"] | None = option(
        None,
        values.text,
        "What is fitted: the layer's own output, or the dense model's residual stream.",
        _REPAIR,
        shown="stream where the family allows it",
        choices=("own", "stream"),
        listed=False,
        **_REPAIRED,
    )
    calibration: str | None = option(
        None,
        values.source,
        "FILE, directory, - or hub data set NAME[/CONFIG][:SPLIT].",
        _TEXTS,
        shown="prose in the package",
        card="always",
    )
    field: str = option(
        "text", values.text, "Field of the text, or of the conversation, in records and tables.", _TEXTS
    )
    samples: int | None = option(
        None,
        values.whole_number,
        "Calibration sequences.",
        _TEXTS,
        shown="as in the method's paper, 10 of the prose in the package",
        minimum=1,
        card="always",
    )
    seq_len: int | None = option(
        None,
        values.whole_number,
        "Tokens of a calibration sequence.",
        _TEXTS,
        shown="as in the method's paper, 128 of the prose in the package",
        minimum=2,
        because="one token predicts the next",
        card="always",
    )
    sampling: Literal["random", "first", "records"] = option(
        "random",
        values.text,
        "Seeded windows of the text, consecutive ones from its start, or the starts of seeded records.",
        _TEXTS,
        choices=("random", "first", "records"),
        card="always",
    )
    bos: Literal["auto", "always", "never"] = option(
        "auto",
        values.text,
        "Begin each sequence with BOS: where the tokenizer begins texts with it, always, or never.",
        _TEXTS,
        choices=("auto", "always", "never"),
        card="always",
    )
    seed: int = option(
        0, values.whole_number, "Seed of sampling, noise and random scores.", _TEXTS, minimum=0, card="always"
    )
    micro_batch: int | None = option(
        None,
        values.whole_number,
        "Sequences computed at once.",
        _MACHINE,
        more="Sums differ by it in their last bits.",
        shown="as many as make 2048 tokens",
        minimum=1,
    )
    dtype: str = option(
        AUTO,
        values.dtype,
        "Compute dtype.",
        _MACHINE,
        more="auto is the stored one; on a CPU it is bfloat16 where that is stored and the processor multiplies it "
        "(AVX512-BF16, AMX), else float32.",
        choices=(AUTO, "float32", "bfloat16", "float16", "float64"),
    )
    device: str | None = option(
        None,
        values.device,
        "cpu, cuda or cuda:N.",
        _MACHINE,
        shown="the GPU if there is one",
        resolved=True,
        card="never",
    )
    kernels: Literal["auto", "torch"] = option(
        AUTO,
        values.text,
        "auto: Triton's on a GPU, torch's operations on a CPU; or torch everywhere.",
        _MACHINE,
        more="They sum in another order, and draw other noise.",
        choices=(AUTO, "torch"),
        listed=False,
    )
    evaluate: str | Literal[False] | None = option(
        None,
        values.source_or_off,
        "Text for perplexity before and after, as --calibration.",
        _TEXTS,
        shown="held-out prose in the package",
        changes_bytes=False,
    )
    max_shard_size: int = option(
        5_000_000_000, values.size, "Size of an output file, at most.", _FILES, shown="5GB", minimum=1, card="never"
    )
    gpu_memory: int | None = option(
        None,
        values.size,
        "What the run may hold on the GPU, such as 20GiB.",
        _MACHINE,
        more="What a budget leaves over keeps layers, so that they are read less often.",
        shown="what is free",
        minimum=1,
        **_ON_MACHINE,
    )
    host_memory: int | None = option(
        None, values.size, "What its process may hold.", _MACHINE, shown="what is free", minimum=1, **_ON_MACHINE
    )
    scratch: Path | None = option(  # noqa: RUF009, it makes a field, as `dataclasses.field` does
        None,
        values.path,
        "Directory for what fits in neither.",
        _MACHINE,
        more="These are hidden states, and what a method keeps between sweeps.",
        **_ON_MACHINE,
    )
    state_dtype: str = option(
        AUTO,
        values.dtype,
        "Dtype of what a method keeps between sweeps: float32, or bfloat16 in half the bytes.",
        _MACHINE,
        more="auto is bfloat16 for moreau-gs and gblm on a GPU that computes in half precision, else float32.",
        choices=(AUTO, "float32", "bfloat16"),
        listed=False,
    )
    resume: bool = option(
        False,
        values.switch,
        "Go on where the same command with --resume stopped; or begin one.",
        _FILES,
        more="The journal lies beside the output until that is there.",
        changes_bytes=False,
    )
    reader: Literal["buffered", "direct"] = option(
        "buffered",
        values.text,
        "buffered, or direct around the page cache.",
        _MACHINE,
        more="Buffered reads go around it too, for layers that it cannot keep.",
        choices=("buffered", "direct"),
        listed=False,
        **_ON_MACHINE,
    )
    read_threads: int | None = option(
        None,
        values.whole_number,
        "Threads that read.",
        _MACHINE,
        shown="2, and 4 beside a GPU",
        minimum=2,
        maximum=8,
        **_ON_MACHINE,
    )
    overwrite: bool = option(False, values.switch, "Replace the output directory.", _FILES, changes_bytes=False)
    trust_remote_code: bool = option(
        False, values.switch, "Run code that the model's directory brings.", _FILES, card="never"
    )

    def __post_init__(self) -> None:
        # The object is frozen for everybody else; values are converted before anything is compared with them.
        for each in fields(self):
            object.__setattr__(self, each.name, taken(each, getattr(self, each.name)))
        refuse_idle(self, self.target, f"--granularity {self.granularity}")
        self._check_combinations()
        if self.ratio is None:
            n_of_m = self.n_of_m
            ratio = 1 - n_of_m[0] / n_of_m[1] if n_of_m else DEFAULT_RATIOS[self.granularity]
            object.__setattr__(self, "ratio", ratio)

    @property
    def n_of_m(self) -> tuple[int, int] | None:
        """Return (N, M) where N of every M weights stay, else None."""
        return values.n_of_m(self.granularity)

    @property
    def target(self) -> Target:
        """Kind of thing that is removed: the granularity without a pattern, so "weights" for 2:4 too."""
        targets: dict[str, Target] = {"units": "units", "layers": "layers"}
        return targets.get(self.granularity, "weights")

    def _check_combinations(self) -> None:
        if self.calibration in STANDARD_INPUT and self.evaluate in STANDARD_INPUT:
            raise UsageError("--calibration - and --evaluate -: standard input can be read once; give a file for one")
        if self.emit is not None and not self.stock:
            raise UsageError(f"--emit {self.emit} writes one width for all layers: pass --stock with it")
        if self.n_of_m is not None and self.ratio not in (None, 1 - self.n_of_m[0] / self.n_of_m[1]):
            raise UsageError(f"--ratio does not go with --granularity {self.granularity}, which sets it; leave it out")
        apart = self.attention_ratio is not None and self.mlp_ratio is not None
        if apart and self.ratio not in (None, DEFAULT_RATIOS["units"]):
            raise UsageError("--ratio: --attention-ratio and --mlp-ratio say what goes of both; leave it out")
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


def as_options(**given: Any) -> tuple[Any, ...]:
    """Return values as a `PruneConfig` takes them for its options of these names, in their order.

    Raises:
        UsageError: a value of another type, none of the choices, or out of range.
    """
    options = {each.name: each for each in fields(PruneConfig)}
    return tuple(taken(options[name], value) for name, value in given.items())
