"""Write docs/options.md anew, from a config's fields and from what commands take beside them.

python docs/write_options.py
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path

import click

from streamprune.cli import cli
from streamprune.commands.options import options_from, shown_default, with_options
from streamprune.config import PruneConfig
from streamprune.schema import Option, default_of, flag_of

WIDTH = 118  # of a line of the page
HEAD = """# Options

Every option of a run is one field of `streamprune.PruneConfig`: its name stands behind the option's in brackets. An
option changes the bytes that come out, or it does not: those that do must be the same when `--resume` goes on from an
earlier run (of the model, the dtype and the device, what they came to). Sizes are bytes, or a number with KB, MB, GB,
TB or KiB, MiB, GiB, TiB.

`python docs/write_options.py` writes this page from those fields."""


def options_page(config: type[PruneConfig], commands: click.Group) -> str:
    """Markdown of all options: the config's by group, in order of appearance, then those of each command alone."""
    groups: dict[str, list[Field]] = {}
    for each in fields(config):
        groups.setdefault(each.metadata["option"].group, []).append(each)
    parts = [HEAD]
    for group, members in groups.items():
        parts += [f"## {group}", "\n".join(item for each in members for item in _field_items(each, config))]
    main = click.Context(commands, info_name="streamprune", **commands.context_settings)
    of_config = _records(main, _parameters(options_from(config)))
    of_main = _records(main, commands.params)
    parts += ["## The command line alone", "\n".join(_items(of_main, leave_out=of_config))]
    for command, inner in _commands_of(commands, main):
        parts += _command_parts(command, inner, of_config, of_main)
    return "\n\n".join(part for part in parts if part) + "\n"


def _commands_of(group: click.Group, context: click.Context) -> Iterable[tuple[click.Command, click.Context]]:
    """Yield the commands of a group, and of the groups in it."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, "it is listed"
        inner = click.Context(command, info_name=name, parent=context, **command.context_settings)
        if isinstance(command, click.Group):
            yield from _commands_of(command, inner)
        else:
            yield command, inner


def _field_items(each: Field, config: type[PruneConfig]) -> Iterable[str]:
    """A field's option with all that is said of it, and those that are written beside it."""
    (record, *beside) = _records(
        click.Context(click.Command("")), _parameters(options_from(config, [each.name]))
    ).items()
    said: Option = each.metadata["option"]
    yield _item(f"`{record[0]}` (`{each.name}`)", f"{said.help} {said.more}", _facts(each, said))
    for name, help in beside:
        yield _item(f"`{name}`", help)


def _facts(each: Field, said: Option) -> str:
    """Default, values, company and consequence in one sentence."""
    default = shown_default(each)
    facts = [
        "required" if default_of(each) is MISSING else f"default: {default}" if default else "",
        said.range + (f", {said.because}" if said.because else ""),
        f"one of {', '.join(f'`{choice}`' for choice in said.choices)}" if len(said.choices) > 1 else "",
        f"only for {' and '.join(said.only_for)}" if said.only_for else "",
        f"only with {flag_of(said.only_with)}" if said.only_with else "",
        "changes the bytes" if said.changes_bytes else "changes no byte",
    ]
    sentence = "; ".join(fact for fact in facts if fact)
    return sentence[0].upper() + sentence[1:] + "."


def _command_parts(
    command: click.Command, context: click.Context, of_config: dict[str, str], of_main: dict[str, str]
) -> list[str]:
    """A command's usage, what it does, and the options that are its own."""
    records = _records(context, command.params)
    shared = [name for name in records if of_main.get(name) == records[name]]
    own = _items(records, leave_out=shared)
    if not own:
        return []
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    also = "all options of a run" if of_config.keys() <= set(shared) else ", ".join(name.split()[0] for name in shared)
    return [
        f"## {usage}",
        _wrapped(command.help or ""),
        "\n".join(own),
        _wrapped(f"As above: {also}.") if shared else "",
    ]


def _parameters(options: Sequence) -> list[click.Parameter]:
    """The parameters that these decorators give a command."""
    return click.command()(with_options(options)(lambda: None)).params


def _records(context: click.Context, parameters: Iterable[click.Parameter]) -> dict[str, str]:
    """Read what --help says of each option, by how it writes it: "--ratio FLOAT"."""
    options = [each for each in parameters if isinstance(each, click.Option)]
    return dict(record for each in options if (record := each.get_help_record(context)))


def _items(records: dict[str, str], leave_out: Iterable[str]) -> list[str]:
    return [_item(f"`{name}`", help) for name, help in records.items() if name not in leave_out]


def _item(name: str, help: str, facts: str = "") -> str:
    lines = [_wrapped(f"- {name}: {help.strip()}", "  "), _wrapped(f"  {facts}", "  ") if facts else ""]
    return "\n".join(line for line in lines if line)


def _wrapped(text: str, indent: str = "") -> str:
    """Lines of the page's width, with options as code."""
    marked = re.sub(r"(?<![`\w-])--[a-z][a-z-]*", r"`\g<0>`", text)
    return textwrap.fill(marked, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


if __name__ == "__main__":
    Path(__file__).with_name("options.md").write_text(options_page(PruneConfig, cli), encoding="utf-8")
