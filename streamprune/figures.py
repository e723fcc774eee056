"""Numbers as people read them: bytes with units, peaks of memory, tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path


def human(nbytes: float) -> str:
    """Write a number of bytes in decimal units: 1.23 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def number_of(count: int, what: str) -> str:
    """Write a count with its noun: 1 step, 1,200 steps."""
    return f"{count:,} {what}{'s' * (count != 1)}"


def peak_rss() -> int:
    """Bytes of the process's largest resident set so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def say_peaks(peaks: Mapping[str, float]) -> str:
    """Say the peaks of memory that `peaks()` gives, in bytes: "1.23 GB", or "1.23 GB (GPU 2.34 GB)"."""
    gpu = f" (GPU {human(peaks['peak_gpu'])})" if "peak_gpu" in peaks else ""
    return human(peaks["peak_rss"]) + gpu


def table(rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Draw a table of aligned columns, the first row being its header; columns of numbers are aligned right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = [all(_is_number(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        return f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()

    rule = [("-" * (w - 1) + ":") if n else "-" * w for w, n in zip(widths, numeric, strict=True)]
    rule_line = f"| {' | '.join(rule)} |" if markdown else "  ".join("-" * w for w in widths)
    return "\n".join([line(rows[0]), rule_line, *(line(row) for row in rows[1:])])


def _is_number(text: str) -> bool:
    return bool(text) and (text[0].isdigit() or text[0] in "-+.∞")
