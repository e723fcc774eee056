"""Hidden states on the device, on the host, and on a scratch disk: what it costs to move them, and what it saves.

    python bench/spill.py --scratch DIR [--device cuda] [--tokens 131072] [--layers 24] [--repeat 5] [--json FILE]

`taylor` over all layers of a random Llama (24 layers: 1.7 billion parameters, 3.4 GB in DIR, removed afterwards) on
sequences of 1024 tokens, a sweep forwards and one backwards; each place has a process of its own. The scores must be
the same bits; on a GPU, whose attention adds up gradients over more than 128 tokens in any order, they may differ from
place to place by as much as from run to run. Beside a CPU, "host" is where they are anyhow and is left out.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file

SEQ_LEN = 1024


def one(job: dict[str, Any]) -> dict[str, Any]:
    """All sweeps with hidden states in one place, in this process."""
    from end_to_end import memory

    from streamprune.methods.sinks import UnitScores
    from streamprune.methods.table import METHODS, resolve_settings
    from streamprune.pipeline.source import Source
    from streamprune.streaming.statistics import Statistics

    device, taken, runs = job["device"], [], []
    with Source(job["model"], device=device, micro_batch=2).open() as sweeper:
        sweeper.place, sweeper.scratch = job["place"], Path(job["scratch"])
        generator = torch.Generator().manual_seed(1)
        shape = (max(1, job["tokens"] // SEQ_LEN), SEQ_LEN)
        ids = torch.randint(0, sweeper.skeleton.config.vocab_size, shape, generator=generator)
        collected = Statistics(sweeper, ids, range(sweeper.n_layers), 0)
        for _ in range(job["repeat"] + 1):  # the first one warms up
            scores = UnitScores(collected.sweeper.skeleton.all_units(collected.layers))
            start = time.perf_counter()
            METHODS["taylor"].score(collected, resolve_settings("taylor", {}), scores)
            values = [each.cpu().double().flatten() for kinds in scores.values.values() for each in kinds.values()]
            taken.append(time.perf_counter() - start)
            runs.append(torch.cat(values))
        boundaries = (sweeper.n_layers + 1) * ids.numel() * sweeper.skeleton.config.hidden_size * 2
    save_file({"first": runs[0], "second": runs[1]}, job["scores"])
    return {"seconds": statistics.median(taken[1:]), "boundaries": boundaries, **memory(device)}


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """‖a − b‖ / ‖b‖."""
    return float((one - other).norm() / other.norm())


@click.command()
@click.option("--scratch", type=click.Path(path_type=Path), help="Directory with 20 GB free.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--tokens", type=click.IntRange(SEQ_LEN), default=128 * SEQ_LEN, show_default=True)
@click.option("--layers", type=click.IntRange(2), default=24, show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--one", "job", hidden=True)
def main(
    scratch: Path | None,
    device: str,
    tokens: int,
    layers: int,
    repeat: int,
    json_file: Path | None,
    job: str | None,
) -> None:
    """Measure, print the table, and write JSON."""
    sys.path.insert(0, str(Path(__file__).parent))
    if job is not None:
        print(json.dumps(one(json.loads(job))))
        return
    if scratch is None:
        raise click.UsageError("--scratch is missing")
    from end_to_end import make_model

    from streamprune.figures import human, table

    scratch.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="spill-", dir=scratch.absolute()))
    places = ("device", "host", "scratch") if device == "cuda" else ("device", "scratch")
    given = {"model": str(directory / "model"), "scratch": str(directory), "device": device}
    given |= {"tokens": tokens, "repeat": repeat}
    figures: dict[str, Any] = {}
    runs: dict[str, dict[str, torch.Tensor]] = {}
    try:
        make_model(directory / "model", layers)
        for place in places:
            scores = directory / f"{place}.safetensors"
            job_of = {**given, "place": place, "scores": str(scores)}
            command = [sys.executable, __file__, "--one", json.dumps(job_of)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            figures[place] = json.loads(done.stdout.splitlines()[-1])
            runs[place] = load_file(scores)
            first, second = runs[place]["first"], runs[place]["second"]
            between = difference(first, runs["device"]["first"])
            figures[place] |= {"from_device": between, "from_itself": difference(second, first)}
            print(place, figures[place], file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    rows = [["hidden states", "seconds", "of device's", "peak RSS", "peak GPU", "scores differ", "in a second run"]]
    for place, row in figures.items():
        ratio = row["seconds"] / figures["device"]["seconds"]
        peaks = [human(row["peak_rss"]), human(row["peak_gpu"]) if "peak_gpu" in row else "-"]
        differences = [f"{row[name]:.1e}" for name in ("from_device", "from_itself")]
        rows.append([place, f"{row['seconds']:.2f}", f"{ratio:.2f}", *peaks, *differences])
    held = human(figures["device"]["boundaries"])
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {device}, {tokens} tokens, {layers} layers: {held}\n")
    print(table(rows, markdown=True))
    between, within = (max(row[name] for row in figures.values()) for name in ("from_device", "from_itself"))
    print(f"\n{'met' if between <= 3 * within else 'WRONG'}: scores differ by place at most three times as by run")
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
