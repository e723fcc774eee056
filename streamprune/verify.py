"""`streamprune verify`: a pruned directory against the masked dense model.

The masked dense model is streamed from the source; the pruned one is loaded whole by plain transformers in a
fresh process (`_verify_child.py`), which imports nothing of streamprune.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from streamprune import compressed, slim
from streamprune.activations import States, whole
from streamprune.allocation import KeptUnits, all_units
from streamprune.calibration import load_tokenizer, tokenize
from streamprune.capture import module_of
from streamprune.checkpoint import Checkpoint, read_config, read_json
from streamprune.documents import embedded_text
from streamprune.errors import CheckpointError, StreampruneError
from streamprune.families import RAGGED_PREFIX, kept_lines
from streamprune.ragged import modeling_source
from streamprune.run import open_model
from streamprune.skeleton import Skeleton
from streamprune.sweep import Visit

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
        units = facts.get("kept")
        kept = None if units is None else {int(layer): dict(kinds) for layer, kinds in units.items()}
        model, is_ragged = source or str(facts["source"]["model"]), facts["layout"] == "ragged"
        options = facts["options"]
        n, _, m = str(options.get("granularity")).partition(":")
        change = Change(
            kept=kept,
            compensated=bool(options.get("compensate")),
            biases=bool(facts.get("output_biases")),
            method=options["method"],
            pattern=(int(n), int(m)) if m else None,
            layers=range(*facts["layers"]),
            zeros=facts["zeros"]["weights"] if kept is None else 0,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{facts_file} is not as streamprune writes it ({error!r}); prune again") from error
    if is_ragged and not trust_remote_code:
        _refuse_foreign_code(directory)
    if source is None and model.startswith("/") and not Path(model).is_dir():
        raise CheckpointError(f"the dense model {model} is gone; say where it is with --source")
    with compressed.decompressed(directory) as dense:
        ids, logits, checks = expected_logits(model, dense, change)
        if dense != directory:
            detail = f"by {compressed.PACKAGE} {compressed.version()}; transformers loads that copy"
            checks.insert(0, Check("weights decompressed", True, detail))
        return checks + [Check(**check) for check in _fresh_process(dense, ids, logits, is_ragged)]


def _refuse_foreign_code(directory: Path) -> None:
    """The modelling file will be run: it must be the one that streamprune writes."""
    model_type = str(read_config(directory).get("model_type"))
    file = directory / f"modeling_{model_type}.py"
    if not file.is_file() or file.read_text(encoding="utf-8") != modeling_source(
        model_type.removeprefix(RAGGED_PREFIX)
    ):
        raise CheckpointError(f"{file} is not as this streamprune writes it; read it, then pass --trust-remote-code")


@dataclass(frozen=True)
class Change:
    """What a run did to its source.

    Attributes:
        kept: units per layer and kind; None where single weights were pruned.
        compensated: o and down were fitted anew.
        biases: o and down have biases in the place of units.
        method: of its scores.
        pattern: n and m of N:M, or None; layers: the prunable ones; zeros: how many of the pruned weights are.
    """

    kept: KeptUnits | None
    compensated: bool
    biases: bool
    method: str
    pattern: tuple[int, int] | None
    layers: range
    zeros: int


def expected_logits(model: str, directory: Path, change: Change) -> tuple[Tensor, Tensor, list[Check]]:
    """Token ids [n, seq], and float32 logits [n, seq, vocabulary] of the dense model with what went masked.

    Weights that the run made itself (fitted ones, biases, those of pruned rows) are taken from `directory` and put
    where they belong in the dense model. For pruned rows there is also a check that what is not zero is as it was.
    """
    with open_model(model, device="cpu", dtype="float32", micro_batch=SEQUENCES) as sweeper:
        skeleton = sweeper.skeleton
        if change.kept is not None and max(change.kept, default=0) >= len(skeleton.layers):
            raise CheckpointError(f"{model} has {len(skeleton.layers)} layers, the pruned model came from more")
        tokens = tokenize(load_tokenizer(skeleton.checkpoint.path), embedded_text("heldout"))
        ids = tokens[: SEQUENCES * SEQ_LEN].view(SEQUENCES, SEQ_LEN)
        with Checkpoint(directory) as output:
            masking = _Masking(skeleton, output, change)
            hidden = sweeper.forward(ids, visit=masking.visit)
        with torch.no_grad():
            return ids, skeleton.head(whole(hidden)).float(), masking.checks()


class _Masking:
    """The visitor that makes each layer of the dense model what it is in the output, at full width."""

    def __init__(self, skeleton: Skeleton, output: Checkpoint, change: Change) -> None:
        self.skeleton, self.output, self.change = skeleton, output, change
        everything = all_units(skeleton.geometry, skeleton.family.kinds)
        dense = {layer: everything for layer in range(len(skeleton.layers))}
        self.kept: KeptUnits = dense if change.kept is None else change.kept
        self.altered, self.zeros, self.crowded = 0, 0, 0

    def visit(self, visit: Visit) -> States:
        """The layer's output."""
        if visit.layer not in self.kept:
            return visit.hidden
        if self.change.kept is None:
            self._take_matrices(visit)
            return visit.run()
        slim.mask_layer(self.skeleton, self.kept, visit.layer, visit.weights)
        with ExitStack() as hooks:
            for member in slim.output_matrices(self.skeleton, visit.layer):
                if self.change.compensated:
                    lines = kept_lines(member, self.skeleton.geometry, self.kept[visit.layer][member.kind])
                    fitted = self._read(visit.layer, member.tensor).float()
                    visit.weights[member.tensor].index_copy_(member.dim, lines, fitted)
                if self.change.biases:
                    self._add_bias(visit, slim.bias_of(member.tensor), hooks)
            return visit.run()

    def checks(self) -> list[Check]:
        """Of pruned weights: the zeros, their pattern, and the rest as they were, where the method changes none."""
        if self.change.kept is not None:
            return []
        checks = [Check("zeros", self.zeros == self.change.zeros, f"{self.zeros:,} of {self.change.zeros:,}")]
        if self.change.pattern is not None:
            detail = f"{self.crowded:,} groups of {self.change.pattern[1]} have more than {self.change.pattern[0]}"
            checks.append(Check("pattern", self.crowded == 0, detail))
        if self.change.method != "sparsegpt":
            detail = f"{self.altered:,} differ" if self.altered else "as they were"
            checks.append(Check("weights that are not zero", self.altered == 0, detail))
        return checks

    def _read(self, layer: int, tensor: str) -> Tensor:
        """A tensor of a source layer in the output, where layers are numbered anew."""
        return self.output.read(self.skeleton.layer_prefix(list(self.kept).index(layer)) + tensor)

    def _add_bias(self, visit: Visit, name: str, hooks: ExitStack) -> None:
        bias = self._read(visit.layer, name).float()
        if name in visit.weights:
            visit.weights[name].copy_(bias)
            return
        module = self.skeleton.layers[visit.layer].get_submodule(module_of(name))
        handle = module.register_forward_hook(lambda module, given, made: made + bias)
        hooks.callback(handle.remove)

    def _take_matrices(self, visit: Visit) -> None:
        for name, transposed in self.skeleton.matrices(visit.layer).items():
            made, stored = self._read(visit.layer, name), visit.page.tensors[name]
            self.altered += int(((made != stored) & (made != 0)).sum())
            visit.weights[name].copy_(made)
            if visit.layer in self.change.layers:
                self.zeros += made.numel() - int(made.count_nonzero())
                if self.change.pattern is not None:
                    n, m = self.change.pattern
                    groups = (made.T if transposed else made).reshape(-1, m)
                    self.crowded += int((groups.count_nonzero(dim=1) > n).sum())


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
