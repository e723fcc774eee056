"""Whole pipeline on one page: from a PruneConfig to a directory that loads."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from streamprune.config import PruneConfig
from streamprune.errors import StreampruneError, UsageError
from streamprune.methods.table import resolve_settings
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import KeptUnits
from streamprune.output import companions
from streamprune.output.card import model_card
from streamprune.output.form import OutputForm
from streamprune.paging.device import card, compute_device, is_gpu, limit_memory, peaks
from streamprune.paging.hidden_states import Place
from streamprune.paging.host_memory import available_memory
from streamprune.pipeline import batches, resume
from streamprune.pipeline.facts import run_facts
from streamprune.pipeline.job import Job
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.rehearsal import compile_ahead, naming_the_reference, refuse_without_kernels
from streamprune.pipeline.source import Source
from streamprune.planning import rates
from streamprune.planning.cards import CARDS
from streamprune.planning.decision import Plan, describe, form_class, make_plan
from streamprune.planning.placement import (
    GPU_SHARE,
    Placement,
    choose_placement,
    forecast_table,
    passes_line,
    placement_line,
    updates_per_pass,
)
from streamprune.planning.stage import Work
from streamprune.storage.directory import (
    OWN_FILE,
    atomic_directory,
    check_apart,
    check_directory,
    check_output,
    check_space,
    write_json,
)
from streamprune.storage.journal import remove_journal
from streamprune.streaming.perplexity import perplexity, sweeps_needed
from streamprune.streaming.sweeper import Sweeper, default_micro_batch
from streamprune.values import dtype_name

# What a run holds that a plan does not: tokens, and what tokenising them leaves behind (1 to 3 MB of texts of 23 kB and
# 1.1 MB, 9 MB more for a moment). The tokenizer itself, 50 to 340 MB, a plan loads too.
TEXT_BYTES = 12_000_000


@dataclass(frozen=True)
class PruneResult:
    """Result of a run.

    Attributes:
        output: the directory. layout: "same", "stock" or "ragged".
        kept: kept units per layer and kind; layers that are not in it are gone.
        facts: the contents of streamprune.json.
        read_by: what has to be known of those that can read the output, if not everything can.
    """

    output: Path
    layout: str
    kept: KeptUnits
    facts: dict[str, Any]
    read_by: str = ""


@dataclass(frozen=True)
class _Written:
    """Remainder of a run when the source is closed: its form's class, the units that stay, where hidden states lie."""

    form: type[OutputForm]
    kept: KeptUnits
    place: Place


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run: in words, and where things stay; `seconds` of each stage where rates are known."""

    text: str
    placement: Placement
    seconds: dict[str, float]


def prune(
    config: PruneConfig,
    progress: Progress | type[tqdm[Any]] | bool | None = None,
    *,
    form: type[OutputForm] | None = None,
) -> PruneResult:
    """Prune a model as `config` says and write the result.

        result = prune(PruneConfig(model="SmolLM2-135M", output="pruned", method="taylor", ratio=0.2))
        print(result.output, result.facts["parameters"])

    Args:
        progress: True for lines or bars on stderr, a class of bars such as `tqdm.notebook.tqdm`, or a `Progress`; by
            default nothing is said.
        form: class of the output's form, where it is another than the options say.

    Raises:
        StreampruneError: anything that cannot be done, with the remedy; nothing is left at the output then.
    """
    started = time.perf_counter()
    progress = Progress.of(progress)
    timeline = progress.begin_timeline()
    resolve_settings(config.method, config.settings, config.target)  # refused before a model is looked for
    journal_directory = resume.journal_directory(config)
    check_output(config.output, overwrite=config.overwrite)
    form_class(config, form).check_machine()
    with naming_the_reference(), ExitStack() as output:
        # In a function of its own: what the source keeps in memory is gone before the result is measured.
        directory, facts, written, segments = _score_and_write(config, output, progress, journal_directory, form)
        if segments is not None:
            same = replace(config, dtype=facts["options"]["dtype"])
            try:
                after = _perplexity_after(same, directory, written, segments, progress)
            except (MemoryError, torch.OutOfMemoryError):  # an output of hours is worth more than its figure
                after = math.nan
                progress.say("out of memory while the result is measured: it is written; try `streamprune eval` on it")
            facts["perplexity"]["after"] = after if math.isfinite(after) else None  # JSON has no infinity
        facts["seconds"] = {"scoring": facts["scoring"]["seconds"], "total": time.perf_counter() - started}
        facts |= peaks() | timeline.facts()
        write_json(directory / OWN_FILE, facts)
        text = model_card(facts, written.form, type(config))
        (directory / "README.md").write_text(text, encoding="utf-8", errors="backslashreplace")
    if journal_directory is not None:
        remove_journal(journal_directory)
    return PruneResult(config.output, facts["layout"], written.kept, facts, written.form.read_by)


def _score_and_write(
    config: PruneConfig,
    output: ExitStack,
    progress: Progress,
    journal_directory: Path | None,
    form: type[OutputForm] | None,
) -> tuple[Path, dict[str, Any], _Written, Tensor | None]:
    """Do everything that needs the source.

    Returns:
        The new directory, which `output` renames when it is closed; the facts; form and kept units; evaluation ids.
    """
    with _source(config, progress) as sweeper:
        skeleton = sweeper.skeleton
        config, plan = _decide(config, skeleton, form, journal_directory, progress)
        beside = _prepare_companions(config, plan, progress)
        tokens = batches.open_texts(config, skeleton, progress.say).tokens(config, skeleton)
        ids, repair_ids, segments = tokens.calibration, tokens.repair, tokens.evaluation
        sweeper.micro_batch = config.micro_batch or default_micro_batch(128 if ids is None else ids.shape[1])
        if tokens.said:
            progress.say(tokens.said)
        journal = None
        if journal_directory is not None:
            journal = resume.open_journal(config, skeleton, ids, repair_ids, journal_directory, progress, form)
            output.callback(journal.release)
            output.push(partial(resume.say_what_stays, journal_directory, progress))
        saved = {} if journal is None else journal.facts
        work = Work(*(None if given is None else (len(given), given.shape[1]) for given in (ids, repair_ids, segments)))
        plan, placement = _settle_and_say(config, plan, sweeper, work, saved, journal_directory, progress)
        limit_memory(skeleton.device, config.gpu_memory)
        output.callback(limit_memory, skeleton.device, None)
        compile_ahead(sweeper, config, plan, work)
        saved |= {"micro_batch": placement.micro_batch, "per_pass": plan.settings.get("per_pass")}
        if segments is not None and saved.get("before", [None])[0] != resume.hash_ids(segments):
            saved["before"] = [resume.hash_ids(segments), _perplexity(sweeper, segments, "before", progress)]
        if journal is not None:
            journal.save()
        found = rates.known(sweeper, 128 if ids is None else ids.shape[1], rates.default_cache())
        predicted = {} if found is None else {stage.name: rates.seconds(stage, found) for stage in placement.stages}
        job = Job(config, plan, sweeper, progress, ids, repair_ids, beside, journal=journal, predicted=predicted)
        job.state_slots = placement.held.state_slots
        job.state_scratch = config.scratch if placement.state == "scratch" else None
        begun = None if journal is None else journal.directory / "output"
        directory = output.enter_context(atomic_directory(config.output, overwrite=config.overwrite, temporary=begun))
        done = job.prune_weights(directory) if config.target == "weights" else job.cut(job.score(), directory)
        facts = run_facts(job, placement, done, tokens)
        if segments is not None:
            facts["perplexity"]["before"] = saved["before"][1]
    return directory, facts, _Written(type(done.form), done.form.kept, placement.place), segments


def _decide(
    config: PruneConfig,
    skeleton: Skeleton,
    form: type[OutputForm] | None,
    journal_directory: Path | None,
    progress: Progress,
) -> tuple[PruneConfig, Plan]:
    """Plan what goes, refuse what cannot be done, say what will be, and return the options as they were decided."""
    check_apart(config.output, skeleton.checkpoint.path, config.calibration, config.evaluate, config.scratch)
    refuse_without_kernels(config, skeleton.device)
    plan = make_plan(config, skeleton, form)
    _check_output_space(config, plan, skeleton, journal_directory)
    progress.say(describe(config, skeleton, plan))
    # The dtypes that "auto" came to are recorded, and a journal goes on with no others.
    kept_in = plan.state_dtype if plan.state else config.state_dtype
    return replace(config, dtype=dtype_name(skeleton.dtype), state_dtype=kept_in), plan


def _settle_and_say(
    config: PruneConfig,
    plan: Plan,
    sweeper: Sweeper,
    work: Work,
    saved: Mapping[str, Any],
    journal_directory: Path | None,
    progress: Progress,
) -> tuple[Plan, Placement]:
    """Settle where things stay, as a journal's first run did, and say it; refuse a disk too small for its commits."""
    # The micro-batch is part of the arithmetic: the one that the first run was planned with.
    planned = replace(config, micro_batch=saved.get("micro_batch", config.micro_batch))
    plan, placement = _settle(planned, plan, sweeper, work, per_pass=saved.get("per_pass"))
    if config.resume:
        carried = max(stage.carried for stage in placement.stages)
        _check_output_space(config, plan, sweeper.skeleton, journal_directory, carried)
    progress.say(placement_line(placement, sweeper))
    if passes := passes_line(config, plan):
        progress.say(passes)
    return plan, placement


def _check_output_space(
    config: PruneConfig, plan: Plan, skeleton: Skeleton, journal_directory: Path | None, carried: int = 0
) -> None:
    """Refuse a disk that is too small; `carried` are the bytes of hidden states of a journal's commit."""
    # The perplexity of compressed weights is that of a dense copy, which goes when it is measured.
    copied = skeleton.checkpoint.nbytes if plan.form.stored_as and config.evaluate is not False else 0
    # What the last commit carries, and what the next one does.
    kept = plan.state_bytes + 2 * carried if config.resume else 0
    check_space(config.output.parent, plan.form.nbytes + copied + kept - resume.already_there(journal_directory))


def _prepare_companions(config: PruneConfig, plan: Plan, progress: Progress) -> companions.Companions:
    """Decide what comes along beside the tensors, and say what does not."""
    found = companions.prepare(plan.form, trust_remote_code=config.trust_remote_code)
    for note in found.notes:
        progress.say(note)
    return found


def _source(
    config: PruneConfig, progress: Progress | None = None, *, planned: torch.device | None = None
) -> AbstractContextManager[Sweeper]:
    """Open the model that is pruned, as the options say."""
    source = Source(
        config.model,
        device=config.device,
        dtype=config.dtype,
        scope="units" if config.target == "units" else "matrices",
        trust_remote_code=config.trust_remote_code,
        reader=config.reader,
        read_threads=config.read_threads,
        backend="torch" if config.kernels == "torch" else None,
        planned=planned,
    )
    return source.open(progress)


def _settle(
    config: PruneConfig,
    plan: Plan,
    sweeper: Sweeper,
    work: Work,
    *,
    to_come: int = 0,
    memory: int | None = None,
    per_pass: int | None = None,
) -> tuple[Plan, Placement]:
    """Decide where things stay, and how many updates of a policy share a pass, and tell the sweeper.

    Args:
        to_come: what the process does not hold yet, in bytes.
        memory: bytes that the process and the page cache have together, if not what is free here.
        per_pass: the updates that share a pass, where it was decided before.
    """
    skeleton, process = sweeper.skeleton, psutil.Process().memory_info().rss
    loaded = skeleton.resident_bytes if skeleton.loaded and not is_gpu(skeleton.device) else 0
    memory = available_memory() + process if memory is None else memory
    place = partial(choose_placement, sweeper, config, work=work, baseline=process - loaded + to_come, memory=memory)
    placement = place(plan)
    if plan.settings.get("per_pass", 1) is None:
        count = per_pass or updates_per_pass(placement, plan.settings["steps"], is_gpu(skeleton.device))
        plan, placement = _sharing(plan, placement, place, count, decided=per_pass is not None)
    if config.scratch is not None and skeleton.loaded:
        spilled = max(stage.scratch for stage in placement.stages)
        check_directory(config.scratch, "--scratch")
        check_space(config.scratch, spilled, "what goes to --scratch")
    sweeper.micro_batch, sweeper.pager.slots = placement.micro_batch, placement.held.slots
    sweeper.graphs = placement.held.graphs
    sweeper.pager.page_cache = placement.page_cache
    sweeper.place, sweeper.scratch = placement.place, placement.scratch
    return plan, placement


def _sharing(
    plan: Plan, placement: Placement, place: Callable[[Plan], Placement], count: int, *, decided: bool
) -> tuple[Plan, Placement]:
    """Let so many updates share a pass: if it was not `decided` before, as many of them as there is memory for."""
    while count > 1:
        shared = replace(plan, settings={**plan.settings, "per_pass": count})
        try:
            return shared, place(shared)
        except StreampruneError:  # what they hold at the same time
            if decided:
                raise
            count //= 2
    return replace(plan, settings={**plan.settings, "per_pass": 1}), placement


def foretell(config: PruneConfig, *, measure: bool = False, assume: str | None = None) -> Forecast:
    """Forecast what `prune(config)` will hold and read, a row per stage; seconds where rates are measured or assumed.

    Its public name is `streamprune.plan`:

        print(plan(PruneConfig(model="SmolLM2-135M", output="pruned"), assume="rtx4090").text)

    Raises:
        StreampruneError: as `prune` before its work begins.
    """
    resolve_settings(config.method, config.settings, config.target)  # refused before a model is looked for
    form_class(config).check_machine()
    if assume is not None:
        if config.device is not None and not config.device.startswith("cuda"):
            raise UsageError(f"--device {config.device} is no {assume}; leave it or --assume {assume} out")
        planned: torch.device | None = card()  # which need not be here
        # Without a budget a run takes as large a share of what is free.
        config = replace(config, gpu_memory=config.gpu_memory or int(GPU_SHARE * (CARDS[assume].gib << 30)))
    else:
        planned = None if measure else compute_device(config.device)
    with _source(config, planned=planned) as sweeper:
        plan = make_plan(config, sweeper.skeleton)
        opened = batches.open_texts(config, sweeper.skeleton, planned=True)  # kept, since it counts in what is held
        work = opened.work(config, sweeper.skeleton)
        seq_len = work.calibration[1] if work.calibration else 128
        batches.check_length(seq_len if work.calibration else 0, sweeper.skeleton)
        sweeper.micro_batch = config.micro_batch or default_micro_batch(seq_len)
        # Memory that is given for a card that need not be here need not be here either.
        memory = config.host_memory if assume else None
        plan, placement = _settle(config, plan, sweeper, work, to_come=TEXT_BYTES, memory=memory)
        found = None
        if measure:
            found = rates.measured(sweeper, seq_len, rates.default_cache())
        elif assume is not None:
            found = rates.assumed(assume)
        reading = opened.plan(config, sweeper.skeleton)
        said = (describe(config, sweeper.skeleton, plan), passes_line(config, plan), reading)
        parts = (*said, forecast_table(placement, sweeper, found))
        text = "\n".join(part for part in parts if part)
        taken = {} if found is None else {stage.name: rates.seconds(stage, found) for stage in placement.stages}
        return Forecast(text, placement, taken)


def _perplexity(sweeper: Sweeper, segments: Tensor, when: str, progress: Progress) -> float:
    total = sweeper.pager.layer_bytes() * sweeps_needed(sweeper, segments)
    with progress.stage(f"perplexity {when}", total):
        found = perplexity(sweeper, segments)
    if not math.isfinite(found.perplexity):
        said = f"the loss {when} pruning is {found.loss:.4g}, which has no perplexity"
        if when == "before":
            raise StreampruneError(f"{said}; try another --dtype, or pass --no-evaluate")
        progress.say(f"{said}: the output is written, and is of no use in {dtype_name(sweeper.skeleton.dtype)}")
    return found.perplexity


def _perplexity_after(
    config: PruneConfig, directory: Path, written: _Written, segments: Tensor, progress: Progress
) -> float:
    with (
        written.form.readable(directory) as readable,
        Source(
            str(readable),
            device=config.device,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            read_threads=config.read_threads,  # not the reader: the output's filesystem may have no direct reads
        ).open(progress) as pruned,
    ):
        pruned.place, pruned.scratch = written.place, config.scratch  # as planned of the measurement before
        return _perplexity(pruned, segments, "after", progress)
