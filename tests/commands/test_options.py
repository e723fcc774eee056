"""An option is said once: what the command line, checks, `--resume`, the card and docs/options.md make of a field."""

from __future__ import annotations

import ast
import math
import runpy
import sys
from dataclasses import dataclass, fields
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from streamprune import Progress, PruneConfig, prune, values
from streamprune.cli import cli
from streamprune.commands.options import COMPUTE_OPTIONS, PRUNE_OPTIONS, options_from, with_options
from streamprune.errors import UsageError
from streamprune.schema import Option, option, options_of

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "options.md"
options_page = runpy.run_path(str(PAGE.with_name("write_options.py")))["options_page"]


def test_the_page_of_options_is_what_the_fields_and_commands_say():
    written = PAGE.read_text(encoding="utf-8")
    assert written == options_page(PruneConfig, cli), "run: python docs/write_options.py"
    assert max(len(line) for line in written.splitlines()) <= 120


def given(decorators, *arguments):
    """What a command with these options hands on."""
    taken = {}
    command = click.command()(with_options(decorators)(lambda **options: taken.update(options)))
    result = CliRunner().invoke(command, arguments, standalone_mode=False)
    if result.exception:
        raise result.exception
    return taken


def test_the_command_line_has_every_field_and_its_default():
    options = given([*PRUNE_OPTIONS, *COMPUTE_OPTIONS])
    assert options.pop("assignments") == () and options.pop("no_bias") is False and options.pop("no_evaluate") is False
    assert set(options) == {each.name for each in fields(PruneConfig)} - {"settings"}
    needed = {"model": "m", "output": "o"}
    assert PruneConfig(**options | needed) == PruneConfig(**needed)


@pytest.mark.parametrize(
    ("ends", "words", "inside", "outside"),
    [
        ({"minimum": 2, "maximum": 8}, "2 to 8", [2, 8], [1, 9]),
        ({"minimum": 0, "below": 1}, "at least 0 and below 1", [0, 0.999], [-0.001, 1, math.nan]),
        ({"minimum": 0, "below": math.inf}, "at least 0 and finite", [0, 1e300], [-1, math.inf, math.nan]),
        ({"maximum": 3}, "at most 3", [-9, 3], [3.001]),
        ({}, "", [-math.inf, math.inf], []),
    ],
)
def test_a_range_is_said_in_words_and_held(ends, words, inside, outside):
    said = Option(values.number, "Heat.", "Toys", **ends)
    assert said.range == words
    assert all(said.holds(value) for value in inside)
    assert not any(said.holds(value) for value in outside)


def test_what_changes_no_byte_is_said_of_these_alone():
    """A resumed run may have another one of them: more here, and it would go on to mixed bytes."""
    free = {name for name, said in options_of(PruneConfig).items() if not said.changes_bytes}
    machine = {"gpu_memory", "host_memory", "scratch", "reader", "read_threads"}
    assert free == {"output", "overwrite", "resume", "evaluate"} | machine
    assert {name for name, said in options_of(PruneConfig).items() if said.resolved} == {"model", "device"}


def test_options_are_read_without_torch():
    """`--help` waits for nothing: these import the standard library, click and each other."""
    light = {f"streamprune.{name}" for name in ("config", "errors", "schema", "values", "commands.options")}
    for module in light:
        for node in ast.walk(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"streamprune.{a.name}" for a in node.names] if node.module == "streamprune" else [node.module]
            for name in names:
                assert name in light or name.partition(".")[0] in {*sys.stdlib_module_names, "click"}, (
                    f"{module}: {name}"
                )


# One more option, in this file alone.


@dataclass(frozen=True)
class ToyConfig(PruneConfig):
    """A config with one more field."""

    patience: int = option(
        3, values.whole_number, "Sighs per layer.", "Toys", more="Not used.", minimum=1, maximum=9, only_for=("units",)
    )


class Killed(BaseException):
    """As if the process ended there."""


class Killing(Progress):
    """Progress that ends the run after a while."""

    left = 7

    def advance(self, nbytes, **facts):
        self.left -= 1
        if self.left == 0:
            raise Killed


def test_a_toy_option_is_one_of_the_command_line():
    decorators = options_from(ToyConfig)
    assert given(decorators)["patience"] == 3
    assert given(decorators, "--patience", "5")["patience"] == 5
    with pytest.raises(click.UsageError, match=r"'much' is not a valid integer"):
        given(decorators, "--patience", "much")
    help = CliRunner().invoke(click.command()(with_options(decorators)(lambda: None)), ["--help"]).output
    assert "--patience INTEGER              Sighs per layer.  [default: 3]" in help


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patience": 0}, "--patience 0: must be 1 to 9"),
        ({"patience": 10}, "--patience 10: must be 1 to 9"),
        ({"patience": "ages"}, "--patience 'ages': give a number"),
        (
            {"patience": 4, "granularity": "2:4"},
            "--patience does not go with --granularity 2:4, only with units; leave",
        ),
    ],
)
def test_a_toy_option_is_checked(options, message):
    with pytest.raises(UsageError) as refused:
        ToyConfig("m", "o", **options)
    assert message in str(refused.value)
    assert ToyConfig("m", "o", patience="4").patience == 4


def test_a_toy_option_is_in_the_recipe_and_in_what_a_resumed_run_must_repeat(tiny_llama, tmp_path):
    options = {"method": "taylor", "samples": 4, "seq_len": 16, "micro_batch": 2, "evaluate": False, "resume": True}
    config = {"model": tiny_llama, "output": tmp_path / "pruned", **options}
    with pytest.raises(Killed):
        prune(ToyConfig(**config, patience=5), Killing(quiet=True))
    with pytest.raises(UsageError, match="was begun with --patience 5, this run has 6"):
        prune(ToyConfig(**config, patience=6))
    output = prune(ToyConfig(**config, patience=5)).output
    assert "- `patience`: 5\n" in (output / "README.md").read_text()


def test_a_toy_option_is_on_the_page_of_options():
    @click.group()
    @with_options(options_from(ToyConfig))
    def toy():
        """Prune."""

    page = options_page(ToyConfig, toy)
    entry = (
        "- `--patience INTEGER` (`patience`): Sighs per layer. Not used.\n  Default: 3; 1 to 9; only for units; changes"
    )
    assert f"## Toys\n\n{entry}" in page
