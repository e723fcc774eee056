"""SIGKILL at random moments of a run, resumed each time: the output is byte-identical to the undisturbed run's.

    python bench/killed.py [--kills 200] [--command NAME] [--json FILE]

A random Llama of 8 layers is pruned by several commands with --resume. Each trial kills the process at a random moment
of the undisturbed run's time (scoring, repair, writing of shards and of the journal among them), kills every second one
once more while it goes on, and lets it end. Kills count that found the output not there yet; trials go on until there
are enough. Processes are forked from one that has imported everything, so that moments
fall into the work and not into imports. Nothing may ever stand at the output path before it is whole.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 8,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
COMMANDS = {
    "moreau-gs": ["--method", "moreau-gs", "--set", "steps=3"],
    "taylor, repaired": ["--method", "taylor", "--compensate", "--compensate-tokens", "8192"],
    "sparsegpt 2:4": ["--method", "sparsegpt", "--granularity", "2:4", "--layers", "0:8"],
    "gblm weights": ["--method", "gblm", "--granularity", "weights", "--layers", "0:8"],
    "bernoulli": ["--method", "bernoulli", "--set", "init=taylor", "--set", "steps=40", "--set", "per_pass=2"],
}
COMMON = ["--no-evaluate", "--quiet", "--samples", "8", "--seq-len", "64", "--max-shard-size", "1MB", "--resume"]


def start(model: Path, output: Path, options: list[str], *, modules: Path | None = None) -> int:
    """The command in a forked process; its id. In the end it may write down the `modules` that it has imported."""
    child = os.fork()
    if child == 0:
        # The parent has never computed, so torch's threads are the child's own.
        from streamprune.cli import main

        with contextlib.suppress(BaseException):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            if not os.environ.get("SHOW"):
                os.dup2(null, 2)
            main(["--model", str(model), "--output", str(output), *COMMON, *options])
        if modules is not None:
            modules.write_text(" ".join(sys.modules))
        os._exit(0 if output.is_dir() else 1)
    return child


def wait(child: int) -> int:
    """Its exit status; of a killed one the signal, negative."""
    status = os.waitpid(child, 0)[1]
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def digest(output: Path) -> str:
    """SHA-256 of every file but those that say how long it took."""
    total = hashlib.sha256()
    for file in sorted(output.iterdir()):
        if file.name not in ("streamprune.json", "README.md"):
            total.update(file.name.encode() + file.read_bytes())
    return total.hexdigest()


def trial(
    model: Path, output: Path, options: list[str], seconds: float, again: bool, draw: random.Random
) -> tuple[str, int]:
    """Kill, resume, and look: what the killed run left, by its journal, and how many kills found no output yet."""
    journal = output.with_name(f".{output.name}.resume")
    left = "nothing yet"
    times = 2 if again else 1
    for landed in range(times):
        child = start(model, output, options)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        status = wait(child)
        if output.exists():
            if status != 0:  # killed between the output's name and the journal's end: the command then clears that away
                wait(start(model, output, options))
            return "ended before", landed
        if (journal / "journal.json").is_file():
            left = (
                "scoring" if "scored" not in json.loads((journal / "journal.json").read_text())["facts"] else "writing"
            )
    if wait(start(model, output, options)) != 0:
        raise SystemExit(f"{options} did not end when it was resumed")
    return left, times


def measure(scratch: Path, kills: int, commands: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Trials until `kills` have landed, over all commands."""
    from random_model import save_tokenizer, write_model

    draw, rows = random.Random(0), []
    model = scratch / "model"
    pid = os.fork()  # writing the model computes, which the parent must not
    if pid == 0:
        write_model(model, CONFIG)
        save_tokenizer(model)
        os._exit(0)
    wait(pid)
    for options in commands.values():  # what a command imports, once
        wait(start(model, scratch / "whole", options, modules=scratch / "modules"))
        shutil.rmtree(scratch / "whole")
        for module in (scratch / "modules").read_text().split():
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
    (scratch / "modules").unlink()
    for name, options in commands.items():
        begin = time.perf_counter()
        if wait(start(model, scratch / "whole", options)) != 0:
            raise SystemExit(f"{name}: the undisturbed run failed")
        seconds = time.perf_counter() - begin
        expected, left, same, landed = digest(scratch / "whole"), collections.Counter[str](), 0, 0
        while landed < kills / len(commands):
            number = left.total()
            output = scratch / f"killed-{number}"
            where, hits = trial(model, output, options, seconds, number % 2 == 1, draw)
            left[where] += 1
            landed += hits
            same += digest(output) == expected
            shutil.rmtree(output)
        leftovers = [file.name for file in scratch.iterdir() if file.name not in ("model", "whole")]
        shutil.rmtree(scratch / "whole")
        rows.append({"command": name, "seconds": seconds, "kills": landed, "trials": left.total(), "identical": same})
        rows[-1]["killed in"] = left
        rows[-1]["leftovers"] = leftovers
    return rows


@click.command()
@click.option("--kills", type=int, default=200, show_default=True, help="Over all commands.")
@click.option("--command", "only", type=click.Choice(list(COMMANDS)), multiple=True, help="Only this; repeatable.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(kills: int, only: tuple[str, ...], json_file: Path | None) -> None:
    """Measure, print the table, and write JSON."""
    sys.path.insert(0, str(Path(__file__).parent))
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(Path(directory), kills, {name: COMMANDS[name] for name in only or COMMANDS})
    from streamprune.figures import table

    lines = [["command", "undisturbed, s", "kills", "trials", "identical", "killed while", "left behind"]]
    for row in rows:
        where = ", ".join(f"{what} {count}" for what, count in sorted(row["killed in"].items()))
        counts = [str(row[name]) for name in ("kills", "trials", "identical")]
        lines.append([row["command"], f"{row['seconds']:.1f}", *counts, where, str(len(row["leftovers"]))])
    print(table(lines, markdown=True))
    if json_file:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")
    if any(row["identical"] < row["trials"] or row["leftovers"] for row in rows):
        raise SystemExit("MISSED: a resumed run differs, or left something behind")


if __name__ == "__main__":
    main()
