"""Streamed scoring against transformers in memory: time, peak memory, bytes read. One run, side by side.

    python bench/end_to_end.py --scratch DIR [--repeat 5] [--dtype bfloat16] [--json FILE]

Makes a random bfloat16 Llama on disk (24 layers: 1.7 billion parameters, 3.4 GB of scratch, removed afterwards) and
measures, each in a fresh process and in turn on the same tokens:

- streamed: `taylor` and one update of `moreau-gs`, through streamprune's own sweeps;
- whole: the same scores with the model in memory, under transformers and autograd;
- checkpointed: the same with gradient checkpointing;
- widened (with `--dtype bfloat16` on a CPU): checkpointed, in float32;
- kept: streamed, with all layers and their graphs in what memory is left over, so that each is read and run once.

The whole-model runs freeze what is not scored, as streamprune does, so they compute no gradient in vain. A model of
half the depth is then streamed alone: its peak memory shows what depends on the number of layers.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import torch

SAMPLES, SEQ_LEN = 10, 128
RHO, GAMMA, SIGMA, ETA = 0.2, 2e-4, 0.05, 5e-6
METHODS = {
    "taylor": {},
    "moreau-gs": {"steps": 1, "rho": RHO, "gamma": GAMMA, "sigma": SIGMA, "eta": ETA},
}
WAYS = ("streamed", "kept", "whole", "widened", "checkpointed")
INSIDE = 3  # runs in a process on a GPU, where starting takes longer than running and times hardly vary
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 64,
    "vocab_size": 49152,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}


DRY = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
DRY |= {"vocab_size": 1024}
# How far two ways' sums of scores may lie apart: rounding of the compute dtype.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
DEVICES = {"cpu": "float32", "cuda": "bfloat16"}  # and what is computed in there, if nothing else is said
OF_WHOLE = 1.05  # time where everything is kept, by that of the model in memory
OF_WIDENED = 0.5  # taylor's time in bfloat16 by that of checkpointing in float32


def make_model(path: Path, layers: int, *, dry: bool = False) -> None:
    """A random checkpoint, written tensor by tensor."""
    from random_model import write_model

    write_model(path, {**CONFIG, **(DRY if dry else {}), "num_hidden_layers": layers})


def token_ids(path: Path) -> torch.Tensor:
    """The same tokens for every way."""
    vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
    return torch.randint(0, vocabulary, (SAMPLES, SEQ_LEN), generator=torch.Generator().manual_seed(1))


def memory(device: str) -> dict:
    """Peak memory of the process and, on a GPU, of the device."""
    from streamprune.figures import peak_rss

    return {"peak_rss": peak_rss()} | ({"peak_gpu": torch.cuda.max_memory_allocated()} if device == "cuda" else {})


def streamed(path: Path, method: str, device: str, dtype: str, *, keep: bool = False) -> dict:
    """Scores by sweeps; also what streamprune says it keeps in memory."""
    from streamprune.figures import peak_rss
    from streamprune.methods.sinks import UnitScores
    from streamprune.methods.table import METHODS as TABLE
    from streamprune.methods.table import resolve_settings
    from streamprune.pipeline.source import Source
    from streamprune.streaming.statistics import Statistics
    from streamprune.streaming.sweeper import default_micro_batch

    baseline = peak_rss()
    before = _io("rchar")
    micro_batch = default_micro_batch(SEQ_LEN)
    with Source(str(path), device=device, dtype=dtype, micro_batch=micro_batch).open() as sweeper:
        if keep:
            sweeper.pager.slots = sweeper.graphs = sweeper.n_layers
        checkpoint = sweeper.skeleton.checkpoint
        loaded, start = checkpoint.bytes_read, time.perf_counter()
        layers = range(4, sweeper.n_layers - 2)
        statistics = Statistics(sweeper, token_ids(path), layers, 0)
        scores = UnitScores(statistics.sweeper.skeleton.all_units(statistics.layers))
        TABLE[method].score(statistics, resolve_settings(method, METHODS[method]), scores)
        seconds = time.perf_counter() - start
        declared = held(sweeper, method, METHODS[method], layers)
        entries = sweeper.pager.entries
        sizes = [sum(entry.nbytes for entry in layer.values()) for layer in entries]
        return {
            "seconds": seconds,
            "checksum": sum(float(v.sum()) for kinds in scores.values.values() for v in kinds.values()),
            "baseline": baseline,
            "declared": declared,
            "bytes_read": checkpoint.bytes_read - loaded,
            "bytes_of_sweeps": sum(sizes) + sum(sizes[layers[0] :]),
            "rchar": _io("rchar") - before - loaded,
        }


def held(sweeper: Any, method: str, settings: dict[str, Any], layers: range, granularity: str = "units") -> dict:
    """Bytes that streamprune says a method holds, by purpose."""
    from streamprune.config import PruneConfig
    from streamprune.planning.decision import make_plan
    from streamprune.planning.footprint import scoring
    from streamprune.streaming.costs import Sizes

    config = PruneConfig(
        "random", Path("unused"), method, settings, granularity=granularity, layers=(layers.start, layers.stop)
    )
    plan = make_plan(config, sweeper.skeleton)
    stage = scoring(Sizes(sweeper), config, plan, (SAMPLES, SEQ_LEN), "device", "host", sweeper.micro_batch)
    return {**stage.device, **stage.host}


def whole(path: Path, method: str, device: str, dtype: str, *, checkpointing: bool) -> dict:
    """The same scores with everything in memory: w + δ is w in the first update, so δ = −γg either way."""
    from transformers import AutoModelForCausalLM

    from streamprune.figures import peak_rss

    baseline = peak_rss()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device)
    if checkpointing:
        # Checkpointing is only active in training mode; a Llama has no dropout to change.
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    start = time.perf_counter()
    model.requires_grad_(False)
    layers = range(4, model.config.num_hidden_layers - 2)
    scored = {
        (layer, name): p for layer in layers for name, p in model.model.layers[layer].named_parameters() if p.ndim == 2
    }
    originals = add_noise(scored) if method == "moreau-gs" else {}
    for p in scored.values():
        p.requires_grad_(True)
    ids = token_ids(path).to(device)
    model(ids, labels=ids, use_cache=False).loss.backward()
    total = 0.0
    with torch.no_grad():
        for key, p in scored.items():
            if method == "taylor":
                total += float((p * p.grad.float()).abs_().sum())
            else:
                dim = 1 if key[1].endswith(("o_proj.weight", "down_proj.weight")) else 0
                delta = p.grad.float().mul_(-GAMMA)
                norms = delta.norm(dim=1 - dim, keepdim=True)
                delta.mul_((1 - GAMMA * ETA / norms).clamp_(min=0))
                total += float((originals[key].float() * delta).abs_().sum()) / RHO
    return {"seconds": time.perf_counter() - start, "checksum": total, "baseline": baseline}


@torch.no_grad()
def add_noise(scored: dict[tuple[int, str], torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:
    """The noise that streamprune draws, tensors in parallel as there; returns the weights before it, bfloat16."""
    from streamprune.kernels import noise_seed, perturb

    originals = {key: p.detach().to(torch.bfloat16, copy=True) for key, p in scored.items()}
    on_gpu = any(p.is_cuda for p in scored.values())
    with ThreadPoolExecutor(1 if on_gpu else torch.get_num_threads()) as threads:
        drawing = [
            threads.submit(perturb, p.data, originals[key], None, SIGMA, noise_seed(0, 0, 0, *key))
            for key, p in scored.items()
        ]
        for draw in drawing:
            draw.result()
    return originals


def _io(field: str) -> int:
    for line in Path("/proc/self/io").read_text().splitlines():
        name, value = line.split(": ")
        if name == field:
            return int(value)
    raise OSError(f"/proc/self/io has no {field}")


def measure(path: Path, way: str, method: str, device: str, dtype: str) -> dict:
    """One measurement in a fresh process."""
    what = ["--one", way, "--method", method, "--device", device, "--dtype", dtype]
    done = subprocess.run(
        [sys.executable, __file__, "--scratch", str(path), *what],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def run_one(path: Path, way: str, method: str, device: str, dtype: str) -> None:
    """The fresh process: prints one JSON object."""
    with contextlib.redirect_stdout(sys.stderr):
        runs = []
        for _ in range(INSIDE if device == "cuda" else 1):
            if way in ("streamed", "kept"):
                runs.append(streamed(path, method, device, dtype, keep=way == "kept"))
            else:
                computed = "float32" if way == "widened" else dtype
                runs.append(whole(path, method, device, computed, checkpointing=way != "whole"))
        result = {**runs[0], "seconds": statistics.median(run["seconds"] for run in runs)}
    print(json.dumps({**result, **memory(device)}))


def compare(path: Path, layers: int, repeat: int, ways: tuple[str, ...], device: str, dtype: str) -> list[dict]:
    """All ways and methods, in turn, `repeat` times; medians."""
    rows = []
    for method in METHODS:
        runs: dict[str, list[dict]] = {way: [] for way in ways}
        for _ in range(repeat):
            for way in ways:
                runs[way].append(measure(path, way, method, device, dtype))
                print(f"  {layers} layers, {method}, {way}: {runs[way][-1]['seconds']:.1f} s", file=sys.stderr)
        sums = [run["checksum"] for way in ways for run in runs[way]]
        if max(sums) - min(sums) > TOLERANCE[dtype] * max(sums):
            raise SystemExit(f"the ways do not compute the same scores: {sums}")
        medians = {way: statistics.median(run["seconds"] for run in runs[way]) for way in ways}
        for way, seconds in medians.items():
            row = {**runs[way][-1], "layers": layers, "method": method, "way": way, "dtype": dtype}
            row |= {f"of_{other}": seconds / medians[other] for other in ("whole", "widened") if other in medians}
            peak = max(run["peak_rss"] for run in runs[way])
            rows.append(
                {**row, "seconds": seconds, "peak_rss": peak, "ratio": seconds / medians[ways[-1]]}
                | {"compared": len(ways) > 1}
            )
    return rows


def show(rows: list[dict]) -> str:
    """The table that is printed."""
    from streamprune.figures import human, table

    lines = [
        [
            "layers",
            "method",
            "way",
            "seconds",
            "of checkpointed",
            "peak RSS",
            "peak GPU",
            "declared",
            "read/layers' bytes",
        ]
    ]
    for row in rows:
        own = row["way"] in ("streamed", "kept")
        lines.append(
            [
                str(row["layers"]),
                row["method"],
                row["way"],
                f"{row['seconds']:.1f}",
                f"{row['ratio']:.2f}" if row["compared"] else "-",
                human(row["peak_rss"]),
                human(row["peak_gpu"]) if "peak_gpu" in row else "-",
                human(row["baseline"] + sum(row["declared"].values())) if own else "-",
                f"{row['bytes_read'] / row['bytes_of_sweeps']:.4f}" if own else "-",
            ]
        )
    return table(lines, markdown=True)


def verdicts(rows: list[dict], device: str) -> str:
    """The targets, and whether the streamed rows meet them."""
    lines = []
    for row in (row for row in rows if row["way"] in ("streamed", "kept")):
        name = f"{row['layers']} layers, {row['method']}, {row['way']}"
        lines += [f"{'met' if ok else 'MISSED'}: {name}: {what}" for what, ok in _checks(row, device).items()]
    return "\n".join(lines)


def _checks(row: dict, device: str) -> dict[str, bool]:
    if row["way"] == "kept":
        return {f"seconds / whole, {row['of_whole']:.2f} <= {OF_WHOLE}": row["of_whole"] <= OF_WHOLE}
    # On a GPU the declared bytes are the device's, where there is no interpreter.
    host = device == "cpu"
    declared = sum(row["declared"].values()) + (row["baseline"] if host else 0)
    peak = row["peak_rss" if host else "peak_gpu"]
    checks = {"peak / declared <= 1.10": peak / declared <= 1.10}
    if host:  # CUDA reads its libraries when they are first used
        checks["bytes asked of the kernel / layers' bytes <= 1.01"] = row["rchar"] / row["bytes_of_sweeps"] <= 1.01
    if row["compared"]:
        checks["seconds / checkpointed <= 1.05"] = row["ratio"] <= 1.05
    if "of_widened" in row and row["method"] == "taylor":
        checks[f"seconds / widened, {row['of_widened']:.2f} <= {OF_WIDENED}"] = row["of_widened"] <= OF_WIDENED
    return checks


@click.command()
@click.option("--scratch", type=click.Path(path_type=Path), required=True, help="Directory with 4 GB free.")
@click.option("--layers", type=int, default=24, help="Depth that all ways measure; half of it is streamed alone.")
@click.option("--repeat", type=int, default=5, help="Runs of each; medians are reported.")
@click.option("--device", type=click.Choice(list(DEVICES)), default="cpu", show_default=True)
@click.option("--dtype", type=click.Choice(list(TOLERANCE)), help="By default float32 on a CPU, bfloat16 on a GPU.")
@click.option("--model", type=click.Path(path_type=Path, exists=True), help="A real one instead, not halved.")
@click.option("--keep", type=click.Path(path_type=Path), help="Move the checkpoint there instead of removing it.")
@click.option("--dry", is_flag=True, help="A tiny model: only to see that everything runs.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--one", type=click.Choice(WAYS), hidden=True)
@click.option("--method", type=click.Choice(list(METHODS)), hidden=True)
def main(
    scratch: Path,
    layers: int,
    repeat: int,
    device: str,
    dtype: str | None,
    model: Path | None,
    keep: Path | None,
    dry: bool,
    json_file: Path | None,
    one: str,
    method: str,
) -> None:
    """Measure, print the table, and write JSON."""
    dtype = dtype or DEVICES[device]
    if one:
        run_one(scratch, one, method, device, dtype)
        return
    # on_gpu.sh keeps the script's own directory off the path.
    sys.path.insert(0, str(Path(__file__).parent))
    scratch.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="end-to-end-", dir=scratch))
    rows = []
    try:
        # Of fewer than 7 layers none is prunable.
        ways = tuple(way for way in WAYS if way != "widened" or (device, dtype) == ("cpu", "bfloat16"))
        halves = ((layers, ways, repeat), (max(7, layers // 2), ways[:1], 1))
        for depth, compared, times in () if model else halves:
            made = directory / str(depth)
            make_model(made, depth, dry=dry)
            rows += compare(made, depth, times, compared, device, dtype)
            if keep is not None and depth == layers:
                shutil.move(made, keep)
            else:
                shutil.rmtree(made)
        if model is not None:
            depth = json.loads((model / "config.json").read_text())["num_hidden_layers"]
            rows += compare(model, depth, repeat, ways, device, dtype)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {SAMPLES} x {SEQ_LEN} tokens, {device}, {dtype}\n")
    print(f"{show(rows)}\n\n{verdicts(rows, device)}")
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
