"""Model card: the README.md of an output."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from streamprune.config import PruneConfig
from streamprune.figures import table
from streamprune.output.form import OutputForm
from streamprune.schema import default_of
from streamprune.texts import sources

ADAPTER_LAYOUT = "adapter"
LOADING = """from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")"""
LOADING_ADAPTER = """from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("path/to/this/directory")"""


def model_card(facts: Mapping[str, Any], form: type[OutputForm], config: type[PruneConfig] = PruneConfig) -> str:
    """Write README.md of an output of this form, from the contents of its streamprune.json and its config's class."""
    kind = "sparse" if "zeros" in facts else "structured-pruning"
    tags = ["pruned", kind, "streamprune", *(["custom_code"] if form.own_code else [])]
    head = ["---", "library_name: transformers", f"base_model: {json.dumps(facts['base_model'])}"]
    if facts.get("license"):
        head.append(f"license: {json.dumps(facts['license'])}")
    head += ["pipeline_tag: text-generation", "tags:", *(f"- {tag}" for tag in tags), "---"]
    lines = [
        f"# {facts['base_model']}, pruned",
        "",
        f"{what_was_done(facts)} with streamprune {facts['versions']['streamprune']}.{_storage(facts, form)}",
        "",
        table(_card_rows(facts), markdown=True),
        "",
        "## Recipe",
        "",
        f"Layers {facts['layers'][0]}:{facts['layers'][1]}, with these options; `streamprune.json` also holds the "
        "units that stayed, the versions and hashes of the source and of the token ids.",
        "",
        *(f"- `{name}`: {value}" for name, value in _recipe(facts, config).items()),
        "",
        "## Loading",
        "",
        *_loading(form),
    ]
    return "\n".join([*head, "", *lines]) + "\n"


def recovered_card(facts: Mapping[str, Any], form: type[OutputForm], previous: str | None) -> str:
    """Write README.md of a recovered checkpoint: the `previous` card of ours, or a new head, and what training did."""
    recovery = facts["recovery"]
    base = facts["base_model"]
    if previous is None:
        license = [f"license: {json.dumps(facts['license'])}"] if facts.get("license") else []
        adapter = facts["layout"] == ADAPTER_LAYOUT
        head = ["---", f"library_name: {'peft' if adapter else 'transformers'}", f"base_model: {json.dumps(base)}"]
        head += [*license, "pipeline_tag: text-generation", "tags:", "- lora", "- streamprune", "---"]
        load = LOADING_ADAPTER if adapter else LOADING
        what = "an adapter" if adapter else "trained further"
        previous = "\n".join([*head, "", f"# {base}, {what}", "", "## Loading", "", *_loading(form, load)]) + "\n"
    rows = recovery_rows(recovery)
    lines = ["", "## Recovery", "", f"{recovery['done']}.", ""]
    lines += [table(rows, markdown=True), ""] if len(rows) > 1 else []
    lines += [f"- `{name}`: {value}" for name, value in recovery["recipe"].items()]
    return previous + "\n".join(lines).rstrip() + "\n"


def recovery_rows(recovery: Mapping[str, Any]) -> list[list[str]]:
    """Make table rows of what was measured before and after a training."""
    rows = [["", "before", "after"]]
    if recovery.get("loss"):
        loss = recovery["loss"]
        rows.append([f"loss ({loss['sequences']} held-out sequences)", f"{loss['before']:.3f}", f"{loss['after']:.3f}"])
    if recovery.get("perplexity"):
        rows.append([f"perplexity ({recovery['perplexity']['text']})", *perplexity_cells(recovery["perplexity"])])
    return rows


def what_was_done(facts: Mapping[str, Any]) -> str:
    """Say how much was removed, as the beginning of a sentence."""
    before, after = facts["parameters"]["before"], facts["parameters"]["after"]
    if "zeros" in facts:
        zeros, of = facts["zeros"]["weights"], facts["zeros"]["of"]
        pattern = facts["options"]["granularity"]
        return f"{zeros:,} of {of:,} weights ({zeros / of:.1%}, pattern `{pattern}`) were set to zero"
    return f"{before - after:,} of {before:,} parameters ({1 - after / before:.1%}) were removed"


def _storage(facts: Mapping[str, Any], form: type[OutputForm]) -> str:
    if form.stored_as:
        return f" They are stored as `{form.stored_as}`."
    return " The files are not smaller for it." if "zeros" in facts else ""


def _loading(form: type[OutputForm], load: str = LOADING) -> list[str]:
    """List the lines that say how the output is loaded: by what, and in code."""
    return [*([f"{form.read_by}.", ""] if form.read_by else []), "```python", *loading_lines(form, load), "```"]


def loading_lines(form: type[OutputForm], load: str = LOADING) -> list[str]:
    """List the lines of Python that load an output of this form."""
    return [*form.loading, load]


def sizes(facts: Mapping[str, Any]) -> list[list[str]]:
    """Make rows of parameters, non-zero ones where weights were pruned, and bytes, before and after."""
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
    """Write perplexity before and after, with two decimals; where it could not be measured, or is infinite: "-"."""
    values = (perplexity["before"], perplexity["after"])
    return ["-" if value is None else f"{value:.2f}" for value in values]


def _recipe(facts: Mapping[str, Any], config: type[PruneConfig]) -> dict[str, Any]:
    """Choose the options of the recipe: those that decide the result and were given, or say something in any case."""
    options, recipe = facts["options"], {}
    for each in fields(config):
        value, said = options[each.name], each.metadata["option"]
        wanted = said.card == "always" or (said.card == "given" and value != default_of(each))
        if said.changes_bytes and wanted and value is not None:
            recipe[each.name] = value
    if options["attention_ratio"] is not None and options["mlp_ratio"] is not None:
        del recipe["ratio"]  # the two set everything
    recipe["settings"] = ", ".join(
        f"{name}={value}" for name, value in options["settings"].items() if value is not None
    )
    if begins := "".join(mark["token"] for mark in facts.get("sequences_begin_with", ())):
        recipe["bos"] = f"{options['bos']}, each sequence begins with `{begins}`"
    recipe["calibration"] = sources.shown(options["calibration"]) if options["calibration"] else "embedded prose"
    return {name: value for name, value in recipe.items() if value != ""}
