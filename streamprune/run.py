"""The whole pipeline on one page: from a PruneConfig to a directory that loads."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from streamprune import allocation, calibration, compressed, evaluate, planner, rates, report
from streamprune.checkpoint import Checkpoint, byte_view, resolve_model
from streamprune.config import PruneConfig
from streamprune.devices import paging_device
from streamprune.errors import CheckpointError, OutputError, UsageError
from streamprune.footprint import Work
from streamprune.job import Done, Job
from streamprune.methods import METHODS, resolve_settings
from streamprune.paging import GPU_READERS, READERS, Pager
from streamprune.plan import Plan, describe, make_plan, removed_parameters
from streamprune.progress import Progress
from streamprune.readers import ReaderKind
from streamprune.skeleton import Skeleton
from streamprune.sweep import Sweeper, default_micro_batch
from streamprune.writer import OWN_FILE, atomic_directory, check_output, check_space, write_json

EVALUATION_SEQ_LEN = 128
EVALUATION_SEGMENTS = 100  # at most
EMBEDDED_CALIBRATION = (10, 128)  # samples and tokens of each; the text is short
REPAIR_SEQ_LEN = 512


@dataclass(frozen=True)
class PruneResult:
    """What came of a run.

    Attributes:
        output: the directory. layout: "same", "stock" or "ragged".
        kept: kept units per layer and kind; layers that are not in it are gone.
        facts: the contents of streamprune.json.
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
    scope: Literal["units", "matrices"] = "units",
    pruned: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
    reader: ReaderKind = "buffered",
    read_threads: int | None = None,
    load: bool = True,
) -> Iterator[Sweeper]:
    """A model ready for sweeps: checkpoint, skeleton and pager. With `pruned`, also one of compressed weights.

    Without `load` nothing is read but config.json and headers: enough to plan.
    """
    where = compute_device(device)
    path = resolve_model(model, trust_remote_code=trust_remote_code)
    with ExitStack() as stack:
        if pruned:
            path = stack.enter_context(compressed.decompressed(path))
        checkpoint = stack.enter_context(Checkpoint(path, reader))
        if compressed.is_compressed(checkpoint.config):
            raise CheckpointError(f"{path} holds compressed 2:4 weights; prune the dense model it came from")
        compute = compute_dtype(dtype, where, checkpoint)
        skeleton = Skeleton(checkpoint, compute, where, pruned=pruned, trust_remote_code=trust_remote_code, load=load)
        threads = read_threads or (READERS if where.type == "cpu" else GPU_READERS)
        advance = progress.advance if progress is not None else lambda nbytes, **facts: None
        pager = Pager(checkpoint, skeleton.entries, paging_device(where), readers=threads, progress=advance)
        yield Sweeper(skeleton, pager, micro_batch, scope)


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
    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.tensors.values():
        if entry.dtype.is_floating_point:
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
    # Most bytes: old exports keep a float32 rotary buffer beside float16 weights.
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def prune(config: PruneConfig, progress: Progress | None = None) -> PruneResult:
    """Prune a model as `config` says and write the result.

    Raises:
        StreampruneError: anything that cannot be done, with the remedy; nothing is left at the output then.
    """
    started = time.perf_counter()
    progress = progress or Progress(quiet=True)
    settings = resolve_settings(config.method, config.settings, config.target)
    check_output(config.output, overwrite=config.overwrite)
    if config.compress:
        compressed.check_package()
    with ExitStack() as output:
        # In a function of its own: what the source keeps in memory is gone before the result is measured.
        directory, facts, kept, segments = _score_and_write(config, settings, output, progress)
        if segments is not None:
            facts["perplexity"]["after"] = _perplexity_after(config, directory, segments, progress)
        facts["seconds"] = {"scoring": facts["scoring"]["seconds"], "total": time.perf_counter() - started}
        facts["peak_rss"] = report.peak_rss()
        write_json(directory / OWN_FILE, facts)
        (directory / "README.md").write_text(report.model_card(facts), encoding="utf-8")
    return PruneResult(config.output, facts["layout"], kept, facts)


def _score_and_write(
    config: PruneConfig, settings: dict[str, Any], output: ExitStack, progress: Progress
) -> tuple[Path, dict[str, Any], allocation.KeptUnits, Tensor | None]:
    """Everything that needs the source: the new directory (on `output`), its facts, kept units, evaluation ids."""
    method = METHODS[config.method]
    with open_model(
        config.model,
        device=config.device,
        dtype=config.dtype,
        scope="units" if config.target == "units" else "matrices",
        trust_remote_code=config.trust_remote_code,
        progress=progress,
        reader=config.reader,
        read_threads=config.read_threads,
    ) as sweeper:
        skeleton = sweeper.skeleton
        _refuse_in_place(config, skeleton.checkpoint.path)
        plan = make_plan(config, skeleton, settings)
        # The perplexity of compressed weights is that of a dense copy, which goes when it is measured.
        copied = skeleton.checkpoint.nbytes if config.compress and config.evaluate is not False else 0
        check_space(config.output, plan.output_bytes + copied)
        progress.say(describe(config, skeleton, plan))
        tokens = _calibration_tokens(config, skeleton) if method.needs_text or config.compensate else None
        ids = _calibration_ids(config, skeleton, tokens) if method.needs_text and tokens is not None else None
        repair_ids = _repair_ids(config, skeleton, tokens) if config.compensate and tokens is not None else None
        sweeper.micro_batch = config.micro_batch or default_micro_batch(128 if ids is None else ids.shape[1])
        segments = _evaluation_segments(config, skeleton)
        work = Work(*(None if given is None else (len(given), given.shape[1]) for given in (ids, repair_ids, segments)))
        placement = _place(config, settings, plan, sweeper, work)
        progress.say(planner.say(placement, sweeper))
        before = _perplexity(sweeper, segments, "before", progress) if segments is not None else None
        job = Job(config, settings, plan, sweeper, progress, ids, repair_ids)
        directory = output.enter_context(atomic_directory(config.output, overwrite=config.overwrite))
        done = job.prune_weights(directory) if config.target == "weights" else job.cut(job.score(), directory)
        facts = _facts(config, sweeper, plan, settings, ids, done)
        facts["memory"] = planner.facts(placement)
        facts["source"] = {"model": _source_name(config.model), "sha256_of_tensors": done.source_hash}
        facts["scoring"] = job.costs | {"sha256_of_calibration_ids": _hash(ids)}
        if repair_ids is not None:
            facts["compensation"] = {"tokens": list(repair_ids.shape), "sha256_of_ids": _hash(repair_ids)}
        if segments is not None:
            text = config.evaluate.name if isinstance(config.evaluate, Path) else "embedded held-out prose"
            ids_hash = {"segments": list(segments.shape), "sha256_of_ids": _hash(segments)}
            facts["perplexity"] = {"text": text, **ids_hash, "before": before}
    return directory, facts, done.kept, segments


def _place(
    config: PruneConfig, settings: dict[str, Any], plan: Plan, sweeper: Sweeper, work: Work
) -> planner.Placement:
    """Decide where things stay, and tell the sweeper."""
    loaded = sweeper.skeleton.resident_bytes if sweeper.skeleton.device.type == "cpu" else 0
    baseline = psutil.Process().memory_info().rss - loaded
    placement = planner.place(sweeper, config, settings, plan, work, baseline=baseline)
    sweeper.micro_batch, sweeper.pager.slots = placement.micro_batch, placement.slots
    sweeper.place, sweeper.scratch = placement.place, placement.scratch
    return placement


def foretell(config: PruneConfig, *, measure: bool = False, assume: str | None = None) -> str:
    """What `prune(config)` will hold and read, a row per stage; seconds where rates are measured or assumed.

    Raises:
        StreampruneError: as `prune` before its work begins.
    """
    settings = resolve_settings(config.method, config.settings, config.target)
    with open_model(
        config.model,
        device=config.device,
        dtype=config.dtype,
        scope="units" if config.target == "units" else "matrices",
        trust_remote_code=config.trust_remote_code,
        load=measure,
    ) as sweeper:
        plan = make_plan(config, sweeper.skeleton, settings)
        work = _expected_work(config, sweeper.skeleton)
        sweeper.micro_batch = config.micro_batch or default_micro_batch(
            work.calibration[1] if work.calibration else 128
        )
        placement = _place(config, settings, plan, sweeper, work)
        found = None
        if measure:
            found = rates.measured(
                sweeper,
                work.calibration[1] if work.calibration else 128,
                Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "streamprune",
            )
        elif assume is not None:
            found = rates.assumed(assume)
        return f"{describe(config, sweeper.skeleton, plan)}\n{planner.table(placement, sweeper, found)}"


def _expected_work(config: PruneConfig, skeleton: Skeleton) -> Work:
    """Sequences of each part of a run, as far as they are known without reading texts."""
    method = METHODS[config.method]
    limit = getattr(skeleton.config, "max_position_embeddings", None) or 10**9
    samples, seq_len = method.calibration if config.calibration else EMBEDDED_CALIBRATION
    given = (config.samples or samples, config.seq_len or min(seq_len, limit))
    repair_len = min(REPAIR_SEQ_LEN, limit)
    return Work(
        given if method.needs_text else None,
        (config.compensate_tokens // repair_len, repair_len) if config.compensate else None,
        None if config.evaluate is False else (EVALUATION_SEGMENTS, min(EVALUATION_SEQ_LEN, limit)),
    )


def _calibration_tokens(config: PruneConfig, skeleton: Skeleton) -> Tensor:
    """All tokens of the calibration text."""
    if config.calibration is None:
        text = calibration.embedded_text("calibration")
    else:
        text = calibration.read_text(config.calibration, config.field)
    path = skeleton.checkpoint.path
    tokenizer = calibration.load_tokenizer(path, trust_remote_code=config.trust_remote_code)
    return calibration.tokenize(tokenizer, text)


def _calibration_ids(config: PruneConfig, skeleton: Skeleton, tokens: Tensor) -> Tensor:
    """What the method's scores are taken on: as asked, or as its paper has it where a text is given."""
    samples, seq_len = METHODS[config.method].calibration if config.calibration else EMBEDDED_CALIBRATION
    limit = getattr(skeleton.config, "max_position_embeddings", None) or seq_len
    samples, seq_len = config.samples or samples, config.seq_len or min(seq_len, limit)
    check_tokens(tokens, seq_len, skeleton)
    return calibration.sample_sequences(tokens, samples, seq_len, config.sampling, config.seed)


def _repair_ids(config: PruneConfig, skeleton: Skeleton, tokens: Tensor) -> Tensor:
    """`compensate_tokens` tokens for the least squares, or as many as the text has."""
    limit = getattr(skeleton.config, "max_position_embeddings", None) or REPAIR_SEQ_LEN
    count = min(config.compensate_tokens, len(tokens))
    seq_len = min(REPAIR_SEQ_LEN, limit, count)
    check_tokens(tokens, seq_len, skeleton)
    return calibration.sample_sequences(tokens, count // seq_len, seq_len, config.sampling, config.seed)


def check_tokens(tokens: Tensor, seq_len: int, skeleton: Skeleton) -> None:
    """Refuse sequences longer than the model's positions, and the tokens of another model's tokenizer."""
    limit = getattr(skeleton.config, "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise UsageError(f"--seq-len {seq_len}: the model takes at most {limit} positions; lower it")
    vocabulary = skeleton.config.vocab_size
    if len(tokens) and int(tokens.max()) >= vocabulary:
        raise CheckpointError(
            f"{skeleton.checkpoint.path}: its tokenizer gives token {int(tokens.max())}, the model knows {vocabulary}; "
            "copy the tokenizer files of this model there"
        )


def _evaluation_segments(config: PruneConfig, skeleton: Skeleton) -> Tensor | None:
    if config.evaluate is False:
        return None
    text = (
        calibration.embedded_text("heldout")
        if config.evaluate is None
        else calibration.read_text(config.evaluate, config.field)
    )
    tokenizer = calibration.load_tokenizer(skeleton.checkpoint.path, trust_remote_code=config.trust_remote_code)
    limit = getattr(skeleton.config, "max_position_embeddings", None) or EVALUATION_SEQ_LEN
    tokens = calibration.tokenize(tokenizer, text)
    seq_len = min(EVALUATION_SEQ_LEN, limit)
    check_tokens(tokens, seq_len, skeleton)
    return evaluate.segment(tokens, seq_len)[:EVALUATION_SEGMENTS]


def _perplexity(sweeper: Sweeper, segments: Tensor, when: str, progress: Progress) -> float:
    total = sweeper.pager.layer_bytes() * evaluate.sweeps_needed(sweeper, segments)
    with progress.stage(f"perplexity {when}", total):
        return evaluate.perplexity(sweeper, segments).perplexity


def _perplexity_after(config: PruneConfig, directory: Path, segments: Tensor, progress: Progress) -> float:
    device, dtype = config.device, config.dtype
    with open_model(str(directory), device=device, dtype=dtype, pruned=True, progress=progress) as pruned:
        return _perplexity(pruned, segments, "after", progress)


def _facts(
    config: PruneConfig, sweeper: Sweeper, plan: Plan, settings: dict[str, Any], ids: Tensor | None, done: Done
) -> dict[str, Any]:
    skeleton = sweeper.skeleton
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    options |= {"settings": settings, "micro_batch": sweeper.micro_batch}
    # What was decided for the user stands beside what they said.
    options |= {"allocation": plan.choice.allocation, "compensate_target": plan.repair}
    if ids is not None:
        options |= {"samples": len(ids), "seq_len": ids.shape[1]}
    options["dtype"] = str(skeleton.dtype).removeprefix("torch.")
    checkpoint, total = skeleton.checkpoint, skeleton.parameters
    packages = ("streamprune", "torch", "transformers", "safetensors")
    after = total - removed_parameters(skeleton, plan, done.kept) + done.added_parameters
    facts = {
        "base_model": _base_name(config.model),
        "license": _license(checkpoint.path),
        "versions": {name: importlib.metadata.version(name) for name in packages}
        | {"python": platform.python_version()}
        | ({compressed.PACKAGE: compressed.version()} if config.compress else {}),
        "options": options,
        "layout": done.layout,
        "layers": [plan.layers.start, plan.layers.stop],
        "parameters": {"before": total, "after": after},
        "bytes": {"before": checkpoint.nbytes, "after": done.output_bytes},
    }
    if plan.sparsity is not None:
        return facts | {"zeros": dict(zip(("weights", "of"), done.zeros, strict=True))}
    return facts | {"kept": allocation.describe(done.kept), "output_biases": plan.biases}


def _hash(ids: Tensor | None) -> str | None:
    """SHA-256 of token ids, int64: the text may change or go, what was computed on is known."""
    return None if ids is None else hashlib.sha256(byte_view(ids.contiguous())).hexdigest()


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


def _refuse_in_place(config: PruneConfig, source: Path) -> None:
    """--overwrite must not remove what the run reads."""
    output = config.output.resolve()
    texts = [Path(text) for text in (config.calibration, config.evaluate) if text]
    for read in (source, *texts):
        if output in (read.resolve(), *read.resolve().parents):
            what = "the model itself" if read == source else str(read)
            raise OutputError(f"{config.output} is or holds {what}; choose another --output")
