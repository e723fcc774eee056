"""`streamprune verify`: a pruned directory against the masked dense model.

The masked dense model is streamed from the source; the pruned one is loaded whole by plain transformers in a
fresh process (`_verify_child.py`), which imports nothing of streamprune.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from streamprune import slim
from streamprune.allocation import KeptUnits
from streamprune.calibration import embedded_text, load_tokenizer, tokenize
from streamprune.checkpoint import read_config, read_json
from streamprune.errors import CheckpointError, StreampruneError
from streamprune.families import RAGGED_PREFIX
from streamprune.ragged import modeling_source
from streamprune.run import open_model

SEQUENCES, SEQ_LEN = 4, 48


@dataclass(frozen=True)
class Check:
    """One comparison and what came of it."""

    name: str
    passed: bool
    detail: str


def verify(directory: Path, source: str | None = None, *, trust_remote_code: bool = False) -> list[Check]:
    """Compare a pruned directory with the masked dense model it stands for.

    Args:
        directory: written by streamprune.
        source: the dense model, where it has moved.
        trust_remote_code: also run modelling code that is not as streamprune writes it.

    Returns:
        Checks of the weights' names, the tokens of a text, the logits, generation with and without the KV cache,
        and left padding.

    Raises:
        StreampruneError: not a pruned directory, the source is gone, or the fresh process failed.
    """
    facts_file = directory / "streamprune.json"
    if not facts_file.is_file():
        raise CheckpointError(f"{directory} has no streamprune.json; give a directory that streamprune wrote")
    facts = read_json(facts_file)
    try:
        kept: KeptUnits = {int(layer): dict(kinds) for layer, kinds in facts["kept"].items()}
        model, is_ragged = source or str(facts["source"]["model"]), facts["layout"] == "ragged"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{facts_file} is not as streamprune writes it ({error!r}); prune again") from error
    if is_ragged and not trust_remote_code:
        _refuse_foreign_code(directory)
    if source is None and model.startswith("/") and not Path(model).is_dir():
        raise CheckpointError(f"the dense model {model} is gone; say where it is with --source")
    ids, logits = masked_dense_logits(model, kept)
    return [Check(**check) for check in _fresh_process(directory, ids, logits, is_ragged)]


def _refuse_foreign_code(directory: Path) -> None:
    """The modelling file will be run: it must be the one that streamprune writes."""
    model_type = str(read_config(directory).get("model_type"))
    file = directory / f"modeling_{model_type}.py"
    if not file.is_file() or file.read_text(encoding="utf-8") != modeling_source(
        model_type.removeprefix(RAGGED_PREFIX)
    ):
        raise CheckpointError(f"{file} is not as this streamprune writes it; read it, then pass --trust-remote-code")


def masked_dense_logits(model: str, kept: KeptUnits) -> tuple[Tensor, Tensor]:
    """Token ids [n, seq] and float32 logits [n, seq, vocabulary] of the dense model with its units masked."""
    with open_model(model, device="cpu", dtype="float32", micro_batch=SEQUENCES) as sweeper:
        skeleton = sweeper.skeleton
        if len(kept) != len(skeleton.layers):
            raise CheckpointError(f"{model} has {len(skeleton.layers)} layers, the pruned model came from {len(kept)}")
        tokens = tokenize(load_tokenizer(skeleton.checkpoint.path), embedded_text("heldout"))
        ids = tokens[: SEQUENCES * SEQ_LEN].view(SEQUENCES, SEQ_LEN)
        hidden, _ = sweeper.forward(ids, edit=lambda layer, weights: slim.mask_layer(skeleton, kept, layer, weights))
        with torch.no_grad():
            return ids, skeleton.head(hidden).float()


def _fresh_process(directory: Path, ids: Tensor, logits: Tensor, remote_code: bool) -> list[dict[str, Any]]:
    child = Path(__file__).with_name("_verify_child.py")
    with tempfile.TemporaryDirectory(prefix="streamprune-verify-") as scratch:
        save_file({"ids": ids.contiguous(), "logits": logits.contiguous()}, Path(scratch) / "expected.safetensors")
        (Path(scratch) / "text.txt").write_text(embedded_text("heldout"), encoding="utf-8")
        # -P: the package's own directory must not come first on the path, its module names are common words.
        command = [sys.executable, "-P", str(child), str(directory), scratch, str(int(remote_code))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise StreampruneError(f"{directory} does not load in plain transformers: {last}")
        return json.loads((Path(scratch) / "checks.json").read_text())
