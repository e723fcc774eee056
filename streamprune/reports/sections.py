"""Sections of a report, each from the facts of a run: HTML, with figures where there is something to see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from streamprune.figures import human
from streamprune.output.card import perplexity_cells, recovery_rows, sizes
from streamprune.reports import charts, page
from streamprune.reports.outputs import KINDS_IN_WORDS, PrunedOutput
from streamprune.reports.speed import ratio_lines, speed_rows

Facts = Mapping[str, Any]
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def result_section(output: PrunedOutput) -> list[str]:
    """Say sizes and perplexity before and after."""
    facts, rows = output.facts, [["", "before", "after"]]
    rows += sizes(facts)
    if output.perplexity:
        rows.append(["perplexity", *perplexity_cells(facts["perplexity"])])
    parts = [page.cells(rows, "sizes and perplexity before and after")]
    shares = [
        (name, facts[name]["after"] / facts[name]["before"], f"{facts[name]['after'] / facts[name]['before']:.1%}")
        for name in ("parameters", "bytes")
    ]
    if output.perplexity:
        before, after = output.perplexity
        shares.append(("perplexity", after / before, f"{after / before:.1%}"))
    words = ", ".join(f"{name} {said}" for name, _, said in shares)
    svg = charts.bars("The pruned model beside the dense one", words, shares)
    lower = "; a lower perplexity is better" * bool(output.perplexity)
    parts.append(page.figure(svg, f"What is left, in per cent of the dense model{lower}."))
    if output.perplexity:
        n, seq = facts["perplexity"]["segments"]
        parts.append(page.paragraph(f"Perplexity is of {n:,} × {seq} tokens: {facts['perplexity']['text']}."))
    else:
        parts.append(page.paragraph("Perplexity was not measured."))
    return parts


def recovery_section(facts: Facts) -> list[str]:
    """Say what a training after pruning has changed; nothing where there was none."""
    if "recovery" not in facts:
        return []
    recovery, rows = facts["recovery"], recovery_rows(facts["recovery"])
    said = [f"{name} {value}" for name, value in recovery["recipe"].items()]
    parts = [page.heading("Trained further"), page.paragraph(f"{recovery['done']}: {', '.join(said)}.")]
    if len(rows) > 1:
        parts.append(page.cells(rows, "loss and perplexity before and after the training"))
    return parts


def widths_section(output: PrunedOutput) -> list[str]:
    """Draw how many units of each kind every layer keeps."""
    if output.kept is None:
        zeros, of = (output.facts["zeros"][name] for name in ("weights", "of"))
        return [page.paragraph(f"All units stay; {zeros:,} of {of:,} weights are zero ({zeros / of:.1%}).")]
    counts, parts = output.counts(), []
    for kind in dict.fromkeys(kind for _, kind in output.kept):
        kept = [counts.get((layer, kind), 0) for layer in range(output.n_layers)]
        scored = [len(scores) for (_, of), scores in (output.scores or {}).items() if of == kind]
        parts.append(_widths_of(KINDS_IN_WORDS[kind], kept, max([*kept, *scored, 1])))
    return parts


def _widths_of(name: str, kept: Sequence[int], most: int) -> str:
    """Draw a column for each layer, before the outline of the widest."""
    x, y = charts.x_axis(-0.5, len(kept) - 0.5), charts.y_axis(0, most)
    columns = []
    for layer, count in enumerate(kept):
        sides = x(layer - 0.4), x(layer + 0.4)
        columns += [charts.rectangle(sides, (y(0), y(most)), "ghost"), charts.rectangle(sides, (y(0), y(count)), "a")]
    words = runs([f"{count:,}" for count in kept])
    svg = charts.plot(f"{name} that each layer keeps", words, x, y, ("layer", name), columns)
    rows = [["layer", f"{name} kept"], *([str(layer), f"{count:,}"] for layer, count in enumerate(kept))]
    keys = [("a", "kept"), ("ghost", "widest layer before")]
    return page.figure(svg, f"{name[0].upper()}{name[1:]} by layer: {words}.", keys, rows)


def scores_section(output: PrunedOutput) -> list[str]:
    """Draw the distribution of each layer's scores, and the cut between what went and what stayed."""
    if output.scores is None or output.kept is None:
        return [page.paragraph("Scores are not kept of single weights, or by older versions.")]
    parts = []
    for kind in dict.fromkeys(kind for _, kind in output.scores):
        of_kind = {layer: values for (layer, of), values in output.scores.items() if of == kind}
        kept = {layer: output.kept.get((layer, kind), frozenset()) for layer in of_kind}
        parts.append(_layer_scores(of_kind, kept) if kind == "layer" else _unit_scores(kind, of_kind, kept))
    return parts


def _layer_scores(values: Mapping[int, Tensor], kept: Mapping[int, frozenset[int]]) -> str:
    """Draw the score of each layer; those that went in another colour."""
    found = {layer: float(each[0]) for layer, each in values.items()}
    x = charts.x_axis(min(found) - 0.5, max(found) + 0.5)
    y = charts.y_axis(min(0.0, *found.values()), max(0.0, *found.values()) or 1.0)
    columns = [
        charts.rectangle((x(layer - 0.4), x(layer + 0.4)), (y(0), y(value)), "a" if kept[layer] else "b")
        for layer, value in found.items()
    ]
    gone = ", ".join(str(layer) for layer in found if not kept[layer]) or "none"
    svg = charts.plot("Scores of layers", f"layers that went: {gone}", x, y, ("layer", "score"), columns)
    rows = [["layer", "score", "what became of it"]]
    rows += [[str(layer), f"{value:.6g}", "kept" if kept[layer] else "gone"] for layer, value in found.items()]
    return page.figure(svg, f"Score of each layer; layers that went: {gone}.", [("a", "kept"), ("b", "gone")], rows)


def _unit_scores(kind: str, values: Mapping[int, Tensor], kept: Mapping[int, frozenset[int]]) -> str:
    """Draw quantiles of each layer's scores with the cut, by their logarithms where none is negative."""
    everything = torch.cat(list(values.values()))
    logarithmic = bool((everything >= 0).all()) and bool((everything > 0).any())
    least = float(everything[everything > 0].min()) if logarithmic else 0.0

    def level(score: float) -> float:
        return math.log10(max(score, least)) if logarithmic else score

    marks = torch.tensor(QUANTILES, dtype=torch.float64)
    quantiles = {layer: each.quantile(marks).tolist() for layer, each in values.items()}
    lowest = {layer: cut for layer in values if (cut := _cut(values[layer], kept[layer])) is not None}
    found = {layer: list(map(level, each)) for layer, each in quantiles.items()}
    cuts = {layer: level(cut) for layer, cut in lowest.items()}
    levels = [each for quantiles in found.values() for each in quantiles] + list(cuts.values())
    x = charts.x_axis(min(found) - 0.5, max(found) + 0.5)
    ends = min(levels), max(levels)
    y = charts.logarithmic_y(*ends) if logarithmic else charts.y_axis(*ends, "{:.3g}".format)
    parts = []
    for layer, (low, lower, middle, upper, high) in found.items():
        sides = x(layer - 0.4), x(layer + 0.4)
        parts += [
            charts.rectangle(sides, (y(low), y(high)), "pale"),
            charts.rectangle(sides, (y(lower), y(upper)), "half"),
        ]
        parts.append(charts.line((sides[0], y(middle)), (sides[1], y(middle)), "axis"))
        if layer in cuts:
            parts.append(charts.line((sides[0], y(cuts[layer])), (sides[1], y(cuts[layer])), "cut"))
    name = KINDS_IN_WORDS[kind]
    words = f"the cut lies in {len(cuts)} of {len(found)} layers" if cuts else "none went, so there is no cut"
    svg = charts.plot(f"Scores of {name}", words, x, y, ("layer", "score"), parts)
    say = "{:.3e}".format if logarithmic else "{:.4g}".format
    rows = [["layer", *(f"{q:.0%}" for q in QUANTILES), "cut"]]
    rows += [[str(n), *map(say, each), say(lowest[n]) if n in lowest else "-"] for n, each in quantiles.items()]
    caption = f"Scores of {name} by layer: the middle half and 90 % of them, the median; {words}."
    return page.figure(svg, caption, [("b", "the cut, the lowest score that stayed")] if cuts else [], rows)


def _cut(scores: Tensor, kept: frozenset[int]) -> float | None:
    """Return the lowest score that stayed, where some went and some stayed."""
    if not kept or len(kept) == len(scores):
        return None
    return float(scores[sorted(kept)].min())


def speed_section(facts: Facts) -> list[str]:
    """Say how fast the output is in use, where that was measured."""
    measured = facts.get("speed")
    if not measured:
        return []
    where = (
        f"One sequence, a prompt of {measured['prompt']} tokens and {measured['new']} more, on {measured['device']}."
    )
    said = [page.paragraph(f"{each}.") for each in ratio_lines(measured)]
    return [page.heading("Speed"), page.paragraph(where), page.cells(speed_rows(measured), "speed and memory"), *said]


def stages_section(facts: Facts) -> list[str]:
    """Say where the seconds went, beside what was foretold."""
    found, total = facts.get("stages"), float(facts["seconds"]["total"])
    if not found:
        return [page.paragraph(f"{total:.1f} s; the version that wrote this output recorded no stages.")]
    rest = max(0.0, total - sum(each["elapsed_seconds"] for each in found))
    rows = [(each["name"], each["elapsed_seconds"], f"{each['elapsed_seconds']:.1f} s") for each in found]
    rows.append(("everything else", rest, f"{rest:.1f} s"))
    words = ", ".join(f"{name} {said}" for name, _, said in rows)
    planned = facts["memory"].get("planned_read", {})
    lines = [["stage", "seconds", "foretold", "read", "planned", "waiting for reads"]]
    for each in found:
        foretold, share = each["predicted_seconds"], each["waiting_share"]
        lines.append(
            [
                each["name"],
                f"{each['elapsed_seconds']:.1f}",
                "-" if foretold is None else f"{foretold:.1f}",
                human(each["bytes_read"]),
                human(planned[each["name"]]) if each["name"] in planned else "-",
                f"{share:.0%}",
            ]
        )
    svg = charts.bars("Where the seconds went", words, rows)
    caption = f"{total:.1f} s in all; everything else is loading, tokens, and choosing what goes."
    return [page.figure(svg, caption), page.cells(lines, "stages of the run")]


def over_time_section(facts: Facts) -> list[str]:
    """Draw memory and traffic over time, against the plan."""
    samples, plan = facts.get("timeline") or {}, facts["memory"]
    if not samples.get("seconds"):
        return [page.paragraph("Not recorded by the version that wrote this output.")]
    total = float(facts["seconds"]["total"])
    of_host, of_gpu = ([(0.0, plan[name]), (total, plan[name])] for name in ("planned_host", "planned_gpu"))
    held = [Series("a", "memory of the process", samples["rss"], of_host)]
    if "gpu" in samples:
        held.append(Series("c", "tensors on the GPU", samples["gpu"], of_gpu))
    read = [Series("a", "read of layers", samples["bytes_read"], _foretold(facts, "planned_read"))]
    if "disk" in samples:
        first = samples["disk"][0]
        from_disk = [None if each is None else each - first for each in samples["disk"]]
        read.append(Series("c", "come from a disk", from_disk, _foretold(facts, "planned_disk")))
    where = " over the link to the GPU" if "gpu" in samples else ""
    return [
        _drawn("Memory over time", "held", samples["seconds"], held, total),
        _drawn(f"Bytes read{where} over time", "read", samples["seconds"], read, total),
        *([page.paragraph("The perplexity after pruning is in no plan.")] if facts.get("perplexity") else []),
    ]


@dataclass(frozen=True)
class Series:
    """Quantity in bytes at the times of the samples, in a colour of the page, and its plan as (seconds, bytes)."""

    colour: str
    name: str
    values: Sequence[float | None]
    plan: Sequence[tuple[float, float]]


def _foretold(facts: Facts, name: str) -> list[tuple[float, float]]:
    """Add up what was planned to be read, at the ends of the stages that it was planned for."""
    planned, points = facts["memory"].get(name, {}), [(0.0, 0.0)]
    for stage in facts["stages"]:
        if stage["name"] in planned:
            points.append((stage["start"], points[-1][1]))
            points.append((stage["start"] + stage["elapsed_seconds"], points[-1][1] + planned[stage["name"]]))
    return points if len(points) > 1 else []


def _drawn(title: str, what: str, seconds: Sequence[float], lines: Sequence[Series], total: float) -> str:
    """Draw quantities over time, each with its plan as a dashed line."""
    everything = [each or 0 for line in lines for each in (*line.values, *(planned for _, planned in line.plan))]
    x, y = charts.x_axis(0, total, "{:g}".format), charts.y_axis(0, 1.05 * max(everything) or 1, human)
    parts, words = [], []
    for line in lines:
        at = [(x(t), y(value)) for t, value in zip(seconds, line.values, strict=True) if value is not None]
        parts.append(charts.curve(at, f"line-{line.colour}"))
        said = f"{line.name} {human(max((value for value in line.values if value is not None), default=0))} at the most"
        if line.plan:
            parts.append(charts.curve([(x(t), y(value)) for t, value in line.plan], f"plan-{line.colour}"))
            said += f", planned {human(line.plan[-1][1])}"
        words.append(said)
    svg = charts.plot(title, "; ".join(words), x, y, ("seconds", what), parts)
    rows = [["seconds", *(line.name for line in lines)]]
    for number, t in enumerate(seconds):
        found = [line.values[number] for line in lines]
        rows.append([f"{t:.1f}", *("-" if value is None else human(value) for value in found)])
    keys = [(line.colour, line.name) for line in lines]
    return page.figure(svg, f"{title}, dashed as planned: {'; '.join(words)}.", keys, rows)


def runs(values: Sequence[str]) -> str:
    """Say values by layer, equal neighbours together: "3 in layers 0 to 3, 2 in layer 4"."""
    said, layer = [], 0
    for value, group in groupby(values):
        count = len(list(group))
        where = f"layer {layer}" if count == 1 else f"layers {layer} to {layer + count - 1}"
        said.append(f"{value} in {where}")
        layer += count
    return ", ".join(said)
