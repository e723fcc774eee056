"""Depth: seconds of a sweep grow with the number of layers, peak memory does not.

    python bench/scaling.py --scratch DIR [--layers 6 --layers 12 --layers 24 --layers 48] [--repeat 5] [--json FILE]

Random bfloat16 Llamas of one layer shape (33.6 MB each) and several depths. `taylor` scores the units of all layers on
10 x 128 tokens: one sweep forwards and one backwards, each time in a fresh process. Their input stays in memory between
the two for every layer, so it is measured twice: with these hidden states in memory, where they are what grows, and
with them on the disk. One depth is on the disk at a time, so depths do not take turns; repetitions and places do, and
the files are in the page cache. Medians of seconds, the largest peak.

Least squares over the depths then say whether seconds are a line (R², and seconds per layer of the deepest and the
shallowest model), and what a layer more takes in memory beside its hidden states. Of a layer's own bytes that may be
2 %: a layer's modules on meta, the entries of its tensors, its scores, and what allocators make of it.
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
from typing import Any, Literal

import click
import torch

SAMPLES, SEQ_LEN = 10, 128
PLACES = {"device": "in memory", "scratch": "on disk"}
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 64,
    "vocab_size": 8192,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
DRY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
DRY |= {"vocab_size": 1024}
# What is held to be flat, and to be a line.
MEMORY_SLOPE, R_SQUARED, PER_LAYER, READ = 0.02, 0.99, 1.10, 2.02


def one(path: Path, place: Literal["device", "scratch"]) -> dict[str, Any]:
    """A pair of sweeps in this process."""
    from streamprune.figures import peak_rss
    from streamprune.methods.sinks import UnitScores
    from streamprune.methods.table import METHODS, resolve_settings
    from streamprune.pipeline.source import Source
    from streamprune.streaming.statistics import Statistics
    from streamprune.streaming.sweeper import default_micro_batch

    with Source(str(path), device="cpu", micro_batch=default_micro_batch(SEQ_LEN)).open() as sweeper:
        sweeper.place, sweeper.scratch = place, path.parent
        checkpoint, vocabulary = sweeper.skeleton.checkpoint, sweeper.skeleton.config.vocab_size
        ids = torch.randint(0, vocabulary, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(1))
        statistics = Statistics(sweeper, ids, range(sweeper.n_layers), 0)
        scores = UnitScores(statistics.sweeper.skeleton.all_units(statistics.layers))
        read, start = checkpoint.bytes_read, time.perf_counter()
        METHODS["taylor"].score(statistics, resolve_settings("taylor", {}), scores)
        return {
            "seconds": time.perf_counter() - start,
            "peak_rss": peak_rss(),
            "bytes_read": checkpoint.bytes_read - read,
            "layer_bytes": sweeper.pager.layer_bytes(),
            "checkpoint_bytes": checkpoint.nbytes,
            "hidden_bytes": ids.numel() * sweeper.skeleton.config.hidden_size * sweeper.skeleton.dtype.itemsize,
            "checksum": sum(float(v.sum()) for kinds in scores.values.values() for v in kinds.values()),
        }


def measure(path: Path, layers: int, repeat: int) -> list[dict[str, Any]]:
    """A row per place of the hidden states: runs in turn, the median of seconds, the largest peak."""
    runs: dict[str, list[dict[str, Any]]] = {place: [] for place in PLACES}
    for _ in range(repeat):
        for place in PLACES:
            command = [sys.executable, __file__, "--scratch", str(path), "--one", place]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            runs[place].append(json.loads(done.stdout.splitlines()[-1]))
            print(f"  {layers} layers, {place}: {runs[place][-1]['seconds']:.1f} s", file=sys.stderr)
    sums = {run["checksum"] for of_place in runs.values() for run in of_place}
    if len(sums) > 1:
        raise SystemExit(f"{layers} layers: the runs do not compute the same scores: {sums}")
    return [
        {
            **of_place[-1],
            "layers": layers,
            "place": place,
            "seconds": statistics.median(run["seconds"] for run in of_place),
            "peak_rss": max(run["peak_rss"] for run in of_place),
            "all_seconds": [run["seconds"] for run in of_place],
        }
        for place, of_place in runs.items()
    ]


def show(rows: list[dict[str, Any]]) -> str:
    """The table that is printed."""
    from streamprune.figures import human, table

    lines = [["layers", "checkpoint", "hidden states", "peak RSS", "seconds", "per layer", "read/layers' bytes"]]
    for row in rows:
        lines.append(
            [
                str(row["layers"]),
                human(row["checkpoint_bytes"]),
                PLACES[row["place"]],
                human(row["peak_rss"]),
                f"{row['seconds']:.2f}",
                f"{row['seconds'] / row['layers']:.3f}",
                f"{row['bytes_read'] / row['layer_bytes']:.3f}",
            ]
        )
    return table(lines, markdown=True)


def fits(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Lines over the depths by least squares, for each place of the hidden states.

    "more" is what a layer takes in memory beside the hidden states that stay there, as a share of its bytes.
    """
    lines = {}
    for place in PLACES:
        own = [row for row in rows if row["place"] == place]
        depths = [float(row["layers"]) for row in own]
        slope, intercept = statistics.linear_regression(depths, [row["seconds"] for row in own])
        memory, _ = statistics.linear_regression(depths, [float(row["peak_rss"]) for row in own])
        hidden = own[0]["hidden_bytes"] if place == "device" else 0
        lines[place] = {
            "seconds_per_layer": slope,
            "seconds_beside": intercept,
            "r_squared": statistics.correlation(depths, [row["seconds"] for row in own]) ** 2,
            "per_layer_ratio": own[-1]["seconds"] / depths[-1] / (own[0]["seconds"] / depths[0]),
            "memory_per_layer": memory,
            "hidden_per_layer": hidden,
            "more": (memory - hidden) * own[0]["layers"] / own[0]["layer_bytes"],
            "read": max(row["bytes_read"] / row["layer_bytes"] for row in own),
        }
    return lines


def verdicts(lines: dict[str, dict[str, float]]) -> str:
    """The lines, the targets, and whether they are met."""
    from streamprune.figures import human

    said = []
    for place, line in lines.items():
        said.append(
            f"hidden states {PLACES[place]}: {line['seconds_beside']:.2f} s + {line['seconds_per_layer']:.3f} s per "
            f"layer, R² {line['r_squared']:.5f}; {human(line['memory_per_layer'])} per layer, of which "
            f"{human(line['hidden_per_layer'])} hidden states, {line['more']:.2%} of a layer's bytes more"
        )
        checks = {
            f"memory per layer beside hidden states <= {MEMORY_SLOPE:.0%} of its bytes": line["more"] <= MEMORY_SLOPE,
            f"R² of seconds over layers >= {R_SQUARED}": line["r_squared"] >= R_SQUARED,
            f"seconds per layer, deepest / shallowest <= {PER_LAYER:.2f}": line["per_layer_ratio"] <= PER_LAYER,
            f"bytes read / layers' bytes <= {READ}": line["read"] <= READ,
        }
        said += [f"{'met' if ok else 'MISSED'}: {name}" for name, ok in checks.items()]
    return "\n".join(said)


@click.command()
@click.option("--scratch", type=click.Path(path_type=Path), required=True, help="Directory with 2 GB free.")
@click.option("--layers", "depths", type=click.IntRange(2), multiple=True, default=(6, 12, 24, 48), show_default=True)
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs of each.")
@click.option("--dry", is_flag=True, help="Tiny layers, 3, 6 and 12 of them, once: only to see that everything runs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--one", "place", type=click.Choice(list(PLACES)), hidden=True)
def main(
    scratch: Path,
    depths: tuple[int, ...],
    repeat: int,
    dry: bool,
    json_file: Path | None,
    place: Literal["device", "scratch"] | None,
) -> None:
    """Measure, print the table and the lines, and write JSON."""
    if place:
        print(json.dumps(one(scratch, place)))
        return
    from random_model import write_model

    if dry:
        depths, repeat = (3, 6, 12), 1
    if len(set(depths)) < 2:
        raise click.UsageError("a line needs two depths; give --layers more than once")
    scratch.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="scaling-", dir=scratch))
    rows: list[dict[str, Any]] = []
    try:
        for depth in sorted(set(depths)):
            model = directory / str(depth)
            write_model(model, {**CONFIG, **(DRY if dry else {}), "num_hidden_layers": depth})
            rows += measure(model, depth, repeat)
            shutil.rmtree(model)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    lines = fits(rows)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {SAMPLES} x {SEQ_LEN} tokens, median of {repeat}\n")
    print(f"{show(rows)}\n\n{verdicts(lines)}")
    if dry:
        print("(the targets are not for tiny layers: what a process takes now more, now less is larger than they are)")
    if json_file:
        json_file.write_text(json.dumps({"rows": rows, "lines": lines}, indent=1) + "\n")


if __name__ == "__main__":
    main()
