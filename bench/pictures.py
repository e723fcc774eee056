"""The pictures of the README and of docs/, drawn from the figures in results/.

    python bench/pictures.py

Writes docs/memory.svg (13 billion parameters pruned within a budget) and docs/quality.svg (perplexity against what was
removed): plain SVG of the standard library, on a page of its own in light and in dark mode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from math import log
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
STYLE = """
    .page { fill: #ffffff } .ink { fill: #1f2328 } .soft { fill: #59636e; font-size: 12px }
    .grid { stroke: #d1d9e0 } .limit { stroke: #cf222e; stroke-width: 2; stroke-dasharray: 4 3 }
    @media (prefers-color-scheme: dark) {
      .page { fill: #0d1117 } .ink { fill: #e6edf3 } .soft { fill: #9198a1 }
      .grid { stroke: #3d444d } .limit { stroke: #f85149 }
    }
"""
# Of a middle brightness: they can be told apart on white and on black.
BLUE, ORANGE, GREEN, PURPLE, RED, GREY = "#3b7dd8", "#d9822b", "#2f9e6e", "#9a67d6", "#d1495b", "#8a8f98"
CYAN = "#12a5bb"
# (file of results, name of the run) of bench/larger.py
LARGER = (
    ("larger.json", "two CPU cores, 6 GiB of memory"),
    ("larger-h100-6GiB.json", "H100, 6 GiB of GPU memory"),
    ("larger-h100.json", "H100, 22 GiB of GPU memory"),
)
METHODS = {"random": GREY, "taylor": BLUE, "moreau-gs": PURPLE, "wanda-sp": ORANGE, "flap": GREEN, "gblm": RED}
METHODS |= {"thinet": CYAN}  # measured on a CPU
RATIOS = (20, 30, 40, 50)
TEXT = "test 128"  # 100 segments of 128 tokens of WikiText-2's test split


def results(name: str) -> Any:
    """A file of figures."""
    return json.loads((RESULTS / name).read_text())


def svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    """A picture of `parts`, in pixels."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img"'
    page = f'<rect class="page" width="{width}" height="{height}" rx="6"/>'
    body = "\n  ".join((f"<title>{escape(title)}</title>", f"<style>{STYLE}  </style>", page, *parts))
    return f'{head} font-family="system-ui, sans-serif" font-size="14">\n  {body}\n</svg>\n'


def text(x: float, y: float, words: str, kind: str = "ink", anchor: str = "start", colour: str = "") -> str:
    """Words at a place; `colour` takes the place of that of their kind."""
    fill = f' style="fill: {colour}"' if colour else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{fill}>{escape(words)}</text>'


def bar(x: float, y: float, width: float, colour: str) -> str:
    """A bar of 18 pixels."""
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="18" rx="2" fill="{colour}"/>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def memory() -> str:
    """Memory and time of 13 billion parameters: what the weights take, what runs were allowed, took and how long."""
    runs = [(name, results(file)) for file, name in LARGER]
    parameters = runs[0][1]["checkpoint_bytes"] / 2  # all of it is bfloat16
    left, scale = 250, 480 / (4 * parameters)
    parts = [text(20, 30, f"Pruning {parameters / 1e9:.0f} billion parameters: memory at the most")]
    y = 46
    for name, size in (("the weights in float32", 4 * parameters), ("the weights in bfloat16", 2 * parameters)):
        label = text(left + size * scale + 8, y + 14, f"{size / 1e9:.1f} GB")
        parts += [text(20, y + 14, name, "soft"), bar(left, y, size * scale, GREY), label]
        y += 28
    for name, run in runs:
        limit = run["gpu_limit"] or run["limit"]
        peak = run["scoring"]["peak_gpu"] if run["gpu_limit"] else run["peak_rss"]
        parts += [text(20, y + 14, name, "soft"), bar(left, y, peak * scale, BLUE)]
        parts.append(line(left + limit * scale, y - 3, left + limit * scale, y + 21, "limit"))
        parts.append(text(left + limit * scale + 8, y + 14, f"{peak / 1e9:.2f} GB of {limit / 1e9:.2f} GB allowed"))
        y += 28
    y += 24
    parts.append(text(20, y, "and seconds"))
    parts += [bar(left, y - 14, 18, BLUE), text(left + 24, y, "scoring", "soft")]
    parts += [bar(left + 90, y - 14, 18, ORANGE), text(left + 114, y, "writing", "soft")]
    parts += [bar(left + 180, y - 14, 18, GREY), text(left + 204, y, "the rest", "soft")]
    y += 14
    scale = 480 / runs[0][1]["seconds"]
    for name, run in runs:
        stages, x = run["stage_seconds"], float(left)
        steps = [stages["scoring moreau-gs"], stages["writing"]]
        for seconds, colour in zip([*steps, run["seconds"] - sum(steps)], (BLUE, ORANGE, GREY), strict=True):
            parts.append(bar(x, y, seconds * scale, colour))
            x += seconds * scale
        parts += [text(20, y + 14, name, "soft"), text(x + 8, y + 14, f"{run['seconds']:.0f} s")]
        y += 28
    return svg(860, y + 8, "Memory and time of pruning 13 billion parameters within a budget", parts)


def spread(places: Mapping[str, float], gap: float) -> dict[str, float]:
    """The places of labels, moved down where the one above is nearer than `gap`, and all back by half of the last."""
    moved: dict[str, float] = {}
    last = -gap
    for name in sorted(places, key=lambda name: places[name]):
        last = moved[name] = max(places[name], last + gap)
    return {name: y - (last - max(places.values())) / 2 for name, y in moved.items()}


def quality() -> str:
    """Perplexity against the ratio, on a logarithmic scale, without the repair and with it.

    Random units without the repair are off it.
    """
    measured = results("policy-float32.json") | results("quality-h100.json")
    low, high, top, bottom = 50.0, 300.0, 60, 380

    def height(perplexity: float) -> float:
        return bottom - (bottom - top) * log(perplexity / low) / log(high / low)

    parts = []
    for left, title, suffix in ((60, "as pruned", ""), (480, "with --compensate", " compensated")):
        parts.append(text(left, 30, f"perplexity, {title}"))
        for perplexity in (50, 70, 100, 150, 200, 300):
            parts.append(line(left, height(perplexity), left + 270, height(perplexity), "grid"))
            parts.append(text(left - 6, height(perplexity) + 4, str(perplexity), "soft", "end"))
        for ratio in RATIOS:
            parts.append(text(left + 8.5 * (ratio - 20), bottom + 20, f"{ratio} %", "soft", "middle"))
        ends = {}
        shown = {method: colour for method, colour in METHODS.items() if suffix or method != "random"}
        for method, colour in shown.items():
            rows = measured[f"units/{method}/0"]
            points = [
                (left + 8.5 * (ratio - 20), height(rows[f"{ratio}%{suffix}"]["perplexity"][TEXT])) for ratio in RATIOS
            ]
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
            ends[method] = points[-1][1]
        for method, y in spread(ends, 15).items():
            parts.append(text(left + 277, y + 5, method, colour=METHODS[method]))
    parts.append(text(60, bottom + 42, "part of the units of layers 4 to 27 that is removed", "soft"))
    return svg(860, bottom + 56, "Perplexity of SmolLM2-135M pruned by seven methods, without and with repair", parts)


PICTURES = {"memory.svg": memory, "quality.svg": quality}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (DOCS / name).write_text(draw(), encoding="utf-8")
