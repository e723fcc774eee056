"""A forward pass by streamprune beside airllm's, accelerate's disk_offload's, and in memory: time, memory, bytes read.

    python bench/forwards.py --scratch DIR [--model DIR] [--repeat 5] [--json FILE]
    python bench/forwards.py --scratch DIR --model DIR --stored --tokens 16

On a CPU, 10 x 128 tokens in float32, the loss of all of them; by default the demo's 135M Llama. Each way has a process
of its own, which loads, passes once untimed, and then `--repeat` times with its files in the page cache (warm) and as
often with them dropped from it before every pass (cold). airllm splits the checkpoint into a file per layer first,
disk_offload writes it anew as float32; neither is timed. A way whose package is missing is left out, with a line that
says so.

--stored is for a model that exceeds memory: streamprune and disk_offload compute in the stored dtype, so that the
latter takes its weights from the checkpoint's own files, by a device_map that has the layers on the disk.
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

SEQ_LEN = 128
NEEDS = {"streamprune": "streamprune", "airllm": "airllm", "disk_offload": "accelerate", "in memory": "transformers"}
FASTER = {"warm": {"airllm": 3.0, "disk_offload": 1.0}, "cold": {"disk_offload": 3.0}}
ON_DISK = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
ON_DISK |= {"model.layers": "disk"}
Pass = Callable[[], float]


def streamed(model: str, ids: Tensor, scratch: Path, stored: bool) -> tuple[Pass, list[Path]]:
    """Our sweep."""
    from streamprune.pipeline.source import Source
    from streamprune.streaming.sweeper import default_micro_batch

    dtype = stored_dtype(model) if stored else "float32"
    opened = Source(model, device="cpu", dtype=dtype, micro_batch=default_micro_batch(SEQ_LEN)).open()
    sweeper = opened.__enter__()
    atexit.register(opened.__exit__, None, None, None)  # what holds it open: without it the model is given up
    return lambda: sweeper.head_loss(sweeper.forward(ids), ids, with_grad=False)[0], files(Path(model))


def whole(model: str, ids: Tensor, scratch: Path, stored: bool) -> tuple[Pass, list[Path]]:
    """transformers, in memory."""
    loaded = _load(model)
    return lambda: loss_of(loaded(ids).logits, ids), files(Path(model))


def offloaded(model: str, ids: Tensor, scratch: Path, stored: bool) -> tuple[Pass, list[Path]]:
    """accelerate's disk_offload."""
    from accelerate import disk_offload
    from transformers import AutoModelForCausalLM

    if stored:
        loaded = AutoModelForCausalLM.from_pretrained(
            model, dtype=stored_dtype(model), device_map=ON_DISK, offload_folder=str(scratch)
        )
        return lambda: loss_of(loaded(ids).logits, ids), files(Path(model))
    loaded = _load(model)
    disk_offload(loaded, str(scratch), execution_device=torch.device("cpu"))
    return lambda: loss_of(loaded(ids).logits, ids), files(scratch)


def layered(model: str, ids: Tensor, scratch: Path, stored: bool) -> tuple[Pass, list[Path]]:
    """airllm."""
    from airllm import AutoModel

    loaded = AutoModel.from_pretrained(
        model, device="cpu", dtype=torch.float32, layer_shards_saving_path=str(scratch), max_seq_len=SEQ_LEN
    )
    return lambda: loss_of(loaded(ids, use_cache=False).logits, ids), files(scratch)


WAYS = {"streamprune": streamed, "airllm": layered, "disk_offload": offloaded, "in memory": whole}


def _load(model: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()


def stored_dtype(model: str) -> str:
    """As config.json has it."""
    return json.loads((Path(model) / "config.json").read_text())["dtype"]


def loss_of(logits: Tensor, ids: Tensor) -> float:
    """Mean next-token loss in nats."""
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()))


def files(directory: Path) -> list[Path]:
    """All that lies there."""
    return [file for file in directory.rglob("*") if file.is_file()]


def drop(paths: list[Path]) -> None:
    """Let the page cache forget them."""
    for path in paths:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one(way: str, model: str, scratch: Path, repeat: int, tokens: int, stored: bool) -> dict[str, Any]:
    """All passes of a way, in this process."""
    from streamprune.figures import peak_rss

    vocabulary = json.loads((Path(model) / "config.json").read_text())["vocab_size"]
    shape = (max(1, tokens // SEQ_LEN), min(tokens, SEQ_LEN))
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        run, paths = WAYS[way](model, ids, scratch, stored)
        loss, seconds = run(), {}
        for state in ("warm", "cold"):
            taken = []
            for _ in range(repeat):
                if state == "cold":
                    drop(paths)
                start = time.perf_counter()
                run()
                taken.append(time.perf_counter() - start)
            seconds[state] = statistics.median(taken)
    return {"way": way, "loss": loss, **seconds, "peak_rss": peak_rss(), "disk": sum(p.stat().st_size for p in paths)}


def measure(way: str, scratch: Path, **job: Any) -> dict[str, Any] | None:
    """`one` in a process of its own; None where it cannot be."""
    if importlib.util.find_spec(NEEDS[way]) is None:
        click.echo(f"{NEEDS[way]} is not installed; its rows are left out", err=True)
        return None
    with tempfile.TemporaryDirectory(dir=scratch) as directory:
        command = [sys.executable, __file__, "--one", json.dumps({"way": way, "scratch": directory, **job})]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def show(figures: list[dict[str, Any]]) -> str:
    """A row per way, and the targets."""
    from streamprune.figures import human, table

    ours = next(row for row in figures if row["way"] == "streamprune")
    rows = [["way", "warm, s", "of streamprune's", "cold, s", "of streamprune's", "peak RSS", "on disk", "loss"]]
    for row in figures:
        ratios = {state: f"{row[state] / ours[state]:.2f}" for state in ("warm", "cold")}
        cells = [f"{row['warm']:.2f}", ratios["warm"], f"{row['cold']:.2f}", ratios["cold"]]
        rows.append([row["way"], *cells, human(row["peak_rss"]), human(row["disk"]), f"{row['loss']:.5f}"])
    lines = [table(rows, markdown=True), ""]
    for row in figures:
        for state, wanted in FASTER.items():
            if row["way"] in wanted:
                ratio = row[state] / ours[state]
                verdict = "met" if ratio >= wanted[row["way"]] else "MISSED"
                lines.append(f"{verdict}: {wanted[row['way']]:.0f} times as fast as {row['way']}, {state}: {ratio:.2f}")
        if abs(row["loss"] - ours["loss"]) > 1e-4 * ours["loss"]:
            lines.append(f"WRONG: {row['way']} has another loss")
    return "\n".join(lines)


@click.command()
@click.option("--scratch", type=click.Path(path_type=Path), help="Directory for what peers write: 2 GB.")
@click.option("--model", type=click.Path(path_type=Path), help="By default the demo's, fetched if need be.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True)
@click.option("--tokens", type=click.IntRange(2), default=10 * SEQ_LEN, show_default=True)
@click.option("--stored", is_flag=True, help="Compute in the stored dtype: for a model that exceeds memory.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--one", "job", hidden=True)
def main(
    scratch: Path | None,
    model: Path | None,
    repeat: int,
    tokens: int,
    stored: bool,
    json_file: Path | None,
    job: str | None,
) -> None:
    """Measure, print the table, and write JSON."""
    if job is not None:
        given = json.loads(job)
        print(json.dumps(one(given.pop("way"), scratch=Path(given.pop("scratch")), **given)))
        return
    if scratch is None:
        raise click.UsageError("--scratch is missing")
    from streamprune.commands import demo
    from streamprune.pipeline.progress import Progress
    from streamprune.planning.rates import default_cache

    scratch.mkdir(parents=True, exist_ok=True)
    path = str(model or demo.fetch(default_cache(), Progress()))
    ways = ("streamprune", "disk_offload") if stored else tuple(WAYS)
    job_of = {"model": path, "repeat": repeat, "tokens": tokens, "stored": stored}
    figures = [found for way in ways if (found := measure(way, scratch.absolute(), **job_of)) is not None]
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {tokens} tokens, medians of {repeat}\n")
    print(show(figures))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
