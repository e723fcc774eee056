"""The whole pipeline on one page: from a PruneConfig to a directory that loads."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune import allocation, calibration, evaluate, report, slim
from streamprune.checkpoint import Checkpoint, resolve_model
from streamprune.config import PruneConfig
from streamprune.errors import OutputError, UsageError
from streamprune.families import unit_costs
from streamprune.methods import METHODS, UnitScores, resolve_settings
from streamprune.paging import Pager, paging_device
from streamprune.skeleton import Skeleton
from streamprune.sweep import Statistics, Sweeper, default_micro_batch
from streamprune.writer import atomic_directory, check_output, write_json

EVALUATION_SEQ_LEN = 128
EVALUATION_SEGMENTS = 100  # at most


@dataclass(frozen=True)
class PruneResult:
    """What came of a run.

    Attributes:
        output: the directory. layout: "same", "stock" or "ragged".
        kept: kept units per layer and kind. facts: the contents of streamprune.json.
    """

    output: Path
    layout: str
    kept: allocation.KeptUnits
    facts: dict[str, Any]


@contextmanager
def open_model(
    model: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    micro_batch: int = 1,
    pruned: bool = False,
    trust_remote_code: bool = False,
    progress: report.Progress | None = None,
) -> Iterator[Sweeper]:
    """A model ready for sweeps: checkpoint, skeleton and pager."""
    where = compute_device(device)
    path = resolve_model(model, trust_remote_code=trust_remote_code)
    with Checkpoint(path) as checkpoint:
        compute = compute_dtype(dtype, where, checkpoint)
        skeleton = Skeleton(checkpoint, compute, where, pruned=pruned, trust_remote_code=trust_remote_code)
        advance = progress.advance if progress is not None else lambda nbytes: None
        pager = Pager(checkpoint, skeleton.entries, paging_device(where), progress=advance)
        yield Sweeper(skeleton, pager, micro_batch)


def compute_device(name: str | None) -> torch.device:
    """The torch device of `--device`; by default the first GPU, or the CPU."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"--device {name}: not a device; use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        raise UsageError(
            f"--device {name} is not available here; use cpu" + (", or cuda" if torch.cuda.is_available() else "")
        )
    return device


def compute_dtype(name: str | None, device: torch.device, checkpoint: Checkpoint) -> torch.dtype:
    """The compute dtype: as asked; else float32 on a CPU (bfloat16 is slower there), the stored one on a GPU."""
    if name is not None:
        return getattr(torch, name)
    if device.type == "cpu":
        return torch.float32
    return max((entry.dtype for entry in checkpoint.tensors.values()), key=lambda dtype: dtype.itemsize)


def prune(config: PruneConfig, progress: report.Progress | None = None) -> PruneResult:
    """Prune a model as `config` says and write the result.

    Raises:
        StreampruneError: anything that cannot be done, with the remedy; nothing is left at the output then.
    """
    started = time.perf_counter()
    progress = progress or report.Progress(quiet=True)
    method, settings = METHODS.get(config.method), resolve_settings(config.method, config.settings)
    assert method is not None, "resolve_settings refuses unknown methods"
    check_output(config.output, overwrite=config.overwrite)
    micro_batch = config.micro_batch or default_micro_batch(config.seq_len)
    with open_model(
        config.model,
        device=config.device,
        dtype=config.dtype,
        micro_batch=micro_batch,
        trust_remote_code=config.trust_remote_code,
        progress=progress,
    ) as sweeper:
        skeleton = sweeper.skeleton
        _refuse_in_place(config.output, skeleton.checkpoint.path)
        plan = _plan(config, skeleton)
        progress.say(_plan_text(config, skeleton, plan))
        ids = _calibration_ids(config, skeleton) if method.needs == "gradients" else None
        segments = _evaluation_segments(config, skeleton)
        before = None
        if segments is not None:
            with progress.stage("perplexity before", _forward_bytes(sweeper, segments)):
                before = evaluate.perplexity(sweeper, segments)
        scores, scoring = _score(config, sweeper, plan, ids, settings, progress)
        kept = allocation.select(scores.values, plan.removed, skeleton.geometry, len(skeleton.layers))
        with atomic_directory(config.output, overwrite=config.overwrite, needs=plan.output_bytes) as directory:
            with progress.stage("writing", sweeper.pager.layer_bytes()):
                source_hash = slim.write_weights(skeleton, kept, directory, config.max_shard_size, progress.advance)
            slim.copy_companions(skeleton.checkpoint.path, directory)
            source = skeleton.checkpoint.config
            patched = slim.patched_config(source, skeleton.family, skeleton.geometry, kept, config.emit)
            slim.write_config(directory, patched)
            slim.keep_tokenizer_class(skeleton.checkpoint.path, directory)
            facts = _facts(config, skeleton, plan, settings, micro_batch, kept, scoring, source_hash)
            if segments is not None and before is not None:
                after = _perplexity_after(config, directory, segments, micro_batch, progress)
                facts["perplexity"] = {
                    "text": config.evaluate.name if config.evaluate else "embedded held-out prose",
                    "segments": list(segments.shape),
                    "before": before.perplexity,
                    "after": after,
                }
            facts["seconds"] = {"scoring": scoring["seconds"], "total": time.perf_counter() - started}
            facts["peak_rss"] = report.peak_rss()
            write_json(directory / "streamprune.json", facts)
            (directory / "README.md").write_text(report.model_card(facts), encoding="utf-8")
    return PruneResult(config.output, plan.layout, kept, facts)


@dataclass(frozen=True)
class _Plan:
    """What is decided before any weight of a layer is read."""

    layers: range
    removed: dict[Any, int]
    costs: dict[Any, int]
    layout: str
    output_bytes: int

    @property
    def removed_parameters(self) -> int:
        return allocation.removed_parameters(self.removed, self.costs, self.layers)


def _plan(config: PruneConfig, skeleton: Skeleton) -> _Plan:
    family, geometry, n_layers = skeleton.family, skeleton.geometry, len(skeleton.layers)
    costs = unit_costs(family, geometry, skeleton.shapes(0))
    layers = allocation.prunable_layers(config.layers, n_layers, stock=config.stock)
    ratios = allocation.Ratios(config.ratio, config.attention_ratio, config.mlp_ratio, config.round_to)
    # A Mistral takes any head count, whatever the Llama that it was.
    strict = config.stock and config.emit is None
    removed = allocation.uniform(family, geometry, costs, ratios, skeleton.config.hidden_size, stock=strict)
    zeros = {layer: {kind: torch.zeros(geometry.units(kind)) for kind in removed} for layer in layers}
    sample = allocation.select(zeros, removed, geometry, n_layers)
    shape = slim.layout(geometry, sample)
    slim.check_emittable(family, shape, config.emit, skeleton.checkpoint.config)
    output_bytes = sum(spec.nbytes for spec in slim.output_specs(skeleton, sample))
    return _Plan(layers, removed, costs, shape, output_bytes)


def _plan_text(config: PruneConfig, skeleton: Skeleton, plan: _Plan) -> str:
    total, gone = skeleton.parameters, plan.removed_parameters
    names = {"kv_group": "KV groups", "channel": "channels"}
    each = ", ".join(
        f"{count} of {skeleton.geometry.units(kind)} {names[kind]}" for kind, count in plan.removed.items()
    )
    per_layer = sum(plan.costs[kind] * skeleton.geometry.units(kind) for kind in plan.costs)
    text = (
        f"{config.model}: {skeleton.family.model_type}, {len(skeleton.layers)} layers, {total:,} parameters\n"
        f"layers {plan.layers.start}:{plan.layers.stop} lose {each} each: {gone:,} parameters, "
        f"{gone / max(1, per_layer * len(plan.layers)):.1%} of what is prunable there, {gone / total:.1%} of the model"
    )
    if plan.layout == "ragged":
        text += (
            "\nthe layers come out with different widths: load with trust_remote_code=True or after "
            "`import streamprune`; --stock prunes all layers alike and needs neither"
        )
    return text


def _score(
    config: PruneConfig,
    sweeper: Sweeper,
    plan: _Plan,
    ids: Tensor | None,
    settings: dict[str, Any],
    progress: report.Progress,
) -> tuple[UnitScores, dict[str, float]]:
    method, checkpoint = METHODS[config.method], sweeper.skeleton.checkpoint
    statistics = Statistics(sweeper, ids, plan.layers, config.seed)
    start, read = time.perf_counter(), checkpoint.bytes_read
    with progress.stage(f"scoring {method.name}", statistics.bytes_to_read(method.needs, method.sweeps(settings))):
        scores = method.score(statistics, settings)
    return scores, {
        "seconds": time.perf_counter() - start,
        "bytes_read": checkpoint.bytes_read - read,
        "peak_rss": report.peak_rss(),
    }


def _calibration_ids(config: PruneConfig, skeleton: Skeleton) -> Tensor:
    path = skeleton.checkpoint.path
    if config.calibration is None:
        text = calibration.embedded_text("calibration")
    else:
        text = calibration.read_text(config.calibration, config.field)
    tokenizer = calibration.load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    tokens = calibration.tokenize(tokenizer, text)
    _check_length(config.seq_len, skeleton)
    return calibration.sample_sequences(tokens, config.samples, config.seq_len, config.sampling, config.seed)


def _check_length(seq_len: int, skeleton: Skeleton) -> None:
    limit = getattr(skeleton.config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise UsageError(f"--seq-len {seq_len}: the model takes at most {limit} positions")


def _evaluation_segments(config: PruneConfig, skeleton: Skeleton) -> Tensor | None:
    if config.evaluate is False:
        return None
    text = calibration.embedded_text("heldout") if config.evaluate is None else calibration.read_text(config.evaluate)
    tokenizer = calibration.load_tokenizer(skeleton.checkpoint.path, trust_remote_code=config.trust_remote_code)
    limit = getattr(skeleton.config, "max_position_embeddings", None) or EVALUATION_SEQ_LEN
    tokens = calibration.tokenize(tokenizer, text)
    return evaluate.segment(tokens, min(EVALUATION_SEQ_LEN, limit))[:EVALUATION_SEGMENTS]


def _forward_bytes(sweeper: Sweeper, segments: Tensor) -> int:
    return sweeper.pager.layer_bytes() * evaluate.sweeps_needed(sweeper, segments)


def _perplexity_after(
    config: PruneConfig, directory: Path, segments: Tensor, micro_batch: int, progress: report.Progress
) -> float:
    with (
        open_model(
            str(directory),
            device=config.device,
            dtype=config.dtype,
            micro_batch=micro_batch,
            pruned=True,
            progress=progress,
        ) as pruned,
        progress.stage("perplexity after", _forward_bytes(pruned, segments)),
    ):
        return evaluate.perplexity(pruned, segments).perplexity


def _facts(
    config: PruneConfig,
    skeleton: Skeleton,
    plan: _Plan,
    settings: dict[str, Any],
    micro_batch: int,
    kept: allocation.KeptUnits,
    scoring: dict[str, float],
    source_hash: str,
) -> dict[str, Any]:
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    options |= {
        "settings": settings,
        "micro_batch": micro_batch,
        "dtype": str(skeleton.dtype).removeprefix("torch."),
    }
    checkpoint, total = skeleton.checkpoint, skeleton.parameters
    return {
        "base_model": _base_name(config.model),
        "license": _license(checkpoint.path),
        "source": {"model": _source_name(config.model), "sha256_of_tensors": source_hash},
        "versions": {
            name: importlib.metadata.version(name) for name in ("streamprune", "torch", "transformers", "safetensors")
        }
        | {"python": platform.python_version()},
        "options": options,
        "layout": plan.layout,
        "layers": [plan.layers.start, plan.layers.stop],
        "parameters": {"before": total, "after": total - plan.removed_parameters},
        "bytes": {"before": checkpoint.nbytes, "after": plan.output_bytes},
        "scoring": scoring,
        "kept": allocation.describe(kept),
    }


def _source_name(model: str) -> str:
    return str(Path(model).absolute()) if Path(model).is_dir() else model


def _base_name(model: str) -> str:
    """What the card calls the source: a hub id as it is, a directory by its name."""
    return Path(model).absolute().name if Path(model).is_dir() else model


def _license(path: Path) -> str | None:
    """The licence from the source's model card, if it has one."""
    card = path / "README.md"
    if not card.is_file():
        return None
    from huggingface_hub import ModelCardData, metadata_load

    try:
        return ModelCardData(**(metadata_load(card) or {})).license
    except (ValueError, TypeError):
        return None


def _refuse_in_place(output: Path, source: Path) -> None:
    if output.exists() and output.resolve() == source.resolve():
        raise OutputError(f"{output} is the model itself; choose another --output")
