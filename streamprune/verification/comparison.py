"""Comparison of a pruned directory with the dense model, masked to what is left: the work of `streamprune verify`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import CheckpointError, StreampruneError
from streamprune.figures import human
from streamprune.model.families import RAGGED_PREFIX
from streamprune.model.masking import bias_of, mask_layer, output_matrices
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import KeptUnits, kept_lines, module_of
from streamprune.output.ragged import modeling_source, ragged_config_fields
from streamprune.paging.hidden_states import States, whole
from streamprune.paging.host_memory import available_memory
from streamprune.pipeline.source import Source
from streamprune.planning.decision import written_form
from streamprune.storage.checkpoint import Checkpoint, read_config, resolve_model
from streamprune.storage.directory import OWN_FILE
from streamprune.streaming.walk import Visit, walk
from streamprune.texts.documents import embedded_text
from streamprune.texts.tokenizer import load_tokenizer
from streamprune.verification.fresh_process import FreshProcess

SEQUENCES, SEQ_LEN = 4, 48
# Two float32 computations of the same sums in another order; a wrong mask or width is off by the logits' size.
TOLERANCE = 1e-3
WEIGHTS, TOKENS = "weights", "tokens of a text"


@dataclass(frozen=True)
class Check:
    """Result of one comparison."""

    name: str
    passed: bool
    detail: str


def compare_with_masked(
    process: FreshProcess,
    directory: Path,
    facts: dict[str, Any],
    source: str | None,
    *,
    trust_remote_code: bool = False,
) -> list[Check]:
    """The checks of `verify`.

    Args:
        process: to load the pruned model in. facts: the output's streamprune.json.

    Raises:
        StreampruneError: as `verify`.
    """
    try:
        change = Change.of(facts)
        model, form = source or str(facts["source"]["model"]), written_form(facts)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        said = f"{directory / OWN_FILE} is not as streamprune writes it ({error!r}); prune again"
        raise CheckpointError(said) from error
    if form.own_code and not trust_remote_code:
        _refuse_foreign_code(directory)
    if source is None and model.startswith("/") and not Path(model).is_dir():
        raise CheckpointError(f"the dense model {model} is gone; say where it is with --source")
    with form.readable(directory) as dense:
        _check_memory(dense)
        process.load(dense, model_code=form.own_code or trust_remote_code, tokenizer_code=trust_remote_code)
        text, tokens = _held_out_tokens(model, trust_remote_code)
        ids = torch.tensor(tokens[0][: SEQUENCES * SEQ_LEN]).view(SEQUENCES, SEQ_LEN)
        process.ask(text, ids)
        with _half_the_threads():
            expected, checks = _masked(model, dense, change, ids, trust_remote_code)
        checks += _checks(process.answer(), tokens, expected)
        if dense != directory:
            packages = ", ".join(" ".join(each) for each in form.versions().items())
            detail = f"by {packages}; transformers loads that copy"
            checks.insert(0, Check("weights decompressed", True, detail))
        return checks


def _check_memory(directory: Path) -> None:
    """Refuse a model that plain transformers, which loads it as a whole, has no memory for."""
    with Checkpoint(directory) as checkpoint:
        needed = checkpoint.nbytes_in(torch.float32)
    if needed > (there := available_memory()):
        raise StreampruneError(
            f"{directory} takes {human(needed)} in float32, which plain transformers loads as a whole, and there are "
            f"{human(there)}; verify it on a machine that has them"
        )


@contextmanager
def _half_the_threads() -> Iterator[None]:
    """The fresh process has the others: more threads than cores wait for each other at every small product."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def complaint(directory: Path, checks: Sequence[Check]) -> str | None:
    """Say in a line what is wrong and what to do about it; None if all checks passed."""
    failed = {check.name: check.detail for check in checks if not check.passed}
    if not failed:
        return None
    for name in (WEIGHTS, TOKENS):  # where these differ, the rest does too
        if name in failed:
            return f"{directory}: {name}: {failed[name]}; download or copy it again, or prune again"
    return (
        f"{directory} does not behave as the masked dense model ({', '.join(failed)}): if --source is the one that was "
        "pruned, prune it again and report this"
    )


def _refuse_foreign_code(directory: Path) -> None:
    """The modelling file will be run: it must be the one that streamprune writes, and no other code be there.

    transformers also runs files that no config names, as custom_generate/generate.py.
    """
    config = read_config(directory)
    dense_type = str(config.get("model_type")).removeprefix(RAGGED_PREFIX)
    fields = ragged_config_fields(dense_type)
    if config.get("auto_map") != fields["auto_map"]:
        raise CheckpointError(
            f"{directory / 'config.json'} names other code than this streamprune writes; "
            "read it, then pass --trust-remote-code"
        )
    file = directory / f"modeling_{fields['model_type']}.py"
    if not file.is_file() or file.read_text(encoding="utf-8") != modeling_source(dense_type):
        raise CheckpointError(f"{file} is not as this streamprune writes it; read it, then pass --trust-remote-code")
    others = sorted(each for each in directory.rglob("*") if each != file and (each.suffix == ".py" or _is_link(each)))
    if others:
        raise CheckpointError(
            f"{others[0]} is, or leads to, other code than this streamprune writes; read it, then pass "
            "--trust-remote-code"
        )


def _is_link(path: Path) -> bool:
    """Tell whether it is a link to another directory, which is not looked through: links may lead in circles."""
    return path.is_symlink() and path.is_dir()


@dataclass(frozen=True)
class Change:
    """Changes that a run made to its source.

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

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Change:
        """Read them from streamprune.json; KeyError and the like where that is not as it was written."""
        units, options = facts.get("kept"), facts["options"]
        kept = None if units is None else {int(layer): dict(kinds) for layer, kinds in units.items()}
        n, _, m = str(options.get("granularity")).partition(":")
        return cls(
            kept=kept,
            compensated=bool(options.get("compensate")),
            biases=bool(facts.get("output_biases")),
            method=options["method"],
            pattern=(int(n), int(m)) if m else None,
            layers=range(*facts["layers"]),
            zeros=facts["zeros"]["weights"] if kept is None else 0,
        )


def _held_out_tokens(model: str, trust_remote_code: bool) -> tuple[str, list[list[int]]]:
    """The embedded text, and the dense model's tokens of it, without the special ones and with them."""
    with Checkpoint(resolve_model(model, trust_remote_code=trust_remote_code)) as checkpoint:
        tokenizer, text = load_tokenizer(checkpoint.path, trust_remote_code=trust_remote_code), embedded_text("heldout")
    return text, [tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"] for special in (False, True)]


def _masked(
    model: str, directory: Path, change: Change, ids: Tensor, trust_remote_code: bool
) -> tuple[Tensor, list[Check]]:
    """Logits [n, seq, vocabulary] of the dense model with what went masked, and the checks of pruned rows.

    Weights that the run made itself (fitted ones, biases, those of pruned rows) are taken from `directory` and put
    where they belong in the dense model. Of pruned rows it is also checked that what is not zero is as it was.
    """
    with Source(
        model, device="cpu", dtype="float32", micro_batch=SEQUENCES, trust_remote_code=trust_remote_code
    ).open() as sweeper:
        skeleton = sweeper.skeleton
        with Checkpoint(directory) as output, torch.no_grad():
            _check_source(model, skeleton, output, change.kept)
            _check_made(skeleton, output, change)
            masking = _Masking(skeleton, output, change)
            logits = skeleton.head(whole(walk(sweeper, ids, masking.visit))).float()
        return logits, masking.checks()


def _check_source(model: str, skeleton: Skeleton, output: Checkpoint, kept: KeptUnits | None) -> None:
    """Refuse a dense model that has not all that stayed in the pruned one, and rows that are not all there."""
    if kept is not None:
        there = skeleton.all_units(layer for layer in kept if layer < len(skeleton.layers))
        misfit = any(
            layer not in there or units.keys() != there[layer].keys() or not set(units[kind]) <= set(there[layer][kind])
            for layer, units in kept.items()
            for kind in units
        )
        sizes = {name: getattr(skeleton.config, name) for name in ("vocab_size", "hidden_size")}
        misfit |= any(output.config.get(name, size) != size for name, size in sizes.items())
    else:  # single weights are 0, and each matrix as large as it was
        shapes = {
            skeleton.layer_prefix(layer) + name: tuple(skeleton.shapes(layer)[name])
            for layer in range(len(skeleton.layers))
            for name in skeleton.matrices(layer)
        }
        if missing := sorted(shapes.keys() - output.tensors.keys()):
            raise CheckpointError(f"{output.path} has no {missing[0]}; download or copy it again, or prune again")
        misfit = any(output.tensors[name].shape != shape for name, shape in shapes.items())
    if misfit:
        raise CheckpointError(f"{model} is not the model that was pruned; say where that is with --source")


def _check_made(skeleton: Skeleton, output: Checkpoint, change: Change) -> None:
    """Refuse an output in which what the run made itself is missing, or of another width."""
    for number, (layer, units) in enumerate((change.kept or {}).items()):
        made: dict[str, tuple[int, ...]] = {}
        for member in output_matrices(skeleton, layer):
            shape = list(skeleton.shapes(layer)[member.tensor])
            shape[member.dim] = len(kept_lines(member, skeleton.geometries[layer], units[member.kind]))
            made |= {member.tensor: tuple(shape)} if change.compensated else {}
            made |= {bias_of(member.tensor): (skeleton.config.hidden_size,)} if change.biases else {}
        for tensor, wanted in made.items():
            name = skeleton.layer_prefix(number) + tensor
            entry = output.tensors.get(name)
            if entry is None or tuple(entry.shape) != wanted:
                said = "is not there" if entry is None else f"has shape {list(entry.shape)} instead of {list(wanted)}"
                raise CheckpointError(f"{output.path}: {name} {said}; download or copy it again, or prune again")


def _checks(found: dict[str, Any], tokens: list[list[int]], expected: Tensor) -> list[Check]:
    """Compare what the fresh process found with the dense model's tokens and logits [n, seq, vocabulary]."""
    missing, unexpected = found["missing"], found["unexpected"]
    unused = f"; {len(unexpected)} more that the model does not use, as {unexpected[0]}" if unexpected else ""
    weights = f"{len(missing)} missing or of another shape, as {missing[0]}" if missing else f"all matched{unused}"
    same = found["tokens"] == tokens
    said = f"{len(tokens[0])} compared"
    if not same:
        only = "the special ones " if found["tokens"][0] == tokens[0] else ""
        said = f"{only}differ from the dense model's"
    deviation = float((found["logits"] - expected).abs().max())
    steps = f" over {found['steps']} steps"
    return [
        Check(WEIGHTS, not missing, weights),
        Check(TOKENS, same, said),
        _close("logits of the masked dense model", deviation, float(expected.abs().max())),
        _close("generation with and without KV cache", *found["cache"], more=steps),
        _close("generation with left padding", *found["padding"], more=steps),
    ]


def _close(name: str, deviation: float, scale: float, *, more: str = "") -> Check:
    """Passed if `deviation` is within TOLERANCE of `scale`, both maximum absolute values."""
    passed = bool(deviation <= TOLERANCE * max(scale, 1e-6))
    return Check(name, passed, f"off by {deviation:.1e} of {scale:.1f}{more}")


class _Masking:
    """The visitor that makes each layer of the dense model what it is in the output, at full width."""

    def __init__(self, skeleton: Skeleton, output: Checkpoint, change: Change) -> None:
        self.skeleton, self.output, self.change = skeleton, output, change
        self.kept: KeptUnits = skeleton.all_units() if change.kept is None else change.kept
        self.altered, self.zeros, self.crowded = 0, 0, 0

    def visit(self, visit: Visit) -> States:
        """The layer's output."""
        if visit.layer not in self.kept:
            return visit.hidden
        if self.change.kept is None:
            self._take_matrices(visit)
            return visit.run()
        mask_layer(self.skeleton, self.kept, visit.layer, visit.weights)
        with ExitStack() as hooks:
            for member in output_matrices(self.skeleton, visit.layer):
                if self.change.compensated:
                    lines = kept_lines(
                        member, self.skeleton.geometries[visit.layer], self.kept[visit.layer][member.kind]
                    )
                    fitted = self._read(visit.layer, member.tensor).float()
                    visit.weights[member.tensor].index_copy_(member.dim, lines, fitted)
                if self.change.biases:
                    self._add_bias(visit, bias_of(member.tensor), hooks)
            return visit.run()

    def checks(self) -> list[Check]:
        """List the checks of pruned weights: zeros, pattern, and the rest unchanged where the method changes none."""
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
