"""How many channels that go are others after a rounding or a little noise of the weights: MoreauPruner's claim.

    python bench/robustness.py --work DIR --data DIR --json FILE [--method NAME]... [--draws N] [--samples N]
        [--half] [--no-alone] [--row NAME]...

Copies of the demo's 135M Llama: as stored (bfloat16), in float16, with matrices rounded to int8 by row, and with
Gaussian noise of 0.2 % and 1 % of each weight. Each is scored by taylor, smoothgrad, moreau and moreau-gs with their
papers' numbers on 10 x 128 tokens of wikitext2-valid.txt, layers 4:28. Of the 5 to 20 % of a layer's channels that go,
the share that are others than those of the copy as stored (Table 1 of 2406.07017, which has bfloat16 beside float16);
Spearman's correlation of a layer's scores (its Figure 2); and perplexity of 20 x 128 tokens
of wikitext2-test.txt where only one layer loses 20 % (its Figure 3). Another draw of the calibration is there to
compare with.

All but what a row's name says is computed in float32. `--half` adds float16 beside bfloat16, each computed in itself as
in the paper; it is there by default on a GPU, since CPUs without AVX512-FP16 take minutes for a sweep in float16, and
those without AVX512-BF16 as long in bfloat16 (`--row` leaves that out). What is stored here came from bfloat16, which
float16 holds but for the smallest: the noise of 0.2 % is as large as what bfloat16 rounds off a float16 weight, as the
paper's models have them.

Scores are kept in DIR (2.2 GB with the copies): what is there is not made again. smoothgrad takes 100 sweeps for each
of seven sets of scores, a quarter of an hour each on two idle cores: `--draws` and `--samples` make less of it, and are
recorded. Rows of a method whose figures the JSON file has are not scored again.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamprune import PruneConfig
from streamprune.commands import demo
from streamprune.figures import table
from streamprune.output import companions
from streamprune.pipeline.job import Job
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.source import Source
from streamprune.planning.decision import make_plan
from streamprune.planning.rates import default_cache
from streamprune.reports.ranks import spearman
from streamprune.storage.journal import Key
from streamprune.storage.scores import SCORES_FILE, read_scores, write_scores
from streamprune.streaming.sweeper import default_micro_batch
from streamprune.texts.corpus import open_corpus

NAMES = ("taylor", "smoothgrad", "moreau", "moreau-gs")
LAYERS, RATIOS = range(4, 28), (0.05, 0.10, 0.15, 0.20)
LENGTH = 128
SEGMENTS, ALONE = 20, 0.20
STORED, OWN = "stored", "float16 beside bfloat16, each computed in itself"
Scores = Mapping[Key, Tensor]


def rounded(weight: Tensor) -> Tensor:
    """A matrix rounded to int8, with a scale for each row."""
    scale = weight.abs().amax(1, keepdim=True).clamp_min(1e-30) / 127
    return (weight / scale).round() * scale


def noisy(share: float) -> Callable[[Tensor], Tensor]:
    """A function that adds Gaussian noise of this share of each weight."""
    random = torch.Generator().manual_seed(0)
    return lambda weight: weight + share * weight.abs() * torch.randn(weight.shape, generator=random)


# Copy -> its dtype, and what becomes of the layers' matrices.
COPIES: dict[str, tuple[torch.dtype, Callable[[Tensor], Tensor]]] = {
    "float16": (torch.float16, lambda weight: weight),
    "int8": (torch.float32, rounded),
    "noise 0.2%": (torch.float32, noisy(0.002)),
    "noise 1%": (torch.float32, noisy(0.01)),
}
# Row -> the two (copy, computed in, seed of the calibration).
ROWS: dict[str, tuple[tuple[str, str, int], tuple[str, str, int]]] = {
    OWN: ((STORED, "bfloat16", 0), ("float16", "float16", 0)),
    "computed in bfloat16": ((STORED, "float32", 0), (STORED, "bfloat16", 0)),
    **{name: ((STORED, "float32", 0), (name, "float32", 0)) for name in COPIES},
    "other calibration": ((STORED, "float32", 0), (STORED, "float32", 1)),
}


def copy_of(name: str, model: Path, work: Path) -> Path:
    """The directory of a copy, made where it is not there yet."""
    if name == STORED:
        return model
    target, (dtype, change) = work / name.replace(" ", "-"), COPIES[name]
    if not target.is_dir():
        partial = target.with_name(f".{target.name}")
        partial.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            if file.suffix != ".safetensors":
                (partial / file.name).write_bytes(file.read_bytes())
        tensors = {
            key: (change(value.float()) if "layers" in key and value.dim() == 2 else value).to(dtype)
            for key, value in load_file(model / "model.safetensors").items()
        }
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        partial.rename(target)
    return target


def scores_of(
    method: str, run: tuple[str, str, int], model: Path, work: Path, data: Path, draws: int, samples: int
) -> Scores:
    """Scores of the channels, made where they are not there yet."""
    copy, dtype, seed = run
    settings = {"draws": str(draws)} if method == "smoothgrad" else {}
    amounts = [*settings.values(), str(samples), str(seed)]
    place = work / "-".join(["scores", method, copy.replace(" ", "-"), dtype, *amounts])
    if not (place / SCORES_FILE).is_file():
        start = time.perf_counter()
        source = Source(str(copy_of(copy, model, work)), dtype=dtype, micro_batch=default_micro_batch(LENGTH))
        with source.open() as sweeper:
            config = PruneConfig(model, place, method=method, settings=settings, layers=(LAYERS.start, LAYERS.stop))
            plan = make_plan(config, sweeper.skeleton)
            text = data / "wikitext2-valid.txt"
            ids = open_corpus(model, text).sequences(samples, LENGTH, sampling="random", seed=seed)
            beside = companions.prepare(plan.form)
            scores = Job(config, plan, sweeper, Progress(quiet=True), ids, None, beside).score()
            place.mkdir(parents=True, exist_ok=True)
            write_scores(place, scores.by_key(), {"method": method})
        click.echo(f"{place.name}: {time.perf_counter() - start:.0f} s", err=True)
    found, _ = read_scores(place)
    return {key: values for key, values in found.items() if key[1] == "channel"}


def gone(values: Tensor, ratio: float) -> set[int]:
    """The channels that go, the lowest index first where scores are equal."""
    return set(values.argsort(stable=True)[: math.floor(ratio * len(values) + 0.5)].tolist())


def differing(one: Scores, other: Scores, ratio: float) -> tuple[int, int]:
    """How many of the channels that go are others, and of how many."""
    pairs = [(gone(values, ratio), gone(other[key], ratio)) for key, values in one.items()]
    return sum(len(a - b) for a, b in pairs), sum(len(a) for a, _ in pairs)


def compared(one: Scores, other: Scores) -> dict[str, Any]:
    """Table 1 and Figure 2 of one row and method."""
    counts = {f"{ratio:.0%}": differing(one, other, ratio) for ratio in RATIOS}
    ranks = {str(layer): spearman(one[layer, "channel"], other[layer, "channel"]) for layer in LAYERS}
    return {"others": counts, "ranks": ranks}


def layer_alone(model: Path, data: Path, chosen: Mapping[str, Scores]) -> dict[str, Any]:
    """Perplexity where one layer alone loses channels, by whose scores, and that of the dense model."""
    from transformers import AutoModelForCausalLM

    segments = open_corpus(model, data / "wikitext2-test.txt").segments(LENGTH, SEGMENTS)
    dense: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    layers = dense.model.layers

    @torch.no_grad()
    def perplexity_from(layer: int, hidden: Tensor) -> float:
        """Of the layers from one on: what lies below is the same for all."""
        dense.model.layers = layers[layer:]
        return math.exp(float(dense(inputs_embeds=hidden, labels=segments, use_cache=False).loss))

    with torch.no_grad():
        whole = dense(segments, labels=segments, output_hidden_states=True)
    found: dict[str, Any] = {"dense": math.exp(float(whole.loss))}
    for name, scores in chosen.items():
        found[name] = {}
        for layer in LAYERS:
            weight = layers[layer].mlp.down_proj.weight
            before = weight.detach().clone()
            with torch.no_grad():
                weight[:, sorted(gone(scores[layer, "channel"], ALONE))] = 0
            found[name][str(layer)] = perplexity_from(layer, whole.hidden_states[layer])
            with torch.no_grad():
                weight.copy_(before)
    return found


def shown(results: Mapping[str, Any]) -> str:
    """The tables, with their verdicts."""
    names = list(results["methods"])
    lines = [["changed", "of what goes", *names]]
    rows = list(results["methods"][names[0]])
    for row in rows:
        for ratio in (f"{each:.0%}" for each in RATIOS):
            found = [results["methods"][name].get(row, {"others": {ratio: None}})["others"][ratio] for name in names]
            lines.append([row, ratio, *("-" if each is None else f"{each[0] / each[1]:.1%}" for each in found)])
    parts = [table(lines, markdown=True), "", *(f"- {each}" for each in verdicts(results)), ""]
    ranks = [["changed", "method", "lowest correlation", "in layer", "median"]]
    for row in rows:
        for name in (each for each in names if row in results["methods"][each]):
            found = results["methods"][name][row]["ranks"]
            layer = min(found, key=found.get)
            ranks.append([row, name, f"{found[layer]:.4f}", layer, f"{statistics.median(found.values()):.4f}"])
    parts += [table(ranks, markdown=True), ""]
    if "alone" in results:
        parts += _alone_lines(results["alone"])
    return "\n".join(parts)


def _alone_lines(found: Mapping[str, Any]) -> list[str]:
    """Figure 3 as a table: by layer, and what all of them say."""
    names = [name for name in found if name != "dense"]
    rows = [["only layer", *names]]
    rows += [[str(layer), *(f"{found[name][str(layer)]:.2f}" for name in names)] for layer in LAYERS]
    worst = {name: max(found[name], key=found[name].get) for name in names}
    said = ", ".join(f"{name}: {layer}" for name, layer in worst.items())
    return [table(rows, markdown=True), f"dense {found['dense']:.2f}; the layer that costs most by {said}"]


def verdicts(results: Mapping[str, Any]) -> list[str]:
    """What the table says of the paper's two claims, in words."""
    methods = results["methods"]

    def share(name: str, row: str, ratio: float) -> float:
        count, of = methods[name][row]["others"][f"{ratio:.0%}"]
        return count / of

    most = f"{RATIOS[-1]:.0%}"
    lines = [
        f"{name}: of the {most} that go, others by "
        + ", ".join(f"{row} {share(name, row, RATIOS[-1]):.1%}" for row in rows)
        for name, rows in methods.items()
    ]
    for row in next(iter(methods.values())):
        for ours in ("moreau", "moreau-gs"):
            for other in ("taylor", "smoothgrad"):
                if row in methods.get(ours, ()) and row in methods.get(other, ()):
                    fewer = sum(share(ours, row, ratio) < share(other, row, ratio) for ratio in RATIOS)
                    lines.append(f"{row}: {ours} changes fewer than {other} at {fewer} of {len(RATIOS)} ratios")
    return lines


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True, help="Copies and scores are kept here.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), required=True, help="Write the figures here.")
@click.option("--method", "names", multiple=True, default=NAMES, type=click.Choice(NAMES))
@click.option("--draws", default=100, help="Of smoothgrad.")
@click.option("--samples", default=10, help="Sequences.")
@click.option("--row", "only", multiple=True, type=click.Choice(list(ROWS)), help="Only this one; repeatable.")
@click.option("--half/--no-half", default=torch.cuda.is_available(), help="Compute in float16 too.")
@click.option("--alone/--no-alone", default=True, help="Figure 3, a pass of the model for each layer and method.")
def main(
    work: Path,
    data: Path,
    json_file: Path,
    names: Sequence[str],
    draws: int,
    samples: int,
    only: Sequence[str],
    half: bool,
    alone: bool,
) -> None:
    """Score, compare, print the tables, and write JSON."""
    model = Path(demo.fetch(default_cache(), Progress()))
    given = {"smoothgrad draws": draws, "sequences": samples}
    results: dict[str, Any] = json.loads(json_file.read_text()) if json_file.exists() else {**given, "methods": {}}
    if any(results[name] != value for name, value in given.items()):
        raise click.UsageError(f"{json_file} has figures of other --draws or --samples; name another file")
    scored = partial(scores_of, model=model, work=work, data=data, draws=draws, samples=samples)
    rows = {row: runs for row, runs in ROWS.items() if (row in only if only else half or row != OWN)}
    for name in names:
        there = results["methods"].get(name, {})
        made = {row: (scored(name, one), scored(name, other)) for row, (one, other) in rows.items() if row not in there}
        there |= {row: compared(*pair) for row, pair in made.items()}
        results["methods"][name] = {row: there[row] for row in ROWS if row in there}
        json_file.write_text(json.dumps(results, indent=1) + "\n")
    if alone:
        results["alone"] = layer_alone(model, data, {name: scored(name, (STORED, "float32", 0)) for name in names})
    results["verdicts"] = verdicts(results)
    json_file.write_text(json.dumps(results, indent=1) + "\n")
    print(shown(results))


if __name__ == "__main__":
    main()
