"""`streamprune methods`: the table."""

from __future__ import annotations

import click

from streamprune.figures import table
from streamprune.methods.method import Method
from streamprune.methods.needs import Need
from streamprune.methods.table import METHODS, resolve_settings


@click.command(name="methods")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def methods_command(debug: bool) -> None:
    """The methods: what each needs, its numbers, its paper."""
    rows = [["method", "units", "weights", "layers", "needs", "what it is", "paper"]]
    for method in METHODS.values():
        matrix = ["yes" if target in method.targets else "-" for target in ("units", "weights", "layers")]
        rows.append(
            [
                method.name,
                *matrix,
                " + ".join(dict.fromkeys(need.label for need in _needs(method))) or "nothing",
                method.summary,
                method.paper,
            ]
        )
    settings = [["method", "--set", "default", "meaning"]]
    for method in METHODS.values():
        for name, setting in method.settings.items():
            meaning = setting.meaning + (f": {', '.join(setting.choices)}" if setting.choices else "")
            default = "-" if setting.default is None else str(setting.default)
            settings.append([method.name, name, default, meaning])
    click.echo(f"{table(rows)}\n\n{table(settings)}")


def _needs(method: Method) -> tuple[Need, ...]:
    """List what a method asks for by its defaults."""
    target = method.targets[0]
    return method.needs_for(target, resolve_settings(method.name, {}, target))
