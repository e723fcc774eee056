"""Wall time and memory of calibration sequences out of a long text, in every format.

    python bench/texts.py --scratch DIR [--bytes 1000000000] [--json FILE]

Makes a text of paragraphs of the embedded prose in random order, writes it in one format after another into DIR, and
takes 128 sequences of 2048 tokens from it in a fresh process each. Memory is what that takes beside the tokenizer.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

SAMPLES, SEQ_LEN = 128, 2048


def paragraphs(nbytes: int) -> Iterator[str]:
    """Prose of so many bytes."""
    from streamprune.texts.documents import embedded_text

    parts = [part for part in embedded_text("calibration").split("\n\n") if len(part) > 100]
    choose, written = random.Random(0), 0
    while written < nbytes:
        part = choose.choice(parts)
        written += len(part.encode()) + 1
        yield part


def write_prose(file: Any, nbytes: int) -> None:
    """A paragraph in every line."""
    file.writelines(part.replace("\n", " ") + "\n" for part in paragraphs(nbytes))


def write_lines(file: Any, nbytes: int) -> None:
    """A record in every line."""
    file.writelines(json.dumps({"text": part}) + "\n" for part in paragraphs(nbytes))


def write_array(file: Any, nbytes: int) -> None:
    """An array of records."""
    for number, part in enumerate(paragraphs(nbytes)):
        file.write((",\n" if number else "[\n") + json.dumps({"text": part}))
    file.write("\n]\n")


def write_table(file: Any, nbytes: int) -> None:
    """Rows of a number and a text."""
    csv.writer(file).writerows([["number", "text"], *enumerate(paragraphs(nbytes))])


FORMATS: dict[str, Callable[[Any, int], None]] = {
    "text.txt": write_prose,
    "text.jsonl": write_lines,
    "text.json": write_array,
    "text.csv": write_table,
    "text.txt.gz": write_prose,
    "text.jsonl.gz": write_lines,
}


def memory(name: str) -> int:
    """Bytes of this process by the name of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def one(model: str, file: str, sampling: str) -> dict[str, float]:
    """Seconds, and bytes beyond what there was before, of one text in this process."""
    from streamprune.texts.corpus import Corpus
    from streamprune.texts.sources import open_documents
    from streamprune.texts.tokenizer import beginning, load_tokenizer

    tokenizer = load_tokenizer(Path(model))
    tokenizer("its first call takes memory of its own")
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    before, start = memory("VmRSS"), time.perf_counter()
    corpus = Corpus(open_documents(file), tokenizer, beginning(tokenizer, "auto"))
    ids = corpus.sequences(SAMPLES, SEQ_LEN, sampling, 0)
    assert ids.shape == (SAMPLES, SEQ_LEN)
    return {"seconds": time.perf_counter() - start, "memory": max(0, memory("VmHWM") - before)}


@click.command()
@click.option("--scratch", type=click.Path(path_type=Path, exists=True), help="Directory with room for the text.")
@click.option("--bytes", "nbytes", type=int, default=1_000_000_000, show_default=True, help="Of the text.")
@click.option("--model", type=click.Path(path_type=Path), help="By default the demo's, fetched if need be.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--one", "one_job", hidden=True)
def main(scratch: Path | None, nbytes: int, model: Path | None, json_file: Path | None, one_job: str | None) -> None:
    """Measure, print the table, and write JSON."""
    if one_job:
        print(json.dumps(one(*json.loads(one_job))))
        return
    if scratch is None:
        raise click.UsageError("--scratch is needed")
    from streamprune.commands import demo
    from streamprune.figures import human, table
    from streamprune.pipeline.progress import Progress
    from streamprune.planning.rates import default_cache

    path = str(model or demo.fetch(default_cache(), Progress()))
    figures, rows = [], [["file", "size", "sampling", "seconds", "memory"]]
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        for name, write in FORMATS.items():
            file = Path(directory) / name
            with gzip.open(file, "wt", 1) if name.endswith(".gz") else file.open("w", newline="") as stream:
                write(stream, nbytes)
            for sampling in ("random", "first"):
                job = json.dumps([path, str(file), sampling])
                done = subprocess.run(
                    [sys.executable, __file__, "--one", job], capture_output=True, text=True, check=True
                )
                result = json.loads(done.stdout) | {"file": name, "bytes": file.stat().st_size, "sampling": sampling}
                figures.append(result)
                size, held = human(result["bytes"]), human(result["memory"])
                rows.append([name, size, sampling, f"{result['seconds']:.1f}", held])
            file.unlink()
            click.echo(table(rows, markdown=True), err=True)
    click.echo(table(rows, markdown=True))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
