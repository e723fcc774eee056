"""GGUF files of the demo's 135M Llama, dense and pruned: their size, and what llama.cpp makes of them.

    python bench/gguf_files.py --data DIR [--json FILE] [--only MODEL]

Perplexity of 20 x 128 tokens of wikitext2-test.txt in DIR, by transformers in float32 and by llama.cpp for each type of
file, and how many of 32 greedy tokens are the same. llama.cpp is asked for the probability of every next token by
itself, so a file takes some minutes. What FILE has of other models than MODEL stays. Needs 2 GB of temporary space, and
xllamacpp.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import torch

import streamprune
from streamprune.commands import demo
from streamprune.figures import human, table
from streamprune.output.gguf import write_gguf
from streamprune.pipeline.progress import Progress
from streamprune.planning.rates import default_cache
from streamprune.texts.corpus import open_corpus

MODELS: dict[str, tuple[dict[str, Any] | None, tuple[str, ...]]] = {  # options, and types of file
    "20 %, ragged": ({"method": "wanda-sp", "allocation": "global", "layers": (4, 28)}, ("f32", "q8_0", "bf16")),
    "20 %, stock": ({"method": "taylor", "stock": True}, ("f32",)),
    "dense": (None, ("f32",)),
}
SEGMENTS, LENGTH, GREEDY, PROMPT = 20, 128, 32, 16


class LlamaCpp:
    """A file, loaded by llama.cpp."""

    def __init__(self, path: Path) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path, params.n_ctx, params.n_batch = str(path), 512, 512
        params.n_parallel, params.verbosity, params.warmup = 1, 0, False
        self._server = xllamacpp.Server(params)

    def _complete(self, ids: list[int], count: int, **more: Any) -> list[dict[str, Any]]:
        asked = {"prompt": ids, "n_predict": count, "temperature": 0, "n_probs": 1, "ignore_eos": True, **more}
        return self._server.handle_completions(asked)["choices"][0]["logprobs"]["content"]

    def loss(self, ids: list[int]) -> float:
        """Mean loss of all tokens but the first: each is made certain, and its probability before that is said."""
        losses = []
        for end in range(1, len(ids)):
            said = self._complete(ids[:end], 1, logit_bias=[[ids[end], 1e4]])
            losses += [-each["logprob"] for each in said if each["id"] == ids[end]]
        return math.fsum(losses) / len(losses)

    def greedy(self, ids: list[int]) -> list[int]:
        """The tokens that follow."""
        return [each["id"] for each in self._complete(ids, GREEDY)]


def by_transformers(path: Path, segments: torch.Tensor) -> tuple[float, list[int]]:
    """Perplexity, and the greedy tokens after the first segment's beginning."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()
    with torch.no_grad():
        losses = [float(model(ids[None], labels=ids[None]).loss) for ids in segments]
    prompt = segments[:1, :PROMPT]
    mask = torch.ones_like(prompt)
    follows = model.generate(prompt, attention_mask=mask, max_new_tokens=GREEDY, do_sample=False, eos_token_id=-1)
    return math.exp(sum(losses) / len(losses)), follows[0, PROMPT:].tolist()


def measure(model: Path, data: Path, scratch: Path, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Figures of each file, as they come."""
    for name in names:
        path, (options, types) = model, MODELS[name]
        if options is not None:
            path = scratch / "pruned"
            streamprune.prune(streamprune.PruneConfig(model, path, evaluate=False, overwrite=True, **options))
        segments = open_corpus(path, data / "wikitext2-test.txt").segments(LENGTH, SEGMENTS)
        expected, follows = by_transformers(path, segments)
        for type_name in types:
            written = write_gguf(path, scratch / "model.gguf", type_name, overwrite=True)
            loaded, start = LlamaCpp(written.path), time.perf_counter()
            same = sum(a == b for a, b in zip(loaded.greedy(segments[0, :PROMPT].tolist()), follows, strict=False))
            found = math.exp(sum(loaded.loss(ids.tolist()) for ids in segments) / len(segments))
            click.echo(f"  {name}, {type_name}: {time.perf_counter() - start:.0f} s", err=True)
            del loaded
            row = {"model": name, "architecture": written.architecture, "type": type_name, "bytes": written.nbytes}
            yield row | {"transformers": expected, "llama.cpp": found, "same of 32": same}


@click.command()
@click.option("--data", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
@click.option("--only", multiple=True, type=click.Choice(list(MODELS)), help="Measure this one; repeatable.")
def main(data: Path, json_file: Path | None, only: tuple[str, ...]) -> None:
    """Measure, print the table, and write JSON."""
    model, names = Path(demo.fetch(default_cache(), Progress())), only or tuple(MODELS)
    with tempfile.TemporaryDirectory() as scratch:
        there = json.loads(json_file.read_text()) if json_file and json_file.exists() else []
        rows = [row for row in there if row["model"] not in names]
        for row in measure(model, data, Path(scratch), names):
            rows.append(row)
            if json_file:
                json_file.write_text(json.dumps(rows, indent=1) + "\n")
    lines = [["model", "architecture", "type", "file", "transformers", "llama.cpp", "more", "greedy tokens"]]
    for row in rows:
        more = row["llama.cpp"] / row["transformers"] - 1
        values = [f"{row[name]:.3f}" for name in ("transformers", "llama.cpp")]
        cells = [row["model"], row["architecture"], row["type"], human(row["bytes"])]
        lines.append([*cells, *values, f"{more:+.3%}", f"{row['same of 32']} of {GREEDY}"])
    print(table(lines, markdown=True))


if __name__ == "__main__":
    main()
