"""Forward methods on a random Llama of 1.7 billion parameters: seconds, peak memory and what is declared, bytes read.

    python bench/forward.py --scratch DIR [--json FILE]

Each method prunes (or scores) every layer of a bfloat16 checkpoint of 24 layers, and of 12, in a process of its own, on
10 x 128 tokens: peak memory is one layer, its Gram matrices and the slots, and should not grow with the layers. What it
grows by between the two depths is in the table.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

RUNS = {
    "wanda 2:4": ("wanda", "2:4"),
    "wanda 50%": ("wanda", "weights"),
    "sparsegpt 2:4": ("sparsegpt", "2:4"),
    "wanda-sp": ("wanda-sp", "units"),
    "block-influence": ("block-influence", "layers"),
}


def one(path: str, method: str, granularity: str) -> dict[str, Any]:
    """A method in this process; weights that it prunes are dropped."""
    from end_to_end import SEQ_LEN, held, token_ids

    from streamprune.config import PruneConfig
    from streamprune.figures import peak_rss
    from streamprune.methods.sinks import LayerScores, Sparsity, UnitScores, WeightPruner
    from streamprune.methods.table import METHODS, resolve_settings
    from streamprune.pipeline.source import Source
    from streamprune.streaming.statistics import Statistics
    from streamprune.streaming.sweeper import default_micro_batch

    baseline = peak_rss()
    config = PruneConfig(model=path, output=Path("unused"), method=method, granularity=granularity)
    scope = "matrices" if config.target == "weights" else "units"
    with Source(path, device="cpu", micro_batch=default_micro_batch(SEQ_LEN), scope=scope).open() as sweeper:
        ids, layers = token_ids(Path(path)), range(sweeper.n_layers)
        statistics = Statistics(sweeper, ids, layers, 0)
        n, m = config.n_of_m or (0, 0)
        assert config.ratio is not None
        sinks = {
            "weights": WeightPruner(Sparsity(config.ratio, n, m), lambda ref, stored, pruned: None),
            "units": UnitScores(statistics.sweeper.skeleton.all_units(statistics.layers)),
            "layers": LayerScores(layers),
        }
        read, start = sweeper.skeleton.checkpoint.bytes_read, time.perf_counter()
        METHODS[method].score(statistics, resolve_settings(method, {}, config.target), sinks[config.target])
        return {
            "seconds": time.perf_counter() - start,
            "peak_rss": peak_rss(),
            "declared": baseline + sum(held(sweeper, method, {}, layers, granularity).values()),
            "read": (sweeper.skeleton.checkpoint.bytes_read - read) / sweeper.pager.layer_bytes(),
        }


@click.command()
@click.option("--scratch", type=click.Path(path_type=Path), help="Directory with 4 GB free.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--one", "one_run", nargs=3, hidden=True)
def main(scratch: Path | None, json_file: Path | None, one_run: tuple[str, str, str] | None) -> None:
    """Measure, print the table, and write JSON."""
    if one_run:
        print(json.dumps(one(*one_run)))
        return
    if scratch is None:
        raise click.UsageError("--scratch is needed")
    from end_to_end import make_model

    from streamprune.figures import human, table

    scratch.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="forward-", dir=scratch))
    rows, figures = [["layers", "method", "seconds", "peak RSS", "declared", "read / layers' bytes"]], []
    try:
        for depth in (24, 12):
            make_model(directory / str(depth), depth)
            for name, arguments in RUNS.items():
                command = [sys.executable, __file__, "--one", str(directory / str(depth)), *arguments]
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                run = json.loads(done.stdout.splitlines()[-1])
                figures.append({"layers": depth, "method": name, **run})
                sizes = [human(run["peak_rss"]), human(run["declared"])]
                rows.append([str(depth), name, f"{run['seconds']:.1f}", *sizes, f"{run['read']:.4f}"])
            shutil.rmtree(directory / str(depth))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(table(rows, markdown=True))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
