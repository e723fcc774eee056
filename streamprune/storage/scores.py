"""Scores of a run, beside its output: what another run can begin with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from streamprune.errors import UsageError
from streamprune.storage.directory import OWN_FILE
from streamprune.storage.journal import Key

# Safetensors inside. Under their own suffix it would be taken for weights: who loads a model may load all such files.
SCORES_FILE = "streamprune.scores"
FACTS = "facts"


def write_scores(directory: Path, scores: Mapping[Key, Tensor], facts: Mapping[str, str]) -> None:
    """Write scores by layer and kind, float64 [units], with facts of where they come from."""
    tensors = {f"{layer}.{kind}": values.double().cpu().contiguous() for (layer, kind), values in scores.items()}
    # Of several entries safetensors writes now one first, now another.
    save_file(tensors, directory / SCORES_FILE, metadata={FACTS: json.dumps(facts, sort_keys=True)})


def read_scores(path: Path) -> tuple[dict[Key, Tensor], dict[str, str]]:
    """Read scores and their facts: of an output, of its streamprune.json, or of the file itself.

    Raises:
        UsageError: there is none, or it is not as it was written.
    """
    file = path.parent / SCORES_FILE if path.name == OWN_FILE else path / SCORES_FILE if path.is_dir() else path
    try:
        with safe_open(file, framework="pt") as stored:
            facts = json.loads((stored.metadata() or {})[FACTS])
            found: dict[Key, Tensor] = {}
            for name in list(stored.keys()):
                layer, _, kind = name.partition(".")
                found[int(layer), kind] = stored.get_tensor(name)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UsageError(f"{path}: no {SCORES_FILE} of an earlier run can be read there; {error}") from error
    if any(values.dtype != torch.float64 or not bool(values.isfinite().all()) for values in found.values()):
        raise UsageError(f"{file}: its scores are not as a run writes them; give another")
    return found, facts
