"""The main job at the size it is for: a model in Llama-2-7B's shape, streamed on a GPU, beside transformers in memory.

    python bench/main_job.py --scratch DIR [--device cuda] [--dry] [--seconds 540] [--row NAME ...] [--json FILE]

Makes the checkpoint of random weights in DIR (13.5 GB, removed afterwards) and measures the rows of ROWS, the most
important first, each in a fresh process: the first time in it and the second one, both on the same tokens as
transformers. Peaks stand beside the plan's and --gpu-memory, and each target beside what came of it. A row that would
not be through within --seconds is left out; FILE has each as soon as it is there.
--dry goes the same way on a CPU, with a tiny model and most rows in one process.
"""

from __future__ import annotations

import faulthandler
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

Figures = dict[str, Any]
GIB = 1 << 30
LONG, SHORT, REPAIR = (32, 2048), (10, 128), (128, 512)
DRY_SHAPES = {LONG: (3, 64), SHORT: (4, 32), REPAIR: (6, 48)}
DRY_FIELDS = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8, "vocab_size": 1024}
DRY_FIELDS |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}
DRY_STEPS = 3
MEMORY = "in memory: "  # how rows of transformers begin
# How far sums of scores may lie from transformers': rounding of the compute dtype.
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}


@dataclass(frozen=True)
class Row:
    """One process.

    Attributes:
        kind: what it runs: "rates", "score", "repair", "forward", or "memory", which is transformers.
        seconds: that the process is expected to take on an H100: with less left it is not begun.
        what: the method, or "forward".
        shape: sequences, and tokens of each.
        gib: --gpu-memory. slots: of a forward pass, None for all layers.
        beside: the row of transformers on the same tokens.
        again: runs after the first, of which the median counts.
    """

    kind: str
    seconds: float
    what: str = ""
    shape: tuple[int, int] = LONG
    gib: int | None = None
    slots: int | None = None
    beside: str | None = None
    again: int = 1


# The most important first. With 4 GiB hidden states go to the host, with 22 they stay on the device; of moreau-gs all
# state does in bfloat16, where with 12 it passes the link.
ROWS = {
    "rates": Row("rates", 20),
    "moreau-gs": Row("score", 55, "moreau-gs", SHORT, 22, beside=MEMORY + "moreau-gs"),
    "moreau-gs, 12 GiB": Row("score", 55, "moreau-gs", SHORT, 12, beside=MEMORY + "moreau-gs"),
    "repair": Row("repair", 50, "random", REPAIR, 22),
    MEMORY + "taylor": Row("memory", 50, "taylor"),
    "taylor, host": Row("score", 40, "taylor", LONG, 4, beside=MEMORY + "taylor"),
    "taylor, device": Row("score", 40, "taylor", LONG, 22, beside=MEMORY + "taylor"),
    MEMORY + "forward": Row("memory", 35, "forward", again=3),
    "forward, two slots": Row("forward", 25, "forward", slots=2, beside=MEMORY + "forward", again=3),
    "forward, all kept": Row("forward", 25, "forward", beside=MEMORY + "forward", again=3),
    "gblm": Row("score", 60, "gblm", LONG, 22, beside=MEMORY + "gblm"),
    MEMORY + "moreau-gs": Row("memory", 45, "moreau-gs", SHORT),
    MEMORY + "gblm": Row("memory", 60, "gblm"),
}
PROFILE_SECONDS = 55.0  # as a row's, of the slowest row once more
GRADIENT = ("weight gradient", "as_is")  # the product whose rate that of all arithmetic is taken to be
PATIENCE = 2.5  # times as long as a row is expected to take, and it is ended
LAST_LINES = 60  # of what a process that failed has said
OWN = ("score", "repair", "forward")


# In a process of its own.


def token_ids(path: Path, shape: tuple[int, int]) -> Any:
    """The same tokens for every way."""
    import torch

    vocabulary = json.loads((path / "config.json").read_text())["vocab_size"]
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def run_row(row: Row, path: Path, device_name: str, *, dry: bool, profile: bool) -> Iterator[Figures]:
    """Figures of a row, as they come."""
    import main_job_runs as runs
    import torch
    from in_memory import PEERS
    from timed import profiled, timed

    from streamprune.config import PruneConfig
    from streamprune.paging.device import device_name as name_of

    device = torch.device(device_name)
    yield {"device": name_of(device), "torch": torch.__version__}
    if row.kind == "rates":
        yield from runs.rates(device, dry=dry)
        return
    shape = DRY_SHAPES[row.shape] if dry else row.shape
    ids, settings = token_ids(path, shape), {"steps": DRY_STEPS} if dry and row.what == "moreau-gs" else {}
    dtype = "float32" if device.type == "cpu" else "auto"  # as transformers
    if row.kind == "memory":
        with PEERS[row.what](path, ids, device, settings) as run:
            yield from timed(run, device, row.again)
        return
    if row.kind == "forward":
        prepared = runs.forward(path, device_name, dtype, ids, row.slots)
    else:
        given: Figures = {"device": device_name, "dtype": dtype, "evaluate": False, "settings": settings}
        if row.gib is not None and device.type == "cuda":
            given["gpu_memory"] = row.gib * GIB
        given |= {"compensate": True} if row.kind == "repair" else dict(zip(("samples", "seq_len"), shape, strict=True))
        config = PruneConfig(str(path), Path("unused"), row.what, **given)
        prepared = {"score": runs.score, "repair": runs.repair}[row.kind](config, ids)
    with prepared as ready:
        yield ready.planned
        yield from timed(ready.run, device, row.again)
        if profile:
            yield {"profile": profiled(ready.run, device)}


# All of them, one after another.


@dataclass
class Results:
    """What is there so far, on the disk as soon as it is: figures by row, and the targets."""

    device: str
    file: Path | None
    rows: dict[str, Figures] = field(default_factory=dict)
    profile: Figures = field(default_factory=dict)

    def add(self, into: Figures, found: Figures) -> None:
        """Take in figures of a row."""
        into.update(found)
        if self.file is not None:
            new = self.file.with_name(self.file.name + ".new")
            new.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
            new.rename(self.file)

    def as_dict(self) -> Figures:
        """What goes into the file."""
        devices = {figures.pop("device"): None for figures in map(dict, self.rows.values()) if "device" in figures}
        said = [
            {"target": name, "value": value, "at_most": limit, "met": value is not None and value <= limit}
            for name, value, limit in targets(self)
        ]
        return {"device": ", ".join(devices), "rows": self.rows, "profile": self.profile, "targets": said}


@dataclass(frozen=True)
class Bench:
    """The measuring of rows on one checkpoint, up to a point in time."""

    path: Path
    results: Results
    deadline: float
    dry: bool

    def measure(self, name: str, into: Figures, *, profile: bool = False) -> None:
        """Measure a row in a fresh process, if there is time for it; what it says until it ends counts."""
        left, wanted = max(0.0, self.deadline - time.monotonic()), PROFILE_SECONDS if profile else ROWS[name].seconds
        if left < wanted and not self.dry:
            self.results.add(into, {"left_out": f"{left:.0f} s were left, and it may take {wanted:.0f}"})
            click.echo(f"  {name}: left out, {into['left_out']}", err=True)
            return
        if self.dry and ROWS[name].kind != "rates" and not profile:  # times say nothing: no process of its own
            for found in run_row(ROWS[name], self.path, self.results.device, dry=True, profile=False):
                self.results.add(into, found)
            return
        command = [sys.executable, __file__, "--one", name, "--scratch", str(self.path)]
        command += ["--device", self.results.device, *["--dry"] * self.dry, *["--profile"] * profile]
        # One that hangs does not keep the others from being measured.
        self.results.add(into, self._run(command, into, left if self.dry else min(left, PATIENCE * wanted)))
        shown = ", ".join(f"{key} {into[key]:.2f} s" for key in ("first", "second", "process") if key in into)
        click.echo(f"  {name}{', profiled' * profile}: {shown} {into.get('error', '')}", err=True)

    def _run(self, command: list[str], into: Figures, limit: float) -> Figures:
        """Take in what a process says, for so many seconds; return how long it took, and the error that it met."""
        start = time.monotonic()
        with (
            tempfile.TemporaryFile("w+") as said,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True) as process,
        ):
            # At the first it says where its threads are, and ends.
            killers = [threading.Timer(limit, process.terminate), threading.Timer(limit + 5, process.kill)]
            for killer in killers:
                killer.start()
            try:
                for line in process.stdout or ():
                    self.results.add(into, json.loads(line))
            finally:
                code = process.wait()
                for killer in killers:
                    killer.cancel()
            said.seek(0)
            last = said.read().strip().splitlines()[-LAST_LINES:]
        found: Figures = {"process": time.monotonic() - start}
        if code != 0:
            ended = [f"ended by signal {-code}, after {limit:.0f} s at the most"] if code < 0 else []
            found["error"] = "\n".join([*ended, *last])
        return found

    def measure_all(self, names: list[str]) -> None:
        """Measure rows; behind the last of streamprune's profile the slowest of them."""
        self.results.rows.update({name: {} for name in names})
        last = max((number for number, name in enumerate(names, 1) if ROWS[name].kind in OWN), default=0)
        for name in names[:last]:
            self.measure(name, self.results.rows[name])
        own = [name for name in names[:last] if ROWS[name].kind in OWN and "second" in self.results.rows[name]]
        if own:
            slowest = max(own, key=lambda name: self.results.rows[name]["second"])
            self.results.profile["row"] = slowest
            self.measure(slowest, self.results.profile, profile=True)
        for name in names[last:]:
            self.measure(name, self.results.rows[name])


# What must come of it.


def ratio(of: float | None, to: float | None) -> float | None:
    """A quotient, None where one of the two was not measured."""
    return None if of is None or to is None else of / to


def targets(results: Results) -> list[tuple[str, float | None, float]]:
    """What is wanted: its name, what was measured (None: it was not), and what that may be at the most."""
    rows = results.rows
    found: list[tuple[str, float | None, float]] = []

    def get(row: str | None, key: str) -> float | None:
        return rows.get(row or "", {}).get(key)

    for row in ("moreau-gs", "moreau-gs, 12 GiB"):
        least = ratio(get(row, "second"), bound(rows.get(row, {}), rows.get("rates", {})))
        found.append((f"{row}: seconds / the longer of link and arithmetic", least, 1.3))
    for row in ("taylor, host", "taylor, device"):
        peer = get(MEMORY + "taylor", "second")
        found.append((f"{row}: seconds / in memory, checkpointed", ratio(get(row, "second"), peer), 0.95))
        found.append((f"{row}: the first time / in memory, checkpointed", ratio(get(row, "first"), peer), 1.3))
        found.append((f"{row}: the first time / the second", ratio(get(row, "first"), get(row, "second")), 1.15))
    for row in ("forward, two slots", "forward, all kept"):
        found.append(
            (f"{row}: seconds / in memory", ratio(get(row, "second"), get(MEMORY + "forward", "second")), 1.03)
        )
    found.append(("gblm: seconds / taylor's", ratio(get("gblm", "second"), get("taylor, device", "second")), 2.0))
    found.append(("repair: seconds, the first time", get("repair", "first"), 10.0))
    for name, row in ROWS.items():
        if row.kind in ("score", "repair"):
            found.append((f"{name}: peak / plan", ratio(get(name, "peak"), get(name, "planned")), 1.1))
            found.append((f"{name}: plan / peak", ratio(get(name, "planned"), get(name, "peak")), 1.1))
            if results.device == "cuda":
                found.append(
                    (f"{name}: reserved / --gpu-memory", ratio(get(name, "reserved"), get(name, "limit")), 1.0)
                )
        if row.beside is not None:
            same = ratio(get(name, "sum"), get(row.beside, "sum"))
            apart = None if same is None else abs(same - 1)
            found.append((f"{name}: sum of scores, apart from in memory", apart, TOLERANCE[results.device]))
    own = results.profile.get("profile", {}).get("own")
    found.append((f"{results.profile.get('row', 'slowest row')}: our kernels' part, grad_norm apart", own, 0.03))
    return found


def bound(planned: Figures, rates: Figures) -> float | None:
    """Seconds that a row takes at the least: of its bytes over the link, each way, and of its products."""
    if "flops" not in planned or "products" not in rates:
        return None
    (product,) = (each for each in rates["products"] if (each["product"], each["way"]) == GRADIENT)
    link = [planned[way] / rates["link"][way] for way in ("up", "down")]
    return max(*link, planned["flops"] / product["flops"])


def verdicts(results: Results) -> str:
    """A line for each target."""
    lines = []
    for name, value, limit in targets(results):
        if value is None:
            lines.append(f"not measured: {name} <= {limit}")
        else:
            lines.append(f"{'met' if value <= limit else 'MISSED'}: {name} <= {limit}: {value:.4g}")
    return "\n".join(lines)


def show(results: Results) -> str:
    """The tables that are printed."""
    from streamprune.figures import human, table

    head = ["row", "first, s", "second, s", "planned, s", "of in memory", "peak", "reserved", "planned", "limit"]
    lines = [head]
    for name, figures in results.rows.items():
        if name == "rates":
            continue
        beside = results.rows.get(ROWS[name].beside or "", {})
        of_memory = ratio(figures.get("second"), beside.get("second"))
        times = [figures.get(key) for key in ("first", "second", "planned_seconds")]
        cells = ["-" if value is None else f"{value:.2f}" for value in (*times, of_memory)]
        sizes = [figures.get(key) for key in ("peak", "reserved", "planned", "limit")]
        lines.append([name, *cells, *("-" if size is None else human(size) for size in sizes)])
    parts, rates = [table(lines, markdown=True)], results.rows.get("rates", {})
    if "link" in rates:
        shown = (f"{way} {rates['link'][way] / 1e9:.1f}" for way in ("up", "down", "both", "registering"))
        parts.append(f"link, GB/s: {', '.join(shown)}; registered: {rates['link']['registered']}")
    products: list[list[str]] = [["product", "shape", "way", "TFLOP/s"]]
    for each in rates.get("products", []):
        sides = " x ".join(map(str, each["shape"]))
        products.append([each["product"], sides, each["way"], f"{each['flops'] / 1e12:.4g}"])
    operations = [["operation", "seconds", "calls", "share"]]
    profile = results.profile.get("profile", {})
    for each in profile.get("top", []):
        name = each["name"].replace("|", "¦")
        operations.append([name[:80], f"{each['seconds']:.4f}", str(each["calls"]), f"{each['share']:.1%}"])
    parts += [table(rows, markdown=True) for rows in (products, operations) if len(rows) > 1]
    if profile:
        said = f"{results.profile['row']}, profiled: {profile['wall']:.2f} s"
        parts.append(f"{said}, the device busy for {profile['busy']:.2f}; our kernels {profile['own']:.1%}")
    return "\n\n".join(parts)


@click.command()
@click.option("--scratch", type=click.Path(path_type=Path), required=True, help="Directory with 14 GB free.")
@click.option("--device", type=click.Choice(list(TOLERANCE)), help="By default cuda, and cpu with --dry.")
@click.option("--dry", is_flag=True, help="A tiny model on a CPU: only to see that everything runs.")
@click.option("--seconds", type=float, default=540.0, show_default=True, help="Time for all of it.")
@click.option("--row", "names", type=click.Choice(list(ROWS)), multiple=True, help="Only these, by default all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--one", type=click.Choice(list(ROWS)), hidden=True)
@click.option("--profile", is_flag=True, hidden=True)
def main(
    scratch: Path,
    device: str | None,
    dry: bool,
    seconds: float,
    names: tuple[str, ...],
    json_file: Path | None,
    one: str | None,
    profile: bool,
) -> None:
    """Measure, print the tables and which targets are met, and write JSON."""
    # on_gpu.sh keeps the script's own directory off the path.
    sys.path.insert(0, str(Path(__file__).parent))
    device = device or ("cpu" if dry else "cuda")
    if one is not None:
        faulthandler.register(signal.SIGTERM, all_threads=True, chain=True)
        for found in run_row(ROWS[one], scratch, device, dry=dry, profile=profile):
            print(json.dumps(found), flush=True)
        return
    from plans import LLAMA, MODELS
    from random_model import write_model

    deadline, results = time.monotonic() + seconds, Results(device, json_file)
    scratch.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="main-job-", dir=scratch))
    try:
        write_model(directory / "model", {**LLAMA, **MODELS["llama-2-7b"], **(DRY_FIELDS if dry else {})})
        click.echo(f"  the checkpoint: {time.monotonic() - deadline + seconds:.1f} s", err=True)
        Bench(directory / "model", results, deadline, dry).measure_all(list(names or ROWS))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(f"{results.as_dict()['device']}\n\n{show(results)}\n\n{verdicts(results)}")
    if any("error" in figures for figures in (*results.rows.values(), results.profile)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
