"""Perplexity of every method on the demo's 135M Llama: the table of the README.

    python bench/quality.py --calibration wikitext2-valid.txt --text wikitext2-test.txt [--json FILE]

Each method scores layers 4:28 and, for --stock, all layers, in a process of its own (its peak memory and seconds
stand beside it); the checkpoints of all settings are written, loaded back and measured on the first 100 segments of
128 tokens. Needs about 2 GB of temporary space. `smoothgrad` takes 100 sweeps, so the whole takes about an hour on
two cores; --method picks some. With --seeds N each runs with the seeds 0 … N−1, and the table shows mean (least–most)
and the seconds of seed 0.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

SETTINGS = {
    "channels": {"ratio": 0.25, "layers": (4, 28)},
    "both": {"ratio": 0.25, "layers": (4, 28), "attention_ratio": 0.34, "mlp_ratio": 0.25},
    "stock 0.2": {"ratio": 0.2, "stock": True},
    "stock 0.25": {"ratio": 0.25, "stock": True},
}
MEANING = """\
channels: --ratio 0.25 --layers 4:28 (512 of 1536 channels of 24 layers); both: --attention-ratio 0.34 --mlp-ratio 0.25
--layers 4:28 (one of 3 KV groups and 384 channels); stock 0.2 and 0.25: --stock --ratio, channels of all 30 layers
(stock 0.2 removes about as many parameters as `channels`)."""


def score_and_measure(options: dict) -> dict:
    """Score once for one range of layers and measure every setting of that range."""
    from streamprune import allocation, calibration, evaluate, slim
    from streamprune.config import PruneConfig
    from streamprune.families import unit_costs
    from streamprune.methods import METHODS, resolve_settings
    from streamprune.report import peak_rss
    from streamprune.run import open_model
    from streamprune.statistics import Statistics
    from streamprune.sweep import default_micro_batch

    method, stock = options["method"], options["stock"]
    with open_model(options["model"], micro_batch=default_micro_batch(128)) as sweeper:
        skeleton = sweeper.skeleton
        tokenizer = calibration.load_tokenizer(skeleton.checkpoint.path)
        tokens = calibration.tokenize(tokenizer, calibration.read_text(options["calibration"]))
        ids = calibration.sample_sequences(tokens, 10, 128, options["sampling"], 0)
        text = calibration.tokenize(tokenizer, calibration.read_text(options["text"]))
        segments = evaluate.segment(text, 128, 100)
        n_layers = len(skeleton.layers)
        layers = range(n_layers) if stock else range(4, 28)
        start = time.perf_counter()
        scores = METHODS[method].score(Statistics(sweeper, ids, layers, options["seed"]), resolve_settings(method, {}))
        result: dict = {"seconds": time.perf_counter() - start, "peak_rss": peak_rss(), "perplexity": {}}
        costs = unit_costs(skeleton.family, skeleton.geometry, skeleton.shapes(0))
        for name, setting in SETTINGS.items():
            if bool(setting.get("stock")) != stock:
                continue
            config = PruneConfig(model=options["model"], output=Path("unused"), **setting)
            ratios = allocation.Ratios(config.ratio, config.attention_ratio, config.mlp_ratio)
            family, hidden = skeleton.family, skeleton.config.hidden_size
            removed = allocation.uniform(family, skeleton.geometry, costs, ratios, hidden, stock=stock)
            kept = allocation.select(scores.values, removed, skeleton.geometry, n_layers)
            with tempfile.TemporaryDirectory() as directory:
                slim.write_weights(skeleton, sweeper.pager, kept, Path(directory), 5_000_000_000)
                slim.write_companions(skeleton, kept, Path(directory), None)
                with open_model(directory, pruned=True) as pruned:
                    value = evaluate.perplexity(pruned, segments).perplexity
            gone = allocation.removed_parameters(removed, costs, layers)
            result["perplexity"][name] = {"perplexity": value, "parameters": skeleton.parameters - gone}
        if method == "random":
            result["perplexity"]["dense"] = {"perplexity": evaluate.perplexity(sweeper, segments).perplexity}
    return result


def measure(options: dict) -> dict:
    """`score_and_measure` in a fresh process."""
    command = [sys.executable, __file__, "--one", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def show(results: dict) -> str:
    """The README's table."""
    from streamprune.report import human, table

    rows = [["method", *SETTINGS, "seconds", "peak RSS", "seconds (30 layers)", "peak RSS (30 layers)"]]
    for method, pairs in results.items():
        values = [ranged["perplexity"] | stock["perplexity"] for ranged, stock in pairs]
        cells = [_spread([value[name]["perplexity"] for value in values]) for name in SETTINGS]
        costs = [cell for run in pairs[0] for cell in (f"{run['seconds']:.1f}", human(run["peak_rss"]))]
        rows.append([method, *cells, *costs])
    return table(rows, markdown=True)


def _spread(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.1f}–{max(values):.1f})"


@click.command()
@click.option("--model", type=click.Path(path_type=Path), help="By default the demo's, fetched if need be.")
@click.option("--calibration", type=click.Path(path_type=Path, exists=True))
@click.option("--text", type=click.Path(path_type=Path, exists=True))
@click.option("--sampling", type=click.Choice(["first", "random"]), default="first", show_default=True)
@click.option("--method", "methods", multiple=True, help="Only this one; repeatable.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How many, from 0.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--one", hidden=True)
def main(
    model: Path | None,
    calibration: Path | None,
    text: Path | None,
    sampling: str,
    methods: tuple[str, ...],
    seeds: int,
    json_file: Path | None,
    one: str | None,
) -> None:
    """Measure, print the table, and write JSON."""
    if one:
        print(json.dumps(score_and_measure(json.loads(one))))
        return
    if calibration is None or text is None:
        raise click.UsageError("--calibration and --text are needed")
    from streamprune import demo
    from streamprune.methods import METHODS
    from streamprune.report import Progress

    model = model or demo.fetch(demo.default_cache(), Progress())
    common = {"model": str(model), "calibration": str(calibration), "text": str(text), "sampling": sampling}
    results: dict[str, list] = {}
    for seed in range(seeds):
        for method in methods or METHODS:
            pair = [measure({**common, "method": method, "stock": stock, "seed": seed}) for stock in (False, True)]
            results.setdefault(method, []).append(pair)
            print(method, seed, json.dumps(pair), file=sys.stderr, flush=True)
            if json_file:
                json_file.write_text(json.dumps(results, indent=1) + "\n")
    dense = results["random"][0][0]["perplexity"]["dense"] if "random" in results else None
    if dense:
        print(f"dense: {dense['perplexity']:.2f}")
    print(f"{show(results)}\n\n{MEANING}")


if __name__ == "__main__":
    main()
