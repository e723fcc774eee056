"""Steps of a run in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from streamprune.config import PruneConfig
from streamprune.methods.table import METHODS
from streamprune.paging.state import STATE_SLOTS
from streamprune.streaming.costs import Cost, Shape

EMBEDDED_CALIBRATION = (10, 128)  # samples and tokens of each; the text is short


@dataclass(frozen=True)
class Work:
    """Sequences that a run computes on: those of the method, of the repair and of the evaluation; None without one."""

    calibration: Shape | None
    repair: Shape | None
    evaluation: Shape | None


def calibration_shape(config: PruneConfig, positions: int) -> Shape:
    """Return the sequences that a method takes, and the tokens of each: as asked, else as its paper has it.

    Args:
        positions: the most tokens that the model takes.
    """
    samples, seq_len = METHODS[config.method].calibration if config.calibration else EMBEDDED_CALIBRATION
    return config.samples or samples, config.seq_len or min(seq_len, positions)


@dataclass(frozen=True)
class Kept:
    """Layers of which a budget keeps weights, state and graphs, beyond what a run needs at least."""

    slots: int = 2
    state_slots: int = STATE_SLOTS
    graphs: int = 0


@dataclass(frozen=True, kw_only=True)
class Stage(Cost):
    """Step of a run: what it costs, and what it reads and writes.

    Attributes:
        passes: the layers it passes, in order. read: bytes of them that are in no slot yet. disk: those of them that
            the page cache does not give. written: bytes of the output.
    """

    name: str
    passes: Sequence[Sequence[int]] = ()
    read: int = 0
    disk: int = 0
    written: int = 0
