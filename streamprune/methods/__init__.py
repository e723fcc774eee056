"""The table of methods: what each needs, its numbers, and the paper.

A method is a function of `Statistics` (what a sweep can give) and its settings, and returns `UnitScores`.
CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from streamprune.errors import UsageError
from streamprune.methods.gradient import moreau, moreau_gs, smoothgrad, taylor
from streamprune.methods.plain import magnitude, random
from streamprune.methods.scores import UnitScores
from streamprune.sweep import Statistics

__all__ = ["METHODS", "Method", "Setting", "UnitScores", "resolve_settings"]


@dataclass(frozen=True)
class Setting:
    """One of a method's own numbers: its default, what it may be, and one line on it."""

    default: Any
    meaning: str
    minimum: float | None = None
    maximum: float | None = None
    exclusive: bool = False  # the minimum itself is excluded
    choices: tuple[str, ...] = ()

    def parse(self, name: str, value: Any) -> Any:
        """`value` (a string from the command line, or already typed) checked, or a UsageError."""
        if self.choices:
            if value not in self.choices:
                raise UsageError(f"--set {name}={value}: choose one of {', '.join(self.choices)}")
            return value
        kind = int if isinstance(self.default, int) else float
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
        needs: "nothing", one read of the "weights", or "gradients" of the calibration text.
        sweeps: forward-and-backward sweeps that it takes with given settings.
        state_copies: float32 copies of the prunable weights that it keeps between sweeps.
    """

    name: str
    score: Callable[[Statistics, dict[str, Any]], UnitScores]
    needs: Literal["nothing", "weights", "gradients"]
    summary: str
    paper: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    sweeps: Callable[[Mapping[str, Any]], int] = lambda settings: 0
    state_copies: Callable[[Mapping[str, Any]], int] = lambda settings: 0


_SIGMA = Setting(0.05, "noise relative to each weight", minimum=0)


def _moreau_settings(rho: float, gamma: float) -> dict[str, Setting]:
    return {
        "steps": Setting(10, "updates T", minimum=1),
        "rho": Setting(rho, "weight of the Moreau pull, 1/ρ", minimum=0, exclusive=True),
        "gamma": Setting(gamma, "step size γ", minimum=0, exclusive=True),
        "sigma": _SIGMA,
        "draws": Setting(1, "noisy gradients per update, m", minimum=1),
    }


def _moreau_sweeps(settings: Mapping[str, Any]) -> int:
    return settings["steps"] * settings["draws"]


def _moreau_state(settings: Mapping[str, Any]) -> int:
    """δ, and the sum of gradients over draws."""
    return int(settings["steps"] > 1) + int(settings["draws"] > 1)


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("random", random, "nothing", "uniform at random, the floor to beat", "-"),
        Method("magnitude", magnitude, "weights", "l2 norm of the unit's weights", "-"),
        Method(
            "taylor",
            taylor,
            "gradients",
            "first-order effect on the loss, |g w|",
            "LLM-Pruner, arXiv 2305.11627",
            {"order": Setting("first", "form", choices=("first", "second", "mix", "vectorize"))},
            sweeps=lambda settings: 1,
        ),
        Method(
            "smoothgrad",
            smoothgrad,
            "gradients",
            "|g w| with g averaged over noisy weights",
            "MoreauPruner, arXiv 2406.07017",
            {
                "draws": Setting(100, "noisy copies", minimum=1),
                "sigma": _SIGMA,
                "mean": Setting("gradient", "what is averaged", choices=("gradient", "score")),
            },
            sweeps=lambda settings: settings["draws"],
            state_copies=lambda settings: int(settings["mean"] == "gradient" and settings["draws"] > 1),
        ),
        Method(
            "moreau",
            moreau,
            "gradients",
            "|g w| of the loss's Moreau envelope",
            "MoreauPruner, arXiv 2406.07017",
            _moreau_settings(rho=0.05, gamma=1e-3),
            sweeps=_moreau_sweeps,
            state_copies=_moreau_state,
        ),
        Method(
            "moreau-gs",
            moreau_gs,
            "gradients",
            "moreau with group soft-thresholding",
            "MoreauPruner-GS, arXiv 2406.07017",
            {
                **_moreau_settings(rho=0.2, gamma=2e-4),
                "eta": Setting(5e-6, "threshold of the group norms", minimum=0),
                "eta_quantile": Setting(None, "eta from this quantile of them at step 0", minimum=0, maximum=1),
            },
            sweeps=_moreau_sweeps,
            state_copies=_moreau_state,
        ),
    )
}


def resolve_settings(method: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """All of a method's numbers: `given` over the defaults.

    Raises:
        UsageError: an unknown method or name, or a value out of range.
    """
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}; known are {', '.join(METHODS)}")
    known = METHODS[method].settings
    for name in given:
        if name not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UsageError(f"{method} has no setting {name!r}; {has}")
    return {
        name: setting.parse(name, given[name]) if given.get(name) is not None else setting.default
        for name, setting in known.items()
    }
