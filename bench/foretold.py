"""`streamprune plan --measure` against the run: peak memory and seconds of scoring, for runs of different kinds.

    python bench/foretold.py --scratch DIR [--device cuda] [--json FILE] [--data DIR]

The demo's 135M Llama and a random one of 12 layers of 1.7B's (made in DIR, removed afterwards), methods, budgets and
sizes as in RUNS; plan and run in a process each, one after the other. DIR of --data holds wikitext2-valid.txt; without
it the text in the package is used, which is short. On a GPU the budgets are the GPU's, and so are the peaks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

SMALL, LARGE = "135M", "0.9B"
GIB = 1 << 30
RUNS: list[tuple[str, str, dict[str, Any]]] = [
    (SMALL, "taylor", {"samples": 10, "seq_len": 128}),
    (SMALL, "moreau-gs", {"settings": {"steps": 3}, "host_memory": 2 * GIB}),
    (SMALL, "wanda", {"granularity": "2:4", "samples": 32, "seq_len": 256}),
    (SMALL, "block-influence", {"granularity": "layers", "samples": 64, "seq_len": 256}),
    (LARGE, "taylor", {"samples": 10, "seq_len": 128, "layers": (0, 12)}),
    (LARGE, "moreau-gs", {"settings": {"steps": 1}, "layers": (2, 10), "host_memory": 4 * GIB}),
    (LARGE, "sparsegpt", {"granularity": "weights", "samples": 4, "seq_len": 256, "layers": (0, 2)}),
]


def one(job: dict[str, Any]) -> dict[str, Any]:
    """A plan or a run, in this process."""
    from streamprune import PruneConfig, prune
    from streamprune.pipeline.run import foretell

    fields = {key: tuple(value) if key == "layers" else value for key, value in job["options"].items()}
    gpu = fields["device"] == "cuda"
    if gpu and "host_memory" in fields:
        fields["gpu_memory"] = fields.pop("host_memory")
    config = PruneConfig(job["model"], Path(job["output"]), job["method"], evaluate=False, **fields)
    if job["plan"]:
        forecast = foretell(config, measure=True)
        scoring = next(name for name in forecast.seconds if name.startswith("scoring"))
        placement = forecast.placement
        peak = placement.device_bytes if gpu else placement.host_bytes
        return {"peak": peak, "seconds": forecast.seconds[scoring]}
    facts = prune(config).facts
    peak = facts["scoring"]["peak_gpu"] if gpu else facts["peak_rss"]
    return {"peak": peak, "seconds": facts["scoring"]["seconds"]}


def in_process(job: dict[str, Any]) -> dict[str, Any]:
    """The same in a fresh one."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", json.dumps(job)], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@click.command()
@click.option("--scratch", type=click.Path(path_type=Path), help="Directory with 6 GB free.")
@click.option("--data", type=click.Path(path_type=Path, exists=True))
@click.option("--model", "small", type=click.Path(path_type=Path), help="Instead of the demo's, which is fetched.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--one", "job", hidden=True)
def main(
    scratch: Path | None, data: Path | None, small: Path | None, device: str, json_file: Path | None, job: str | None
) -> None:
    """Measure, print the table, and write JSON."""
    sys.path.insert(0, str(Path(__file__).parent))
    if job is not None:
        print(json.dumps(one(json.loads(job))))
        return
    if scratch is None:
        raise click.UsageError("--scratch is missing")
    from end_to_end import CONFIG
    from random_model import save_tokenizer, write_model

    from streamprune.commands import demo
    from streamprune.figures import human, table
    from streamprune.pipeline.progress import Progress
    from streamprune.planning.rates import default_cache

    scratch.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="foretold-", dir=scratch))
    rows = [["model", "method", "options", "peak planned", "peak", "ratio", "seconds planned", "seconds", "ratio"]]
    figures = []
    try:
        write_model(directory / "model", {**CONFIG, "num_hidden_layers": 12})
        save_tokenizer(directory / "model")
        models = {SMALL: small or demo.fetch(default_cache(), Progress()), LARGE: directory / "model"}
        text = {} if data is None else {"calibration": str(data / "wikitext2-valid.txt")}
        for model, method, options in RUNS:
            given = {"samples": 10, "seq_len": 128, "scratch": str(directory), "device": device, **text, **options}
            job_of = {"model": str(models[model]), "method": method, "output": str(directory / "out"), "options": given}
            planned, real = (in_process({**job_of, "plan": plan}) for plan in (True, False))
            shutil.rmtree(directory / "out")
            figures.append({"model": model, "method": method, "options": options, "planned": planned, "real": real})
            said = ", ".join(f"{name} {value}" for name, value in options.items() if name != "settings")
            cells = [human(planned["peak"]), human(real["peak"]), f"{real['peak'] / planned['peak']:.2f}"]
            cells += [
                f"{planned['seconds']:.1f}",
                f"{real['seconds']:.1f}",
                f"{real['seconds'] / planned['seconds']:.2f}",
            ]
            rows.append([model, method, said, *cells])
            print(table(rows, markdown=True), file=sys.stderr)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    print(table(rows, markdown=True))
    if json_file:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
