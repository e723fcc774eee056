"""Options that several commands of the command line share, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from streamprune import values
from streamprune.config import CHOICES, COMPUTE_DTYPES
from streamprune.errors import UsageError


class LayerRange(click.ParamType):
    """A:B, end-exclusive."""

    name = "A:B"

    def convert(self, value: Any, param: Any, ctx: Any) -> tuple[int, int]:
        """Two integers, or a usage error."""
        try:
            return values.layer_range("", value)
        except UsageError:
            self.fail(f"{value!r} is not A:B, such as 4:28", param, ctx)


class ByteSize(click.ParamType):
    """Bytes, or a number with KB, MB, GB, TB or KiB, MiB, GiB, TiB."""

    name = "SIZE"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        """A number of bytes, or a usage error."""
        try:
            return values.size("", value)
        except UsageError:
            self.fail(f"{value!r} is not a size such as 5GB", param, ctx)


def parse_settings(assignments: tuple[str, ...]) -> dict[str, str]:
    """NAME=VALUE pairs of `--set`."""
    settings = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"--set {assignment}: write NAME=VALUE, such as rho=0.2")
        settings[name.strip().replace("-", "_")] = value.strip()
    return settings


PRUNE_OPTIONS = (
    click.option("--model", help="Model directory or hub id."),
    click.option("--output", type=click.Path(path_type=Path), help="Directory to make."),
    click.option("--method", default="moreau-gs", show_default=True, help="A row of `streamprune methods`."),
    click.option("--ratio", type=float, help="Part of the prunable parameters to remove; 0.2, of weights 0.5."),
    click.option(
        "--granularity",
        default="units",
        show_default=True,
        metavar="WHAT",
        help="What goes: units (KV groups and MLP channels), layers, weights of each row, or all but N of M: 2:4, 4:8.",
    ),
    click.option(
        "--set", "assignments", multiple=True, metavar="NAME=VALUE", help="A number of the method; repeatable."
    ),
    click.option("--layers", type=LayerRange(), help="Prunable layers; 4:L-2, all of weights and with --stock."),
    click.option("--attention-ratio", type=float, help="Part of the KV groups to remove, apart from --ratio."),
    click.option("--mlp-ratio", type=float, help="Part of the channels to remove, apart from --ratio."),
    click.option("--allocation", help="Units per layer: uniform, or global by comparing all layers; the method's own."),
    click.option("--normalize", default="zscore", show_default=True, help="What global compares: zscore, or raw."),
    click.option(
        "--min-keep", type=float, default=0.1, show_default=True, help="Part of its units that a layer keeps."
    ),
    click.option("--contiguous", is_flag=True, help="Remove one run of layers."),
    click.option("--no-bias", is_flag=True, help="flap: no biases in the place of what goes."),
    click.option(
        "--compensate", is_flag=True, help="Re-fit o and down to what is left of their inputs, by least squares."
    ),
    click.option(
        "--compensate-tokens", type=int, default=65536, show_default=True, help="Calibration tokens, at most."
    ),
    click.option(
        "--compensate-ridge", type=float, help="λ over the mean diagonal; by default 0.001 or 0.1, by target."
    ),
    click.option("--compensate-target", help="own output, or the dense residual stream, the default where possible."),
    click.option("--round-to", type=int, default=1, help="Make kept MLP widths multiples of this, such as 64."),
    click.option("--stock", is_flag=True, help="One width for all layers: loads without any extra code."),
    click.option("--emit", type=click.Choice(["mistral"]), help="Write a bias-free Llama as Mistral (any head count)."),
    click.option("--compress", is_flag=True, help="Store 2:4 as sparse-24-bitmask, which only older readers know."),
    click.option(
        "--calibration", help="FILE, directory, - or hub data set NAME[/CONFIG][:SPLIT]; else embedded prose."
    ),
    click.option("--field", default="text", help="Of the text, or of conversations, in records and tables."),
    click.option(
        "--samples", type=int, help="Calibration sequences; as in the method's paper, 10 of the embedded prose."
    ),
    click.option("--seq-len", type=int, help="Tokens of each; as in the method's paper, 128 of the embedded prose."),
    click.option(
        "--sampling",
        type=click.Choice(CHOICES["sampling"]),
        default="random",
        show_default=True,
        help="Seeded windows of the text, consecutive ones from its start, or the starts of seeded records.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of sampling, noise and random scores."),
    click.option("--evaluate", help="Text for perplexity before and after."),
    click.option("--no-evaluate", is_flag=True, help="Measure no perplexity."),
    click.option("--max-shard-size", type=ByteSize(), default=5_000_000_000, help="Of output files; 5GB by default."),
    click.option("--overwrite", is_flag=True, help="Replace the output directory."),
    click.option("--resume", is_flag=True, help="Go on where the same command with --resume stopped; or begin one."),
    click.option(
        "--gpu-memory", type=ByteSize(), help="What the run may hold on the GPU, such as 20GiB; what is free."
    ),
    click.option("--host-memory", type=ByteSize(), help="What its process may hold; what is free."),
    click.option("--scratch", type=click.Path(path_type=Path), help="Directory for what fits in neither."),
    click.option(
        "--state-dtype", default="float32", show_default=True, help="Of what a method keeps between sweeps; bfloat16."
    ),
    click.option("--reader", default="buffered", show_default=True, help="buffered, or direct around the page cache."),
    click.option("--read-threads", type=int, help="Threads that read: 2 to 8; by default 2, and 4 beside a GPU."),
)
COMPUTE_OPTIONS = (
    click.option(
        "--bos",
        type=click.Choice(CHOICES["bos"]),
        default="auto",
        show_default=True,
        help="Begin each sequence with BOS: where the tokenizer begins texts with it, always, or never.",
    ),
    click.option("--device", help="cpu, cuda or cuda:N; by default the GPU if there is one."),
    click.option(
        "--dtype", type=click.Choice(COMPUTE_DTYPES), help="Compute dtype; float32 on a CPU, the stored one on a GPU."
    ),
    click.option("--micro-batch", type=int, help="Sequences computed at once; by default as many as make 2048 tokens."),
    click.option("--trust-remote-code", is_flag=True, help="Run code that the model's directory brings."),
)


def with_options(options: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """A decorator that gives a command all of them, in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
