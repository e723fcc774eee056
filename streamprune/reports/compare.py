"""Comparison of two runs by what they left: kept units or weights, scores, perplexity, recipe."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from streamprune.config import PruneConfig
from streamprune.errors import UsageError
from streamprune.figures import table
from streamprune.reports.outputs import KINDS_IN_WORDS, PrunedOutput, read_output
from streamprune.reports.ranks import spearman
from streamprune.schema import options_of
from streamprune.storage.journal import Key

NOT_COMPARED = ("max_shard_size", "field", "trust_remote_code")  # they decide which bytes come out, and not what stays


@dataclass(frozen=True)
class Overlap:
    """Overlap of what two runs kept of the same units: of a layer's, or of all layers'.

    Attributes:
        layer: None for all of them together.
        kind: "kv_group", "channel", "layer" where whole layers went, or "weight": of those the ones that are not 0.
        units: units of the dense model; None where neither run has scores and both lost some.
        kept: how many each of the two kept. common: how many both did.
        spearman: correlation of the ranks of the scores; None where there are no two scores that differ.
    """

    layer: int | None
    kind: str
    units: int | None
    kept: tuple[int, int]
    common: int
    spearman: float | None

    @property
    def only(self) -> tuple[int, int]:
        """Units that the first run kept and the second did not, and the other way round."""
        return self.kept[0] - self.common, self.kept[1] - self.common

    @property
    def jaccard(self) -> float:
        """Share of what either kept that both did: |A ∩ B| / |A ∪ B|; 1 where neither kept any."""
        either = sum(self.kept) - self.common
        return self.common / either if either else 1.0


@dataclass(frozen=True)
class Comparison:
    """Comparison of two runs.

    Attributes:
        directories: of the two. granularity: what both removed; of weights the pattern of the first.
        layers: by kind and layer, of the layers that either could prune. totals: of all of these, by kind.
        by_chance: by kind the Jaccard overlap of two random choices of as many units in each layer, in expectation of
            what is common; nothing of kinds whose number is not known.
        perplexity: of the two as they are, where both measured it; `same_text`: on the same tokens.
        recipe: options and sources that differ, by name.
    """

    directories: tuple[Path, Path]
    granularity: str
    layers: tuple[Overlap, ...]
    totals: tuple[Overlap, ...]
    by_chance: Mapping[str, float]
    perplexity: tuple[float, float] | None
    same_text: bool
    recipe: Mapping[str, tuple[Any, Any]]

    @property
    def text(self) -> str:
        """Tables for people."""
        return "\n".join(_lines(self))

    def to_json(self) -> dict[str, Any]:
        """Make what `--json` writes."""
        fields = asdict(self) | {"directories": [str(each) for each in self.directories]}
        for name in ("layers", "totals"):
            fields[name] = [asdict(each) | {"jaccard": each.jaccard} for each in getattr(self, name)]
        return fields


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Comparison:
    """Compare the outputs of two runs of one model, or of copies of it in other dtypes.

        print(compare("pruned-bf16", "pruned-fp16").text)

    Raises:
        CheckpointError: one is no output of streamprune.
        UsageError: they cannot be compared: of models of other shapes, or other things were removed.
    """
    one, other = read_output(Path(a)), read_output(Path(b))
    if one.kept is None and other.kept is None:
        rows = tuple(_overlaps_of_weights(one, other))
    else:
        rows = tuple(_overlaps(one, other, _common_sizes(one, other)))
    kinds = dict.fromkeys(row.kind for row in rows)
    by_kind = {kind: [row for row in rows if row.kind == kind] for kind in kinds}
    totals = {kind: _total(of_kind, one, other) for kind, of_kind in by_kind.items()}
    # Units are chosen within a layer, layers among all of them.
    chances = {kind: _by_chance([totals[kind]] if kind == "layer" else of_kind) for kind, of_kind in by_kind.items()}
    measured = None
    if one.now and other.now:
        measured = one.now[0], other.now[0]
    return Comparison(
        (one.path, other.path),
        one.granularity,
        rows,
        tuple(totals.values()),
        {kind: chance for kind, chance in chances.items() if chance is not None},
        measured,
        one.now is not None and other.now is not None and one.now[1] == other.now[1],
        dict(_differing(one, other)),
    )


def _common_sizes(a: PrunedOutput, b: PrunedOutput) -> dict[Key, int]:
    """Count the units of the dense model in each layer and kind, where either knows it.

    Raises:
        UsageError: the two have no units in common; it names what they differ in.
    """

    refuse = partial(_refuse, a, b)
    refuse("as its granularity", a.granularity, b.granularity)
    refuse("layers", a.n_layers, b.n_layers)
    of_a, of_b = _sizes(a), _sizes(b)
    for layer, kind in sorted(of_a.keys() & of_b.keys()):
        refuse(f"{KINDS_IN_WORDS[kind]} in layer {layer}", of_a[layer, kind], of_b[layer, kind])
    refuse("parameters before pruning", *_parameters(a, b))
    return of_a | of_b


def _refuse(a: PrunedOutput, b: PrunedOutput, what: str, of_a: object, of_b: object) -> None:
    if of_a != of_b:
        raise UsageError(f"{a.path} has {of_a} {what}, {b.path} {of_b}; give runs of one model that removed the same")


def _parameters(*outputs: PrunedOutput) -> list[str]:
    return [f"{each.read(lambda facts: int(facts['parameters']['before'])):,}" for each in outputs]


def _overlaps_of_weights(a: PrunedOutput, b: PrunedOutput) -> Iterator[Overlap]:
    """Compare where the weights of each layer's matrices are not 0; a matrix of each is in memory at a time."""
    from streamprune.pipeline.source import Source

    _refuse(a, b, "parameters before pruning", *_parameters(a, b))
    with ExitStack() as stack:
        of_a, of_b = (
            stack.enter_context(Source(str(each.path), decompress=True, planned=torch.device("cpu")).open()).skeleton
            for each in (a, b)
        )
        _refuse(a, b, "as its model_type", of_a.family.model_type, of_b.family.model_type)
        _refuse(a, b, "layers", len(of_a.layers), len(of_b.layers))
        for layer in sorted({*a.layers, *b.layers}):
            units = kept_a = kept_b = common = 0
            for name in of_a.matrices(layer):
                one, other = (of.checkpoint.read(of.entries[layer][name].name) != 0 for of in (of_a, of_b))
                _refuse(a, b, f"of {name} in layer {layer}", tuple(one.shape), tuple(other.shape))
                units, kept_a, kept_b = units + one.numel(), kept_a + int(one.sum()), kept_b + int(other.sum())
                common += int((one & other).sum())
            yield Overlap(layer, "weight", units, (kept_a, kept_b), common, None)


def _sizes(output: PrunedOutput) -> dict[Key, int]:
    """Count the units that there were: by the scores; outside the prunable layers all are there still."""
    scored = {key: len(scores) for key, scores in (output.scores or {}).items()}
    left = {key: 1 if key[1] == "layer" else count for key, count in output.counts().items()}
    return scored | {key: count for key, count in left.items() if key[1] == "layer" or key[0] not in output.layers}


def _overlaps(a: PrunedOutput, b: PrunedOutput, sizes: Mapping[Key, int]) -> Iterator[Overlap]:
    """Compare each kind in each layer that either could prune."""
    assert a.kept is not None and b.kept is not None, "refused otherwise"
    for key in sorted(a.kept.keys() | b.kept.keys(), key=lambda key: (list(KINDS_IN_WORDS).index(key[1]), key[0])):
        layer, kind = key
        if layer in a.layers or layer in b.layers:
            of_a, of_b = (each.kept.get(key, frozenset()) for each in (a, b) if each.kept is not None)
            kept, common = (len(of_a), len(of_b)), len(of_a & of_b)
            yield Overlap(layer, kind, sizes.get(key), kept, common, _correlation([key], a, b))


def _total(rows: Sequence[Overlap], a: PrunedOutput, b: PrunedOutput) -> Overlap:
    """Add up the rows of one kind; their scores are compared across the layers."""
    kept = sum(row.kept[0] for row in rows), sum(row.kept[1] for row in rows)
    known = [row.units for row in rows if row.units is not None]
    units = sum(known) if len(known) == len(rows) else None
    keys = [(row.layer, row.kind) for row in rows if row.layer is not None]
    return Overlap(None, rows[0].kind, units, kept, sum(row.common for row in rows), _correlation(keys, a, b))


def _correlation(keys: Sequence[Key], a: PrunedOutput, b: PrunedOutput) -> float | None:
    """Correlate the ranks of all scores of these layers and kinds that both have."""
    if a.scores is None or b.scores is None:
        return None
    both = [key for key in keys if key in a.scores and key in b.scores]
    if not both:
        return None
    return spearman(torch.cat([a.scores[key] for key in both]), torch.cat([b.scores[key] for key in both]))


def _by_chance(rows: Sequence[Overlap]) -> float | None:
    """Compute the overlap of random choices of as many: of a and b of n units, a b / n are common in expectation."""
    common = 0.0
    for row in rows:
        if row.units is None:
            return None
        common += row.kept[0] * row.kept[1] / row.units if row.units else 0.0
    either = sum(sum(row.kept) for row in rows) - common
    return common / either if either else 1.0


def _differing(a: PrunedOutput, b: PrunedOutput) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """Yield what the two runs were given, or had, that differs."""
    recipes = a.read(_recipe), b.read(_recipe)
    for name in dict.fromkeys([*recipes[0], *recipes[1]]):
        values = recipes[0].get(name), recipes[1].get(name)
        if values[0] != values[1]:
            yield name, values


def _recipe(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Choose what decides an output: options, a method's numbers, texts, source, a training after it, versions."""
    options = facts["options"]
    names = [name for name, said in options_of(PruneConfig).items() if said.changes_bytes and name not in NOT_COMPARED]
    recipe = {name: options.get(name) for name in names if name != "settings"}
    recipe["layers"] = "{}:{}".format(*facts["layers"])  # what it came to
    recipe |= {f"{name} of the method": value for name, value in options["settings"].items()}
    recipe["calibration tokens"] = str(facts["scoring"].get("sha256_of_calibration_ids"))[:12]
    recipe["source tensors"] = str(facts["source"]["sha256_of_tensors"])[:12]
    if "recovery" in facts:
        recipe["training"] = facts["recovery"]["done"]
        recipe |= {f"{name} of the training": value for name, value in facts["recovery"]["recipe"].items()}
    return recipe | {f"{name} version": value for name, value in facts["versions"].items()}


def _lines(found: Comparison) -> Iterator[str]:
    """Say a comparison: what was given, what stays, what came of it."""
    names = [str(each) for each in found.directories]
    if found.recipe:
        yield table([["recipe", "A", "B"], *([name, *map(str, both)] for name, both in found.recipe.items())])
    else:
        yield "the recipes are the same"
    head = ["kind", "layer", "units", "kept A", "kept B", "only A", "only B", "Jaccard", "Spearman"]
    yield ""
    yield table([head, *(_cells(row) for row in (*found.layers, *found.totals))])
    yield ""
    yield f"A is {names[0]}, B is {names[1]}"
    for kind, chance in found.by_chance.items():
        yield f"two random choices of as many {KINDS_IN_WORDS[kind]} would overlap by {chance:.3f}"
    if found.perplexity is not None:
        a, b = found.perplexity
        text = "" if found.same_text else ", on different texts"
        yield f"perplexity {a:.2f} and {b:.2f}, {b / a - 1:+.2%}{text}"


def _cells(row: Overlap) -> list[str]:
    layer = "all" if row.layer is None else str(row.layer)
    units = "-" if row.units is None else f"{row.units:,}"
    counts = [f"{count:,}" for count in (*row.kept, *row.only)]
    ranks = "-" if row.spearman is None else f"{row.spearman:.4f}"
    return [row.kind, layer, units, *counts, f"{row.jaccard:.4f}", ranks]
