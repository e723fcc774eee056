"""Pictures of a comparison, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from streamprune.errors import UsageError
from streamprune.reports.compare import Comparison, Overlap
from streamprune.reports.outputs import KINDS_IN_WORDS

PICTURES = (".svg", ".png")


def check_drawing(file: Path) -> None:
    """Refuse a picture that cannot be drawn, before there is anything to draw.

    Raises:
        UsageError: another suffix, or matplotlib is not installed.
    """
    if file.suffix not in PICTURES:
        raise UsageError(f"--draw {file}: name a file that ends in {' or '.join(PICTURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError("drawing needs matplotlib: pip install 'streamprune[report]'") from error


def draw(found: Comparison, suffix: str) -> bytes:
    """Draw overlap and correlation of ranks by layer, a line for each kind, as an SVG or a PNG."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text, and the same figures give the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "streamprune"}):
        figure = Figure(figsize=(8, 6), layout="constrained")
        overlap, ranks = figure.subplots(2, 1, sharex=True)
        for kind in dict.fromkeys(row.kind for row in found.layers):
            rows = [row for row in found.layers if row.kind == kind]
            name = KINDS_IN_WORDS[kind]
            (line,) = _plot(overlap, rows, [row.jaccard for row in rows], name)
            _plot(ranks, rows, [float("nan") if row.spearman is None else row.spearman for row in rows], name)
            if (chance := found.by_chance.get(kind)) is not None:
                overlap.axhline(chance, color=line.get_color(), linestyle=":", label=f"{name}, random choices")
        a, b = (each.name or str(each) for each in found.directories)
        overlap.set_title(f"{a} and {b}", parse_math=False)
        overlap.set(ylabel="Jaccard overlap of what stays")
        ranks.set(xlabel="layer", ylabel="Spearman's correlation of scores")
        for axes in (overlap, ranks):
            axes.grid(alpha=0.3)
        overlap.legend()
        drawn = io.BytesIO()
        figure.savefig(drawn, format=suffix.removeprefix("."), dpi=150, metadata=_metadata(suffix))
    return drawn.getvalue()


def _plot(axes: Any, rows: Sequence[Overlap], values: Sequence[float], name: str) -> Any:
    return axes.plot([row.layer for row in rows], values, marker="o", markersize=3, label=name)


def _metadata(suffix: str) -> dict[str, Any]:
    return {"Date": None} if suffix == ".svg" else {"Software": None}
