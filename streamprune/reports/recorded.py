"""Speed of an output on its card and in its streamprune.json."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from streamprune.figures import table
from streamprune.reports.outputs import read_output
from streamprune.reports.speed import Speeds, ratio_lines, speed_rows
from streamprune.storage.directory import OWN_FILE, write_whole

HEADING = "## Speed\n"


def record_speed(directory: Path, measured: Speeds) -> None:
    """Write speeds into streamprune.json, and as a section of README.md, in the place of earlier ones.

    Raises:
        CheckpointError: no output of streamprune. OutputError: it cannot be written to.
    """
    found, speeds = read_output(directory), asdict(measured)
    text = json.dumps({**found.facts, "speed": speeds}, indent=2, ensure_ascii=False) + "\n"
    card = directory / "README.md"
    if card.is_file():
        said = card.read_text(encoding="utf-8", errors="surrogateescape")
        before, _, earlier = said.partition(f"\n{HEADING}")
        _, mark, after = earlier.partition("\n## ")  # whatever somebody wrote behind it stays
        where = f"One sequence, a prompt of {measured.prompt} tokens and {measured.new} more, on {measured.device}:"
        lines = [
            before.rstrip(),
            "",
            HEADING,
            where,
            "",
            table(speed_rows(speeds), markdown=True),
            "",
            *ratio_lines(speeds),
        ]
        lines += ["", f"## {after.rstrip()}"] if mark else []
        write_whole(card, ("\n".join(lines) + "\n").encode("utf-8", errors="surrogateescape"))
    write_whole(directory / OWN_FILE, text.encode("utf-8", errors="backslashreplace"))
