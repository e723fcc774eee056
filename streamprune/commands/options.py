"""The command line's options, made from the fields of the config, and how their values are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import click

from streamprune import values
from streamprune.config import PruneConfig
from streamprune.errors import UsageError
from streamprune.schema import Option, default_of, flag_of, options_of


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


# What click reads as which type; anything else stays a string, and the config judges it.
CLICK_TYPES: Mapping[Callable[[str, Any], Any], Any] = {
    values.number: float,
    values.whole_number: int,
    values.path: click.Path(path_type=Path),
    values.layer_range: LayerRange(),
    values.size: ByteSize(),
}
# What is written here: in the place of a field that no single value gives, and beside one.
INSTEAD = {
    "settings": (
        click.option(
            "--set", "assignments", multiple=True, metavar="NAME=VALUE", help=options_of(PruneConfig)["settings"].help
        ),
        click.option("--no-bias", is_flag=True, help="flap: no biases in the place of what goes."),
    )
}
BESIDE = {"evaluate": (click.option("--no-evaluate", is_flag=True, help="Measure no perplexity."),)}
COMPUTE = ("bos", "device", "dtype", "micro_batch", "trust_remote_code")  # of whatever computes on a text


def options_from(
    config: type[Any], names: Sequence[str] | None = None, leave_out: Sequence[str] = ()
) -> tuple[Callable[[Any], Any], ...]:
    """Click options of a config's fields, in their order; of some of them, in the order of `names`."""
    said = {each.name: each for each in fields(config)}
    made: list[Callable[[Any], Any]] = []
    for name in said if names is None else names:
        if name not in leave_out:
            made += INSTEAD.get(name) or (_click_option(said[name]), *BESIDE.get(name, ()))
    return tuple(made)


def _click_option(each: Field[Any]) -> Callable[[Any], Any]:
    said: Option = each.metadata["option"]
    # The config says itself what is missing: --help and subcommands need no model.
    default = None if default_of(each) is MISSING else default_of(each)
    words = shown_default(each)
    help = f"{said.help}  [default: {words}]" if words else said.help
    if said.take is values.switch:
        off = f"/--no-{flag_of(each.name)[2:]}" if default else ""
        return click.option(flag_of(each.name) + off, is_flag=True, default=default, help=help)
    listed = click.Choice(said.choices) if said.choices and said.listed else None
    kind = listed or CLICK_TYPES.get(said.take)
    return click.option(flag_of(each.name), type=kind, default=default, metavar=said.metavar, help=help)


def shown_default(each: Field[Any]) -> str:
    """A field's default in words; "" of a switch, and where there is none."""
    default = default_of(each)
    plain = default in (None, MISSING) or isinstance(default, bool | Mapping)
    return each.metadata["option"].shown or ("" if plain else str(default))


PRUNE_OPTIONS = options_from(PruneConfig, leave_out=COMPUTE)
COMPUTE_OPTIONS = options_from(PruneConfig, COMPUTE)


def with_options(options: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """A decorator that gives a command all of them, in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
