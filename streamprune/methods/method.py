"""A method as a row of the table: what it needs, and its own numbers, as the command line gives them."""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from streamprune.config import Target
from streamprune.errors import UsageError
from streamprune.methods.needs import STORED_WEIGHTS, KeptState, Need


@dataclass(frozen=True)
class Setting:
    """Number of a method's own: its default, what it may be, and one line on it."""

    default: Any
    meaning: str
    minimum: float | None = None
    maximum: float | None = None
    exclusive: bool = False  # the minimum itself is excluded
    choices: tuple[str, ...] = ()
    whole: bool = False  # an integer, also where the default is none
    path: bool = False  # the path of an earlier run is taken beside the choices
    beside: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # others' values with which it does something

    def parse(self, name: str, value: Any) -> Any:
        """`value` (a string from the command line, or already typed) checked, or a UsageError."""
        if self.choices:
            if value in self.choices or (self.path and (os.sep in str(value) or os.path.exists(str(value)))):
                return str(value)
            more = ", or give the path of an earlier run's output" if self.path else ""
            raise UsageError(f"--set {name}={value}: choose one of {', '.join(self.choices)}{more}")
        kind = int if self.whole or isinstance(self.default, int) else float
        try:
            number = kind(value)
            if not math.isfinite(number) or (isinstance(value, float) and number != value):
                raise ValueError
        except (TypeError, ValueError, OverflowError):
            wanted = "an integer" if kind is int else "a finite number"
            raise UsageError(f"--set {name}={value}: not {wanted}") from None
        low, high = self.minimum, self.maximum
        if low is not None and (number < low or (self.exclusive and number == low)):
            raise UsageError(f"--set {name}={value}: must be {'above' if self.exclusive else 'at least'} {low}")
        if high is not None and number > high:
            raise UsageError(f"--set {name}={value}: must be at most {high}")
        return number


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        function: gives its scores to a sink, one of those for `targets`; as "module:name" in this folder, so that the
            table can be read without torch, or itself.
        targets: what it can score.
        needs: what it asks of `Statistics`. unneeded: what of it not, with given settings.
        sums: gradients, or powers of them, that it has summed of a weight, with given settings.
        calibration: samples and tokens of each, as in its paper.
        sweeps: forward-and-backward sweeps that it takes with given settings.
        states: what it may keep between sweeps.
        narrows: whether bfloat16 state was measured to rank units as float32 state does, at its defaults: then a GPU
            keeps that by default.
        stateless: the method to take instead where there is no room for that.
        allocation: its own, for units. normalize: what global allocation makes of its scores, where not the usual.
        trials: passes over all layers, masks that are tried in each, and sequences of each of these.
        variants: what settings are that are not given, by the setting `variant`.
        check: refuses settings that do not go with a model, a target, its prunable layers, a `Goal`, and a number of
            sequences; named as `function` is.
    """

    name: str
    function: str | Callable[..., None]
    targets: tuple[Target, ...]
    needs: tuple[Need, ...]
    summary: str
    paper: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    calibration: tuple[int, int] = (10, 128)
    sweeps: Callable[[Mapping[str, Any]], int] = lambda settings: 1
    unneeded: Callable[[Mapping[str, Any]], tuple[Need, ...]] = lambda settings: ()
    sums: Callable[[Mapping[str, Any]], int] = lambda settings: 1
    states: tuple[KeptState, ...] = ()
    narrows: bool = False
    stateless: str = "taylor"
    allocation: Literal["uniform", "global"] = "uniform"
    normalize: str | None = None
    trials: Callable[[Mapping[str, Any]], tuple[int, int, int]] | None = None
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    check: str | Callable[..., None] = lambda settings, skeleton, target, layers, goal, samples: None

    @property
    def score(self) -> Callable[..., None]:
        """The function itself, imported where the table only names it."""
        return _imported(self.function)

    @property
    def check_for(self) -> Callable[..., None]:
        """The check itself, likewise."""
        return _imported(self.check)

    @property
    def needs_text(self) -> bool:
        """Tell whether a calibration text is read."""
        return any(need.reads_text for need in self.needs)

    def needs_for(self, target: Target, settings: Mapping[str, Any]) -> tuple[Need, ...]:
        """List what it asks for with these settings; weights that go are read by every method."""
        if not self.needs:
            return (STORED_WEIGHTS,) if target == "weights" else ()
        unneeded = self.unneeded(settings)
        return tuple(need for need in self.needs if need not in unneeded)

    def refuse_idle(self, settings: Mapping[str, Any]) -> None:
        """Refuse a setting that is not as it is by itself, and does nothing beside another one.

        Raises:
            UsageError: there is one.
        """
        own = self.variants[settings["variant"]] if self.variants else {}
        for name, setting in self.settings.items():
            if settings[name] == own.get(name, setting.default):
                continue
            for other, values in setting.beside.items():
                if settings[other] not in values:
                    instead = "" if values[0] is None else f", or pass --set {other}={values[0]}"
                    raise UsageError(
                        f"--set {name}={settings[name]} does nothing with {other}={settings[other]}; "
                        f"leave it out{instead}"
                    )


def _imported(function: str | Callable[..., None]) -> Callable[..., None]:
    if callable(function):
        return function
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(f"streamprune.methods.{module}"), name)
