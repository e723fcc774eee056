"""Pruned directory as reports read it: facts of its run, kept units, scores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from streamprune.errors import CheckpointError
from streamprune.model.units import KIND_NAMES
from streamprune.storage.checkpoint import read_json
from streamprune.storage.directory import OWN_FILE
from streamprune.storage.journal import Key
from streamprune.storage.scores import SCORES_FILE, read_scores

Result = TypeVar("Result")
# As people say them; "layer" is what whole layers are recorded as, "weight" what single ones are.
KINDS_IN_WORDS: Mapping[str, str] = {
    **{str(kind): name for kind, name in KIND_NAMES.items()},
    "layer": "layers",
    "weight": "weights",
}


@dataclass(frozen=True)
class PrunedOutput:
    """Output of a run.

    Attributes:
        facts: the contents of streamprune.json.
        granularity: what was removed: "units", "layers", or a pattern of weights.
        layers: the prunable ones. n_layers: those of the dense model.
        perplexity: before and after pruning, where they were measured.
        now: perplexity of what lies there, after a training if there was one, and the hash of the tokens that it was
            measured on; None where it was not.
        kept: indices of kept units by (layer, kind); of whole layers by (layer, "layer"); None where weights went.
        scores: float64 [units] by (layer, kind); None where there are none.
    """

    path: Path
    facts: Mapping[str, Any]
    granularity: str
    layers: range
    n_layers: int
    perplexity: tuple[float, float] | None
    now: tuple[float, str] | None
    kept: Mapping[Key, frozenset[int]] | None

    @cached_property
    def scores(self) -> Mapping[Key, Tensor] | None:
        """Scores of the run, read when they are asked for.

        Raises:
            UsageError: they are damaged.
        """
        return read_scores(self.path)[0] if (self.path / SCORES_FILE).is_file() else None

    def read(self, what: Callable[[Mapping[str, Any]], Result]) -> Result:
        """Return what `what` makes of the facts.

        Raises:
            CheckpointError: they are not as they were written.
        """
        return _as_written(self.path / OWN_FILE, lambda: what(self.facts))

    def counts(self) -> dict[Key, int]:
        """Count the kept units of each layer and kind; those of whole layers are 1 or 0."""
        return {key: len(units) for key, units in (self.kept or {}).items()}


def read_output(directory: Path) -> PrunedOutput:
    """Read what streamprune.json says of an output.

    Raises:
        CheckpointError: not a pruned directory, or streamprune.json is not as it was written.
    """
    file = directory / OWN_FILE
    if not file.is_file():
        raise CheckpointError(f"{directory} has no {OWN_FILE}; give a directory that streamprune wrote")
    facts = read_json(file)

    def read() -> PrunedOutput:
        measured = facts.get("perplexity")
        if measured and measured["after"] is None:  # there was no memory left for it, or it is infinite
            measured = None
        perplexity = (float(measured["before"]), float(measured["after"])) if measured else None
        last = facts["recovery"].get("perplexity") if "recovery" in facts else measured
        now = (float(last["after"]), str(last["sha256_of_ids"])) if last else None
        granularity, layers = str(facts["options"]["granularity"]), range(*facts["layers"])
        everything = facts.get("kept")
        stay = {int(layer) for layer in everything or ()}
        n_layers = max([*stay, layers.stop - 1]) + 1
        if everything is None:
            kept = None
        elif granularity == "layers":
            kept = {(layer, "layer"): frozenset([0] if layer in stay else []) for layer in range(n_layers)}
        else:
            kept = {
                (int(layer), str(kind)): frozenset(map(int, units))
                for layer, kinds in everything.items()
                for kind, units in kinds.items()
            }
            for _, kind in kept:
                KINDS_IN_WORDS[kind]  # a KeyError is another version's kind
        return PrunedOutput(directory, facts, granularity, layers, n_layers, perplexity, now, kept)

    return _as_written(file, read)


def _as_written(file: Path, read: Callable[[], Result]) -> Result:
    """Return what `read` makes of the facts in `file`.

    Raises:
        CheckpointError: they are not there, or of another kind.
    """
    try:
        return read()
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{file} is not as streamprune writes it ({error!r}); prune again") from error
