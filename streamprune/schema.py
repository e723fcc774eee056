"""Description of an option, in one place: help, type and range, what it goes with, what it changes.

A field of a frozen dataclass carries an `Option` in its metadata. The checks of its value, the command line's option,
the fingerprint of `--resume`, the recipe on the card and `docs/options.md` are made from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from streamprune.errors import UsageError


@dataclass(frozen=True)
class Option:
    """Description of one field of a config.

    Attributes:
        take: function (flag, value) of `values.py`: the value as its type, or a refusal.
        help: one line, as `--help` prints it.
        group: heading that it stands under in `docs/options.md`.
        more: what `docs/options.md` says beyond the help.
        shown: the default in words, where its value does not say it.
        metavar: name of the value in `--help`, where its type's does not do.
        choices: values to choose from.
        listed: whether `--help` lists the choices, and click refuses others; else the help names them.
        minimum, maximum: ends of the range, inclusive. below: its end, exclusive.
        because: why the range ends there.
        only_for: targets that it means something for; empty for all of them.
        only_with: name of the switch that it means something with.
        changes_bytes: whether other tensors, or other files beside them, come out.
        resolved: `--resume` compares what it came to (the source's hash, the device), not what was given.
        card: whether the card's recipe says it: "always", "given" where it is not the default, or "never". What changes
            no byte is never said.
    """

    take: Callable[[str, Any], Any]
    help: str
    group: str
    more: str = ""
    shown: str = ""
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    listed: bool = True
    minimum: float | None = None
    maximum: float | None = None
    below: float | None = None
    because: str = ""
    only_for: tuple[str, ...] = ()
    only_with: str | None = None
    changes_bytes: bool = True
    resolved: bool = False
    card: Literal["always", "given", "never"] = "given"

    @property
    def range(self) -> str:
        """Say the range in words, such as "at least 0 and below 1"; "" without one."""
        if self.minimum is not None and self.maximum is not None:
            return f"{self.minimum} to {self.maximum}"
        ends = {"at least": self.minimum, "at most": self.maximum, "below": self.below}
        words = [f"{word} {end}" for word, end in ends.items() if end is not None]
        return " and ".join(words).replace(f"below {math.inf}", "finite")

    def holds(self, value: float) -> bool:
        """Tell whether a value is in the range; NaN is in none."""
        return (
            (self.minimum is None or value >= self.minimum)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )


def option(default: Any, take: Callable[[str, Any], Any], help: str, group: str, **said: Any) -> Any:
    """Make a dataclass's field with this default and an `Option` of the other arguments."""
    return field(default=default, metadata={"option": Option(take, help, group, **said)})


def options_of(config: Any) -> dict[str, Option]:
    """Return the `Option` of each field of a config, or of a class of configs, by name and in the fields' order."""
    return {each.name: each.metadata["option"] for each in fields(config)}


def default_of(each: Field[Any]) -> Any:
    """Return a field's default; MISSING if it must be given."""
    return each.default if each.default_factory is MISSING else each.default_factory()


def flag_of(name: str) -> str:
    """Return the name on the command line of the option that is the field `name`: "--micro-batch"."""
    return f"--{name.replace('_', '-')}"


def taken(each: Field[Any], value: Any) -> Any:
    """Check and convert a value that was given for a field; None stays None where that is the default.

    Raises:
        UsageError: a value of another type, none of the choices, or out of range.
    """
    if value is None and each.default is None:
        return None
    said, flag = each.metadata["option"], flag_of(each.name)
    value = said.take(flag, value)
    if value is not None and said.choices and value not in said.choices:
        raise UsageError(f"{flag} {value}: choose {' or '.join(said.choices)}")
    if value is not None and said.range and not said.holds(value):
        raise UsageError(f"{flag} {value}: must be {said.range}{f', {said.because}' if said.because else ''}")
    return value


def refuse_idle(config: Any, target: str, chosen: str) -> None:
    """Refuse an option that was given where it means nothing: for this target, `chosen` by that option, or alone.

    Raises:
        UsageError: it names the option and what it goes with.
    """
    for each in fields(config):
        said, flag = each.metadata["option"], flag_of(each.name)
        # Its default given in so many words does no harm.
        if getattr(config, each.name) == default_of(each):
            continue
        if said.only_for and target not in said.only_for:
            raise UsageError(f"{flag} does not go with {chosen}, only with {' and '.join(said.only_for)}; leave it out")
        if said.only_with and not getattr(config, said.only_with):
            raise UsageError(f"{flag} means something with {flag_of(said.only_with)} only; add that, or leave it out")
