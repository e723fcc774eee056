"""Is the pruned model faster? Outputs of the demo's 135M Llama beside the dense model, with two engines.

    python bench/speed.py --scratch DIR --json FILE [--runs N] [--prompt N] [--new N] [--dtype D] [--ratio R]

20 % by taylor, as layers of different widths, in one width (`--stock`), and both with channels in multiples of 64
(`--round-to 64`), and as whole layers; each is measured in turn with the dense model by `streamprune.speed`, every
model in a process of its own. Ratios are medians of runs side by side. What FILE has is not measured again. Threads are
what OMP_NUM_THREADS says. Needs 2 GB of temporary space, and xllamacpp for llama.cpp.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import streamprune
from streamprune.commands import demo
from streamprune.figures import human, table
from streamprune.pipeline.progress import Progress
from streamprune.planning.rates import default_cache

OUTPUTS: dict[str, dict[str, Any]] = {
    "ragged": {},
    "ragged, 64": {"round_to": 64},
    "stock": {"stock": True},
    "stock, 64": {"stock": True, "round_to": 64},
    "fewer layers": {"granularity": "layers", "method": "block-influence", "layers": (4, 28)},
}


def rows_of(name: str, measured: Mapping[str, Any]) -> list[list[str]]:
    """Table rows of one output: for each engine how much faster than the dense model, and memory."""
    rows, speeds = [], measured["speeds"]
    for one, dense in zip(speeds[::2], speeds[1::2], strict=True):
        ratios = []
        for what in ("prefill", "decode"):
            found = [a / b for a, b in zip(one[what], dense[what], strict=True)]
            ratios.append(f"{statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})")
        rates = [f"{statistics.median(one[what]):,.0f}" for what in ("prefill", "decode")]
        memory = [human(each["peak_gpu"] or each["peak_rss"]) for each in (one, dense)]
        rows.append([name, one["engine"], one["computed_in"], *rates, *ratios, *memory])
    return rows


@click.command()
@click.option("--scratch", type=click.Path(path_type=Path), required=True, help="Outputs are kept here.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True, help="Write the figures here.")
@click.option("--ratio", default=0.2)
@click.option("--runs", default=7)
@click.option("--prompt", default=512)
@click.option("--new", default=64)
@click.option("--dtype", default="auto")
def main(scratch: Path, json_file: Path, ratio: float, runs: int, prompt: int, new: int, dtype: str) -> None:
    """Prune, measure, print the table, and write JSON."""
    model = Path(demo.fetch(default_cache(), Progress()))
    results = json.loads(json_file.read_text()) if json_file.is_file() else {}
    for name, options in OUTPUTS.items():
        if name in results:
            continue
        output = scratch / name.replace(", ", "-").replace(" ", "-")
        if not output.is_dir():
            chosen = {"method": "taylor", "ratio": ratio, "evaluate": False, **options}
            streamprune.prune(streamprune.PruneConfig(model, output, **chosen))
        found = streamprune.speed(output, model, prompt=prompt, new=new, runs=runs, dtype=dtype)
        click.echo(f"{name}\n{found.text}", err=True)
        results[name] = asdict(found) | {"speeds": [asdict(each) | {"model": ""} for each in found.speeds]}
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    head = ["output", "engine", "in", "prefill tokens/s", "decode tokens/s", "prefill ×", "decode ×", "memory", "dense"]
    print(table([head, *(row for name, each in results.items() for row in rows_of(name, each))], markdown=True))


if __name__ == "__main__":
    main()
