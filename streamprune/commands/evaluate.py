"""`streamprune eval`: the perplexity of a model of any size, or its scores on tasks."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from streamprune.commands.options import COMPUTE_OPTIONS, with_options
from streamprune.commands.prune import progress_of_options
from streamprune.errors import UsageError
from streamprune.figures import table
from streamprune.pipeline.evaluate import evaluate
from streamprune.storage.directory import check_file, write_whole
from streamprune.tasks.evaluate import evaluate_tasks

if TYPE_CHECKING:
    from streamprune.tasks.evaluate import TaskScores

OF_TEXT = {"text": None, "field": "text", "seq_len": 128, "samples": None}
OF_TASKS = {"task_data": None, "limit": None, "num_fewshot": None, "json_file": None}


@click.command(name="eval")
@click.option("--model", required=True, help="Model directory (dense or pruned) or hub id.")
@click.option("--text", help="Text, as --calibration; else embedded held-out prose.")
@click.option("--field", default="text", help="Of the text in records and tables.")
@click.option("--seq-len", type=int, default=128, show_default=True, help="Tokens of a segment.")
@click.option("--samples", type=int, help="Segments from the start of the text; all by default.")
@click.option("--tasks", metavar="NAMES", help="Instead of a text: lm-eval's, or a suite: moreau, gblm, bernoulli.")
@click.option("--task-data", type=click.Path(path_type=Path), metavar="DIR", help="Of the tasks; else from the hub.")
@click.option("--limit", type=int, help="Questions of each task, from the first; all by default.")
@click.option("--num-fewshot", type=int, help="Examples before each question; the task's own number by default.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the scores there.")
@click.option("--overwrite", is_flag=True, help="Replace that file if it exists.")
@with_options(COMPUTE_OPTIONS)
@click.option("--quiet", is_flag=True, help="No progress.")
@click.option("--json-progress", is_flag=True, help="Progress for machines: a JSON object per line on stderr.")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def evaluate_command(quiet: bool, json_progress: bool, debug: bool, overwrite: bool, **options: Any) -> None:
    """Streamed perplexity of a model of any size, over non-overlapping segments; with --tasks its scores on those."""
    of_text = {name: options.pop(name) for name in OF_TEXT}
    of_tasks = {name: options.pop(name) for name in OF_TASKS}
    tasks = options.pop("tasks")
    for name, default in (OF_TASKS if tasks is None else OF_TEXT).items():
        if (of_text | of_tasks)[name] != default:
            flag = "--json" if name == "json_file" else f"--{name.replace('_', '-')}"
            belongs = (
                "is of --tasks; name some, or leave it out"
                if tasks is None
                else "is of a text; leave it or --tasks out"
            )
            raise UsageError(f"{flag} {belongs}")
    with progress_of_options(quiet, json_progress) as progress:
        if tasks is None:
            found = evaluate(**options, **of_text, progress=progress)
            text = f"perplexity {found.perplexity:.4f} (loss {found.loss:.6f} nats, {found.text}, in {found.dtype})"
        else:
            file = of_tasks.pop("json_file")
            if file is not None:
                check_file(file, "--json", overwrite=overwrite)
            scores = evaluate_tasks(tasks=tasks, **options, **of_tasks, progress=progress)
            text = _shown(scores)
    click.echo(text)  # first: scores take hours, and the file may not be writable any more
    if tasks is not None and file is not None:
        whole = asdict(scores) | {"mean": scores.mean, "mean_stderr": scores.mean_stderr}
        write_whole(file, (json.dumps(whole, indent=1) + "\n").encode())


def _shown(scores: TaskScores) -> str:
    rows = [["task", "metric", "value", "± error", "n"]]
    for each in scores.scores:
        stderr = "-" if each.stderr is None else f"{each.stderr:.4f}"
        rows.append([each.task, each.metric, f"{each.value:.4f}", stderr, f"{each.n:,}"])
    mains = [each for each in scores.scores if each.main]
    if len(mains) > 1:
        stderr = "-" if scores.mean_stderr is None else f"{scores.mean_stderr:.4f}"
        rows.append(["mean", "the first of each", f"{scores.mean:.4f}", stderr, f"{sum(each.n for each in mains):,}"])
    return f"{table(rows)}\nin {scores.dtype}"
