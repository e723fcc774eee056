"""A step of a run in numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Shape = tuple[int, int]  # sequences, and tokens of each


@dataclass(frozen=True)
class Work:
    """What is computed on: sequences of the method, of the repair and of the evaluation."""

    calibration: Shape | None
    repair: Shape | None
    evaluation: Shape | None


@dataclass(frozen=True)
class Stage:
    """A step of a run.

    Attributes:
        device, host: bytes held there at the same time, by purpose; beside a CPU they are the same memory.
        scratch: bytes on the scratch disk. moved: bytes written there and read from there.
        passes: the layers it passes, in order.
        forward, backward: FLOPs of products of matrices.
        noise: weights that noise is drawn for. factors: FLOPs of triangular factors. updates: weights that SparseGPT
            goes through column by column.
        written: bytes of the output. carried: bytes of hidden states that a journal takes in at a commit.
    """

    name: str
    device: Mapping[str, int]
    host: Mapping[str, int] = field(default_factory=dict)
    scratch: int = 0
    moved: int = 0
    passes: Sequence[Sequence[int]] = ()
    forward: float = 0
    backward: float = 0
    noise: float = 0
    factors: float = 0
    updates: float = 0
    written: int = 0
    read: int = 0
    carried: int = 0
