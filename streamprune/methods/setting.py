"""Numbers of a method's own, as the table names them and the command line gives them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from streamprune.errors import UsageError


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

    def parse(self, name: str, value: Any) -> Any:
        """`value` (a string from the command line, or already typed) checked, or a UsageError."""
        if self.choices:
            if value not in self.choices:
                raise UsageError(f"--set {name}={value}: choose one of {', '.join(self.choices)}")
            return value
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
