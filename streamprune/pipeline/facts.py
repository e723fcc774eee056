"""Facts of a run, for streamprune.json: enough to repeat it, and what came of it."""

from __future__ import annotations

import importlib.metadata
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streamprune.pipeline import batches, resume
from streamprune.pipeline.job import Done, Job
from streamprune.planning import allocation
from streamprune.planning.decision import removed_parameters
from streamprune.planning.placement import Placement, placement_facts
from streamprune.texts import sources


def run_facts(job: Job, placement: Placement, done: Done, tokens: batches.Tokens) -> dict[str, Any]:
    """Gather what streamprune.json says of a run up to its writing."""
    config, sweeper, plan, ids = job.config, job.sweeper, job.plan, job.ids
    skeleton, checkpoint = sweeper.skeleton, sweeper.skeleton.checkpoint
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    options |= {"settings": dict(plan.settings), "micro_batch": sweeper.micro_batch}
    # What was decided for the user stands beside what they said.
    options |= {"allocation": plan.choice.allocation, "compensate_target": plan.repair}
    if ids is not None:
        options |= {"samples": len(ids), "seq_len": ids.shape[1]}
    packages = ("streamprune", "torch", "transformers", "safetensors")
    form = done.form
    after = skeleton.parameters - removed_parameters(skeleton, plan.costs, form.kept) + form.added_parameters
    facts: dict[str, Any] = {
        "base_model": base_name(config.model),
        "license": job.companions.license,
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()}
        | form.versions(),
        "options": options,
        "layout": form.layout,
        "layers": [plan.layers.start, plan.layers.stop],
        "parameters": {"before": skeleton.parameters, "after": after},
        "bytes": {"before": checkpoint.nbytes, "after": form.nbytes},
        "notes": [*skeleton.notes, *job.companions.notes],
    }
    if plan.sparsity is not None:
        facts["zeros"] = dict(zip(("weights", "of"), done.zeros, strict=True))
    else:
        facts |= {"kept": allocation.kept_facts(form.kept), "output_biases": form.biases}
    facts["memory"] = placement_facts(placement)
    facts["source"] = {"model": source_name(config.model), "sha256_of_tensors": done.source_hash}
    facts["scoring"] = job.costs | {"sha256_of_calibration_ids": resume.hash_ids(ids)}
    if job.repair_ids is not None:
        repair = {"tokens": list(job.repair_ids.shape), "sha256_of_ids": resume.hash_ids(job.repair_ids)}
        facts["compensation"] = repair
    if tokens.said:
        facts["sequences_begin_with"] = [{"id": number, "token": name} for number, name in tokens.beginning]
    if (segments := tokens.evaluation) is not None:
        text = sources.shown(config.evaluate) if config.evaluate else "embedded held-out prose"
        facts["perplexity"] = {
            "text": text,
            "segments": list(segments.shape),
            "sha256_of_ids": resume.hash_ids(segments),
        }
    return facts


def source_name(model: str) -> str:
    """Name the source so that it is found again: a hub id as it is, a directory by its whole path."""
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def base_name(model: str) -> str:
    """Name the source for the card: a hub id as it is, a directory by its last name."""
    return Path(model).absolute().name if Path(model).is_dir() else model
