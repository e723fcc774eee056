"""Recovery after pruning: plain LoRA beside LoRA with the dense model as teacher, on the demo's 135M Llama.

    python bench/recover.py --data DIR --scratch DIR [--method wanda-sp] [--steps N] [--json bench/results/recover.json]

Prunes 20 % of the units of layers 4:28 with the repair, calibrated on 64 x 512 tokens of DIR/wikitext2-valid.txt, and
trains what is left on that text: 256 tokens a sequence, 64 of them a step, two epochs unless --steps says less.
Perplexity is that of 100 x 128 tokens of DIR/wikitext2-test.txt. `streamed` trains as `plain` does, layer by layer. All
in float32; a result that the JSON file has is not measured again.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click

from streamprune import PruneConfig, RecoverConfig, prune, recover
from streamprune.commands import demo
from streamprune.figures import human, table
from streamprune.pipeline.progress import Progress
from streamprune.planning.rates import default_cache

WAYS: dict[str, dict[str, Any]] = {"plain": {}, "distill": {"distill": True}, "streamed": {"streamed": True}}


def pruned(model: str, data: Path, method: str, output: Path) -> dict[str, Any]:
    """Prune and repair the model, unless that is there; its streamprune.json."""
    if not output.exists():
        config = PruneConfig(
            model=model,
            output=output,
            method=method,
            ratio=0.2,
            layers=(4, 28),
            dtype="float32",
            compensate=True,
            compensate_tokens=32768,
            calibration=str(data / "wikitext2-valid.txt"),
            samples=64,
            seq_len=512,
            evaluate=str(data / "wikitext2-test.txt"),
        )
        prune(config, progress=True)
    return json.loads((output / "streamprune.json").read_text())


def recovered(model: str, source: Path, data: Path, output: Path, way: str, given: dict[str, Any]) -> dict[str, Any]:
    """Train what pruning left in one of the ways: perplexities, loss, seconds and memory."""
    options = dict(WAYS[way])
    if options.pop("distill", False):
        options["distill"] = model
    config = RecoverConfig(
        model=str(source),
        output=output,
        data=str(data / "wikitext2-valid.txt"),
        dtype="float32",
        evaluate=str(data / "wikitext2-test.txt"),
        overwrite=True,
        **options,
        **given,
    )
    facts = recover(config, progress=True).facts["recovery"]
    lines = (output / "recovery.jsonl").read_text().splitlines()
    shutil.rmtree(output)
    kept = {name: facts[name] for name in ("perplexity", "loss", "seconds", "peak_rss")}
    return kept | {"steps": len(lines), "training loss": [json.loads(line)["loss"] for line in lines]}


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--scratch", type=click.Path(path_type=Path), required=True, help="Pruned models lie there.")
@click.option("--model", help="By default the demo's, fetched if need be.")
@click.option("--method", default="wanda-sp", show_default=True)
@click.option("--steps", type=int, help="Of each training.")
@click.option("--batch", type=int, default=64, show_default=True)
@click.option("--cutoff", type=int, default=256, show_default=True)
@click.option("--learning-rate", type=float, default=1e-4, show_default=True)
@click.option("--way", "ways", multiple=True, type=click.Choice([*WAYS]), help="By default all.")
@click.option("--json", "json_file", type=click.Path(path_type=Path))
def main(
    data: Path,
    scratch: Path,
    model: str | None,
    method: str,
    ways: tuple[str, ...],
    json_file: Path | None,
    **given: Any,
) -> None:
    """Prune, train, and print the table."""
    model = model or str(demo.fetch(default_cache(), Progress()))
    scratch.mkdir(parents=True, exist_ok=True)
    source = scratch / method
    facts = pruned(model, data, method, source)["perplexity"]
    results = json.loads(json_file.read_text()) if json_file is not None and json_file.exists() else {}
    given = {name: value for name, value in given.items() if value is not None}
    for way in ways or WAYS:
        key = f"{method}/{way}"
        if key not in results:
            found = recovered(model, source, data, scratch / "recovered", way, given)
            results[key] = found | {"dense": facts["before"], "options": given}
            if json_file is not None:
                json_file.write_text(json.dumps(results, indent=1) + "\n")
    print(table(_rows(results), markdown=True))


def _rows(results: dict[str, Any]) -> list[list[str]]:
    rows = [["method", "training", "steps", "dense", "pruned", "recovered", "seconds", "memory"]]
    for key, each in results.items():
        found = [each["dense"], each["perplexity"]["before"], each["perplexity"]["after"]]
        shown = [f"{value:.2f}" for value in found] + [f"{each['seconds']:,.0f}", human(each["peak_rss"])]
        rows.append([*key.split("/"), str(each["steps"]), *shown])
    return rows


if __name__ == "__main__":
    main()
