"""Streamprune beside llmcompressor's sequential one-shot pruning: the same model, tokens and patterns, in one run.

    python bench/peers.py --data DIR [--peer-python PYTHON] [--json FILE] [--draws N] [--only METHOD/PATTERN]
        [--dtype bfloat16]

wanda and sparsegpt at 50 % and 2:4, calibrated on 32 x 256 tokens from the start of DIR/wikitext2-valid.txt, both sides
in float32 or both in bfloat16; perplexity of the first 100 x 128 tokens of DIR/wikitext2-test.txt in float32. Every
further draw calibrates on the next 32 x 256 tokens: where two weights are nearly equal rounding decides which of them
goes, and one draw's perplexity depends on that. Each run is a process of its own, the two sides take turns, and medians
of seconds and means of perplexities are shown. PYTHON is one that has llmcompressor (`pip install
'streamprune[bench]'`), by default this one; without it the peer's rows are left out, with a line that says so.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

SAMPLES, SEQ_LEN = 32, 256
RUNS = [(method, pattern) for method in ("wanda", "sparsegpt") for pattern in ("weights", "2:4")]


def ours(model: str, method: str, pattern: str, dtype: str, ids: Any, output: str) -> None:
    """One pruning by streamprune, as `streamprune --no-evaluate` does it."""
    from streamprune.config import PruneConfig
    from streamprune.output import companions
    from streamprune.pipeline.job import Job
    from streamprune.pipeline.progress import Progress
    from streamprune.pipeline.source import Source
    from streamprune.planning.decision import make_plan
    from streamprune.streaming.sweeper import default_micro_batch

    config = PruneConfig(model=model, output=Path(output), method=method, granularity=pattern)
    with Source(model, dtype=dtype, micro_batch=default_micro_batch(SEQ_LEN), scope="matrices").open() as sweeper:
        plan = make_plan(config, sweeper.skeleton)
        Path(output).mkdir()
        beside = companions.prepare(plan.form)
        Job(config, plan, sweeper, Progress(quiet=True), ids, None, beside).prune_weights(Path(output))


def peer(model: str, method: str, pattern: str, dtype: str, ids: Any, output: str) -> None:
    """The same by llmcompressor."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
    from transformers import AutoModelForCausalLM

    modifier = {"wanda": WandaPruningModifier, "sparsegpt": SparseGPTModifier}[method]
    mask = "2:4" if pattern == "2:4" else "0:0"
    recipe = modifier(sparsity=0.5, mask_structure=mask, ignore=["re:.*lm_head"])
    rows = ids.tolist()
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)),
        dataset=Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * SEQ_LEN for _ in rows]}),
        recipe=recipe,
        max_seq_length=SEQ_LEN,
        num_calibration_samples=SAMPLES,
        pipeline="sequential",
        output_dir=output,
    )


def one(job: dict[str, Any]) -> dict[str, Any]:
    """Prune once in this process."""
    import torch

    before = time.perf_counter()
    {"streamprune": ours, "llmcompressor": peer}[job["side"]](
        job["model"], job["method"], job["pattern"], job["dtype"], torch.tensor(job["ids"]), job["output"]
    )
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    return {"seconds": time.perf_counter() - before, "peak_rss": peak}


def perplexity(model: str, data: Path) -> float:
    """Streamed, of the test split."""
    from streamprune.pipeline.source import Source
    from streamprune.streaming.perplexity import perplexity
    from streamprune.texts.corpus import open_corpus

    with Source(model, dtype="float32").open() as sweeper:
        corpus = open_corpus(sweeper.skeleton.checkpoint.path, data / "wikitext2-test.txt")
        return perplexity(sweeper, corpus.segments(128, 100)).perplexity


def measure(python: str, job: dict[str, Any], data: Path) -> dict[str, Any]:
    """`one` in a fresh process of `python`, and the perplexity of what it wrote."""
    import shutil

    with tempfile.TemporaryDirectory() as scratch:
        output, source = Path(scratch) / "pruned", Path(job["model"])
        command = [python, __file__, "--one", json.dumps({**job, "output": str(output)})]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(done.stderr)
        result = json.loads(done.stdout.splitlines()[-1])
        for file in source.iterdir():
            if not file.name.endswith(".safetensors") and not (output / file.name).exists():
                shutil.copyfile(file, output / file.name)
        return {**result, "perplexity": perplexity(str(output), data)}


def show(results: dict[str, list[dict[str, Any]]]) -> str:
    """A row per method, pattern and side."""
    from streamprune.figures import human, table

    rows = [["method", "pattern", "by", "perplexity", "seconds", "of the peer's", "peak RSS"]]
    for key, runs in results.items():
        method, pattern, side = key.split("/")
        seconds = statistics.median(run["seconds"] for run in runs)
        other = results.get(f"{method}/{pattern}/llmcompressor")
        ratio = f"{seconds / statistics.median(run['seconds'] for run in other):.2f}" if other else "-"
        peak = human(max(run["peak_rss"] for run in runs))
        values = [run["perplexity"] for run in runs]
        spread = f" ({min(values):.1f}–{max(values):.1f})" if len(values) > 1 else ""
        perplexities = f"{statistics.mean(values):.1f}{spread}"
        rows.append([method, pattern, side, perplexities, f"{seconds:.1f}", ratio, peak])
    return table(rows, markdown=True)


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True))
@click.option("--model", type=click.Path(path_type=Path), help="By default the demo's, fetched if need be.")
@click.option("--peer-python", default=sys.executable, help="A Python that has llmcompressor.")
@click.option("--draws", type=click.IntRange(1), default=1, show_default=True, help="Of calibration tokens.")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--only", type=click.Choice([f"{method}/{pattern}" for method, pattern in RUNS]), help="By default all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--one", "one_job", hidden=True)
def main(
    data: Path | None,
    model: Path | None,
    peer_python: str,
    draws: int,
    dtype: str,
    only: str | None,
    json_file: Path | None,
    one_job: str | None,
) -> None:
    """Measure both sides, print the table, and write JSON."""
    if one_job:
        print(json.dumps(one(json.loads(one_job))))
        return
    if data is None:
        raise click.UsageError("--data is needed")
    from streamprune.commands import demo
    from streamprune.pipeline.progress import Progress
    from streamprune.planning.rates import default_cache
    from streamprune.texts.corpus import open_corpus

    path = str(model or demo.fetch(default_cache(), Progress()))
    corpus = open_corpus(Path(path), data / "wikitext2-valid.txt")
    sequences = corpus.sequences(draws * SAMPLES, SEQ_LEN, "first", 0).split(SAMPLES)
    sides = {"streamprune": sys.executable}
    if subprocess.run([peer_python, "-c", "import llmcompressor"], capture_output=True, check=False).returncode == 0:
        sides["llmcompressor"] = peer_python
    else:
        click.echo(f"{peer_python} has no llmcompressor; its rows are left out", err=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for ids in sequences:
        for method, pattern in [tuple(only.split("/"))] if only else RUNS:
            for side, python in sides.items():
                job = {"side": side, "model": path, "method": method, "pattern": pattern, "dtype": dtype}
                job["ids"] = ids.tolist()
                result = measure(python, job, data)
                results.setdefault(f"{method}/{pattern}/{side}", []).append(result)
                print(method, pattern, side, json.dumps(result), file=sys.stderr, flush=True)
                if json_file:
                    json_file.write_text(json.dumps(results, indent=1) + "\n")
    print(show(results))


if __name__ == "__main__":
    main()
