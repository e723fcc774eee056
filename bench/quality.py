"""Perplexity after pruning the demo's 135M Llama: the tables of the README.

    python bench/quality.py TABLE --data DIR --json FILE [--method NAME] [--only SETTING] [--seeds N] [--dtype D]

TABLE is `main` (the settings that papers compare), `units` (20 to 50 %, repaired, global, of all layers), `policy`
(the same of bernoulli, by what it begins with), `weights` (50 %, 2:4, 4:8), `layers` (1 to 9 of 30), `compensate`
(tokens, λ, target) or `dtypes` (float32 beside bfloat16, on fewer tokens). DIR holds wikitext2-valid.txt
(calibration), wikitext2-test.txt and ptb-valid.txt (perplexity). What FILE has is not made again. Settings that share
scores are scored once; checkpoints are measured in float32, whatever `--dtype` made them. Takes 2 GB of disk.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
from quality_tables import TABLES

DTYPE = "float32"  # on a GPU too: the same arithmetic everywhere
SHARED = ("granularity", "layers", "stock", "dtype", "settings")  # of settings: what scores depend on
BAR = 0.005  # of perplexity, that bfloat16 may cost a method which has it by default
TEXTS = {
    "test 128": ("wikitext2-test", 128, 100),
    "test 1024": ("wikitext2-test", 1024, 20),
    "ptb": ("ptb-valid", 128, 100),
}


def measure(job: dict[str, Any]) -> None:
    """Score once and measure all settings of a job; one line of JSON each, as they are done."""
    from mass import counts

    from streamprune.config import PruneConfig
    from streamprune.methods.table import METHODS
    from streamprune.output import companions
    from streamprune.paging.device import peaks
    from streamprune.pipeline.batches import REPAIR_SEQ_LEN
    from streamprune.pipeline.job import Job
    from streamprune.pipeline.progress import Progress
    from streamprune.pipeline.source import Source
    from streamprune.planning.decision import make_plan
    from streamprune.streaming.sweeper import default_micro_batch
    from streamprune.texts.corpus import open_corpus

    data, method = Path(job["data"]), METHODS[job["method"]]
    scores = None
    first = next(iter(job["settings"].values()))
    scope = "units" if first.get("granularity", "units") in ("units", "layers") else "matrices"
    dtype = first.get("dtype", job["dtype"])
    with Source(job["model"], dtype=dtype, scope=scope).open() as sweeper:
        corpus = open_corpus(sweeper.skeleton.checkpoint.path, data / "wikitext2-valid.txt")
        inputs = any(need.label == "inputs" for need in method.needs)
        samples, seq_len = (first.get("samples", 128), 512) if inputs else (10, 128)
        if method.trials is not None:
            samples, seq_len = first["samples"], method.calibration[1]
        # A pair of dtypes settles nothing by itself: each seed has other texts.
        texts_of = partial(corpus.sequences, sampling="random" if "dtype" in first and job["seed"] else "first")
        ids = texts_of(samples, seq_len, seed=job["seed"])
        for name, options in job["settings"].items():
            options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
            config = PruneConfig(
                model=job["model"], output=Path("unused"), method=method.name, seed=job["seed"], **options
            )
            plan = make_plan(config, sweeper.skeleton)
            count = config.compensate_tokens // REPAIR_SEQ_LEN
            repair_ids = texts_of(count, REPAIR_SEQ_LEN, seed=job["seed"]) if config.compensate else None
            beside = companions.prepare(plan.form)
            run = Job(config, plan, sweeper, Progress(quiet=True), ids, repair_ids, beside)
            sweeper.micro_batch = default_micro_batch(seq_len)
            with tempfile.TemporaryDirectory() as directory:
                start, read, cpu = time.perf_counter(), sweeper.skeleton.checkpoint.bytes_read, time.process_time()
                if config.target == "weights":
                    run.prune_weights(Path(directory))
                    costs = run.costs | {"cpu_seconds": time.process_time() - cpu}
                else:
                    if scores is None:
                        scores, costs = run.score(), run.costs | {"cpu_seconds": time.process_time() - cpu}
                        start, read = time.perf_counter(), sweeper.skeleton.checkpoint.bytes_read
                    cpu = time.process_time()
                    run.cut(scores, Path(directory))
                cutting = {
                    "seconds": time.perf_counter() - start,
                    "cpu_seconds": time.process_time() - cpu,
                    "bytes_read": sweeper.skeleton.checkpoint.bytes_read - read,
                    **peaks(),
                }
                texts = ("test 128",) if "dtype" in options else tuple(TEXTS)
                result = {
                    "perplexity": perplexities(directory, data, DTYPE, texts),
                    "scoring": costs,
                    "cutting": cutting,
                }
                if method.trials is not None:
                    result["kept"] = counts(plan.choice.keep(scores.values), plan.layers)
                if "dtype" in options:
                    same = dtype == DTYPE
                    computed = result["perplexity"] if same else perplexities(directory, data, dtype, texts)
                    result["as computed"] = computed["test 128"]
                result["device"] = device_name(sweeper.skeleton.device)
            print(json.dumps([name, result]), flush=True)


def device_name(device: Any) -> str:
    """The GPU's own name, or CPU."""
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def perplexities(directory: str, data: Path, dtype: str, texts: Sequence[str]) -> dict[str, float]:
    """Of the texts, streamed."""
    from streamprune.pipeline.source import Source
    from streamprune.streaming.perplexity import perplexity
    from streamprune.texts.corpus import open_corpus

    values = {}
    with Source(directory, dtype=dtype, decompress=True).open() as pruned:
        for name in texts:
            file, seq_len, samples = TEXTS[name]
            corpus = open_corpus(pruned.skeleton.checkpoint.path, data / f"{file}.txt")
            values[name] = perplexity(pruned, corpus.segments(seq_len, samples)).perplexity
    return values


def jobs(method: str, settings: dict[str, dict[str, Any]]) -> list[dict[str, dict[str, Any]]]:
    """Settings whose scores are the same, together; weights are pruned as they are scored, each by itself."""
    from streamprune.methods.table import METHODS

    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for name, options in settings.items():
        # A policy learns for one budget; errors may be those behind the repair.
        row = METHODS[method]
        shared = SHARED + ("ratio",) * (row.trials is not None) + ("compensate",) * ("refit" in row.settings)
        key = json.dumps([options.get(each) for each in shared])
        if options.get("granularity", "units") not in ("units", "layers"):
            key = name
        groups.setdefault(key, {})[name] = options
    return list(groups.values())


def show(table: str, results: dict[str, Any]) -> str:
    """A row per method and variant, a column per amount: perplexities of the three texts."""
    from streamprune.figures import human, say_peaks
    from streamprune.figures import table as aligned

    runs: dict[str, list[dict[str, Any]]] = {}
    for key, run in results.items():
        if key.split("/")[0] == table and run:
            runs.setdefault(key.split("/")[1], []).append(run)
    cells: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for method, done in runs.items():
        for run in done:
            for name, result in run.items():
                amount, variant = split(table, name)
                cells.setdefault((method, variant), {}).setdefault(amount, []).append(result)
    amounts = list(dict.fromkeys(amount for row in cells.values() for amount in row))
    rows = [["method", "", *amounts, "scoring s", "rest s", "peak memory", "read"]]
    for (method, variant), row in sorted(cells.items(), key=lambda item: (item[0][1], list(runs).index(item[0][0]))):
        values = [
            " / ".join(_spread([one["perplexity"][text] for one in row[amount]]) for text in TEXTS)
            if amount in row
            else "-"
            for amount in amounts
        ]
        first, last = next(iter(row.values()))[0], list(row.values())[-1][0]
        rest = statistics.median(one["cutting"]["seconds"] for each in row.values() for one in each)
        if table == "weights":  # written as they are scored
            rest -= first["scoring"]["seconds"]
        read = human(first["scoring"]["bytes_read"] + first["cutting"]["bytes_read"] * (table != "weights"))
        scored = first["scoring"].get("seconds")  # taken out where the machine was shared
        scored = "-" if scored is None else f"{scored:.1f}"
        costs = [scored, f"{max(0, rest):.1f}", say_peaks(last["cutting"]), read]
        rows.append([method, variant, *values, *costs])
    return aligned(rows, markdown=True)


def show_dtypes(results: dict[str, Any]) -> str:
    """A row per method and what goes: perplexity after either dtype's arithmetic, and its processor's seconds.

    Only seeds that were measured in both count. Seconds of a repaired row are of the repair; the others of scoring. A
    processor that is shared costs none of them.
    """
    from streamprune.figures import table as aligned

    cells: dict[tuple[str, str], dict[str, list[dict[str, Any]]]] = {}
    for key, run in results.items():
        table, method, _ = key.split("/")
        for name, result in run.items() if table == "dtypes" else ():
            what, dtype = name.rsplit(", ", 1)
            if {f"{what}, float32", f"{what}, bfloat16"} <= run.keys():
                cells.setdefault((method, what), {}).setdefault(dtype, []).append(result)
    head = ["float32", "bfloat16", "more", "measured in bfloat16", "CPU s, float32", "bfloat16", f"at most {BAR:.1%}"]
    rows = [["method", "what goes", *head]]
    for (method, what), by_dtype in cells.items():
        wide, half = by_dtype["float32"], by_dtype["bfloat16"]
        values = [[one["perplexity"]["test 128"] for one in each] for each in (wide, half)]
        more = statistics.mean(values[1]) / statistics.mean(values[0]) - 1
        seconds = [
            statistics.median(one["cutting" if "repaired" in what else "scoring"]["cpu_seconds"] for one in each)
            for each in (wide, half)
        ]
        row = [_spread(values[0], 2), _spread(values[1], 2), f"{more:+.2%}"]
        row += [_spread([one["as computed"] for one in half], 2), *(f"{each:.1f}" for each in seconds)]
        rows.append([method, what, *row, "yes" if more <= BAR else "no"])
    return aligned(rows, markdown=True)


def split(table: str, name: str) -> tuple[str, str]:
    """(amount, variant) of a setting: ("20%", "compensated"); repair settings are amounts by tokens."""
    if table == "compensate":
        target, tokens, ridge = name.split()
        return f"{int(tokens):,}", f"{target}, {ridge}"
    if table in ("units", "policy"):
        amount, _, variant = name.partition(" ")
        return amount, variant
    amount, _, variant = name.partition(", ")
    return amount, variant


def _spread(values: list[float], digits: int = 1) -> str:
    if not values:
        return "-"
    mean, least, most = (f"{value:.{digits}f}" for value in (statistics.mean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({least}–{most})"


@click.command()
@click.argument("table", type=click.Choice(list(TABLES)))
@click.option("--data", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Figures; what it has is not computed again."
)
@click.option("--model", type=click.Path(path_type=Path), help="By default the demo's, fetched if need be.")
@click.option("--method", "only_methods", multiple=True, help="Only this one; repeatable.")
@click.option("--only", multiple=True, help="Only this setting; repeatable.")
@click.option("--dtype", default=DTYPE, show_default=True, help="What is computed in, but for perplexities.")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How many, from 0.")
@click.option("--one", hidden=True)
def main(
    table: str,
    data: Path | None,
    json_file: Path | None,
    model: Path | None,
    only_methods: tuple[str, ...],
    only: tuple[str, ...],
    dtype: str,
    seeds: int,
    one: str | None,
) -> None:
    """Measure what FILE lacks, and print the table."""
    if one:
        measure(json.loads(one))
        return
    results: dict[str, Any] = json.loads(json_file.read_text()) if json_file and json_file.exists() else {}
    if data is not None:
        from streamprune.commands import demo
        from streamprune.pipeline.progress import Progress
        from streamprune.planning.rates import default_cache

        path = str(model or demo.fetch(default_cache(), Progress()))
        methods, settings = TABLES[table]
        chosen = {name: options for name, options in settings.items() if not only or name in only}
        for seed in range(seeds):
            for method in only_methods or methods:
                wanted = {name: each for name, each in chosen.items() if able(method, each)}
                done = results.setdefault(f"{table}/{method}/{seed}", {})
                missing = {name: options for name, options in wanted.items() if name not in done}
                for group in jobs(method, missing):
                    job = {"model": path, "data": str(data), "method": method, "settings": group, "seed": seed}
                    job["dtype"] = dtype
                    _run(table, job, done, lambda: json_file and json_file.write_text(json.dumps(results, indent=1)))
    print(show_dtypes(results) if table == "dtypes" else show(table, results))


def able(method: str, options: dict[str, Any]) -> bool:
    """Whether the method can score what goes."""
    from streamprune.methods.table import METHODS

    granularity = options.get("granularity", "units")
    return (granularity if granularity in ("units", "layers") else "weights") in METHODS[method].targets


def _run(table: str, job: dict[str, Any], done: dict[str, Any], save: Any) -> None:
    """A job in a process of its own; what it has done is saved as it comes."""
    command = [sys.executable, __file__, table, "--one", json.dumps(job)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            name, result = json.loads(line)
            done[name] = result
            print(job["method"], job["seed"], line.strip(), file=sys.stderr, flush=True)
            save()
    if child.returncode:
        raise SystemExit(f"{job['method']} failed")


if __name__ == "__main__":
    main()
