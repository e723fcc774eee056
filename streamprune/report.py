"""What a run says when it is done: figures, tables, the model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from streamprune import compressed, sources
from streamprune.config import PruneConfig
from streamprune.figures import human as human


def peak_rss() -> int:
    """Bytes of the process's largest resident set so far (VmHWM)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def peaks() -> dict[str, int]:
    """Bytes: "peak_rss", and "peak_gpu" of tensors where a GPU was used."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return {"peak_rss": peak_rss()} | ({"peak_gpu": gpu} if gpu else {})


def say_peaks(peaks: Mapping[str, float]) -> str:
    """Of `peaks()`: 1.23 GB, or 1.23 GB (GPU 2.34 GB)."""
    gpu = f" (GPU {human(peaks['peak_gpu'])})" if "peak_gpu" in peaks else ""
    return human(peaks["peak_rss"]) + gpu


def table(rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Aligned columns, the first row being the header; numbers are aligned right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    numeric = [all(_is_number(row[column]) for row in rows[1:]) for column in range(len(rows[0]))]

    def line(row: Sequence[str]) -> str:
        cells = [c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)]
        return f"| {' | '.join(cells)} |" if markdown else "  ".join(cells).rstrip()

    rule = [("-" * (w - 1) + ":") if n else "-" * w for w, n in zip(widths, numeric, strict=True)]
    rule_line = f"| {' | '.join(rule)} |" if markdown else "  ".join("-" * w for w in widths)
    return "\n".join([line(rows[0]), rule_line, *(line(row) for row in rows[1:])])


def _is_number(text: str) -> bool:
    return bool(text) and (text[0].isdigit() or text[0] in "-+.∞")


def model_card(facts: Mapping[str, Any]) -> str:
    """README.md of the output, from the contents of its streamprune.json."""
    ragged = facts["layout"] == "ragged"
    kind = "sparse" if "zeros" in facts else "structured-pruning"
    tags = ["pruned", kind, "streamprune", *(["custom_code"] if ragged else [])]
    head = ["---", "library_name: transformers", f"base_model: {json.dumps(facts['base_model'])}"]
    if facts.get("license"):
        head.append(f"license: {json.dumps(facts['license'])}")
    head += ["pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags), "---"]
    lines = [
        f"# {facts['base_model']}, pruned",
        "",
        f"{_what_was_done(facts)} with [streamprune](https://pypi.org/project/streamprune/) "
        f"{facts['versions']['streamprune']}.{_storage(facts)}",
        "",
        table(_card_rows(facts), markdown=True),
        "",
        "## Recipe",
        "",
        f"Layers {facts['layers'][0]}:{facts['layers'][1]}, with these options; `streamprune.json` also holds the "
        "units that stayed, the versions and hashes of the source and of the token ids.",
        "",
        *(f"- `{name}`: {value}" for name, value in _recipe(facts).items()),
        "",
        "## Loading",
        "",
        *_loading(facts),
    ]
    return "\n".join([*head, "", *lines]) + "\n"


def _what_was_done(facts: Mapping[str, Any]) -> str:
    before, after = facts["parameters"]["before"], facts["parameters"]["after"]
    if "zeros" in facts:
        zeros, of = facts["zeros"]["weights"], facts["zeros"]["of"]
        pattern = facts["options"]["granularity"]
        return f"{zeros:,} of {of:,} weights ({zeros / of:.1%}, pattern `{pattern}`) were set to zero"
    return f"{before - after:,} of {before:,} parameters ({1 - after / before:.1%}) were removed"


def _storage(facts: Mapping[str, Any]) -> str:
    if "zeros" not in facts:
        return ""
    stored = f" They are stored as `{compressed.FORMAT}`."
    return stored if facts["options"].get("compress") else " The files are not smaller for it."


def _loading(facts: Mapping[str, Any]) -> list[str]:
    """How the output is loaded: by what, in code."""
    is_compressed, first = facts["options"].get("compress"), []
    if facts["layout"] == "ragged":
        first = ["import streamprune  # or pass trust_remote_code=True instead"]
    elif is_compressed:
        first = [f'# pip install "transformers<5" "{compressed.PACKAGE}>=0.13,<0.15"']
    return [
        *([f"{compressed.READERS}.", ""] if is_compressed else []),
        "```python",
        *first,
        "from transformers import AutoModelForCausalLM",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
        "```",
    ]


def sizes(facts: Mapping[str, Any]) -> list[list[str]]:
    """Rows of parameters, non-zero ones where weights were pruned, and bytes, before and after."""
    rows = [[name, f"{facts[name]['before']:,}", f"{facts[name]['after']:,}"] for name in ("parameters", "bytes")]
    if "zeros" in facts:
        before = facts["parameters"]["before"]
        rows.insert(1, ["not pruned", f"{before:,}", f"{before - facts['zeros']['weights']:,}"])
    return rows


def _card_rows(facts: Mapping[str, Any]) -> list[list[str]]:
    rows = [["", "before", "after"], *sizes(facts)]
    if facts.get("perplexity"):
        rows.append([f"perplexity ({facts['perplexity']['text']})", *perplexity_cells(facts["perplexity"])])
    return rows


def perplexity_cells(perplexity: Mapping[str, Any]) -> list[str]:
    """Perplexity before and after, two decimals."""
    return [f"{perplexity['before']:.2f}", f"{perplexity['after']:.2f}"]


# Options that do not make the result another one, and those that say something in every recipe.
_UNSAID = (
    "model",
    "output",
    "overwrite",
    "resume",
    "device",
    "evaluate",
    "max_shard_size",
    "trust_remote_code",
    "layers",
)
MACHINE = ("gpu_memory", "host_memory", "scratch", "reader", "read_threads")  # change no byte
_ALWAYS = ("method", "granularity", "ratio", "settings", "calibration", "samples", "seq_len", "sampling", "bos", "seed")


def _recipe(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The options that decide the result and were given, or say something in any case, one line each."""
    options, defaults = facts["options"], {field.name: field.default for field in fields(PruneConfig)}
    recipe = {
        name: value
        for name, value in options.items()
        if name not in (*_UNSAID, *MACHINE) and value is not None and (name in _ALWAYS or value != defaults.get(name))
    }
    if options["attention_ratio"] is not None and options["mlp_ratio"] is not None:
        del recipe["ratio"]  # the two set everything
    recipe["settings"] = ", ".join(
        f"{name}={value}" for name, value in options["settings"].items() if value is not None
    )
    if begins := "".join(mark["token"] for mark in facts.get("sequences_begin_with", ())):
        recipe["bos"] = f"{options['bos']}, each sequence begins with `{begins}`"
    recipe["calibration"] = sources.shown(options["calibration"]) if options["calibration"] else "embedded prose"
    return {name: value for name, value in recipe.items() if value != ""}
