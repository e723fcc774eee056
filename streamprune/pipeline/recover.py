"""Recovery of a checkpoint: LoRA on a data set, in memory or streamed, merged into it or kept as an adapter."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import StreampruneError
from streamprune.figures import number_of, peak_rss
from streamprune.output import companions
from streamprune.output.card import ADAPTER_LAYOUT, recovered_card
from streamprune.output.ragged_form import unchanged_form
from streamprune.output.writer import OutputWriter
from streamprune.paging.device import limit_memory
from streamprune.paging.pager import Page
from streamprune.pipeline import resume
from streamprune.pipeline.facts import base_name, source_name
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.recovery_work import (
    LORA_PACKAGES,
    RecoveryWork,
    check_packages,
    check_source,
    hash_examples,
    prepare_recovery,
    recovery_fingerprint,
    scratch_of,
    source_of,
)
from streamprune.recovery.course import Trained, TrainingStep, check_number, grouped, keep_logits, mean_loss
from streamprune.recovery.distillation import TeacherLogits
from streamprune.recovery.lora import Adapter, write_adapter
from streamprune.recovery.options import RecoverConfig
from streamprune.recovery.streamed import AttachedAdapter, SavedTraining, train_streamed
from streamprune.schema import default_of
from streamprune.storage.checkpoint import is_finite, resolve_model
from streamprune.storage.directory import OWN_FILE, atomic_directory, check_output, write_json
from streamprune.storage.journal import JOURNAL, Journal, remove_journal
from streamprune.streaming.perplexity import perplexity, sweeps_needed
from streamprune.streaming.sweeper import Sweeper
from streamprune.texts import sources

RECOVERY_STEPS = "recovery.jsonl"  # a line per step
SMALLER = "train at a lower --learning-rate, or give another --dtype"
TRAINER = "trainer"  # what a training in memory keeps in a journal


@dataclass(frozen=True)
class RecoverResult:
    """Result of a recovery: the directory, its layout ("adapter" where it was not merged), its streamprune.json."""

    output: Path
    layout: str
    facts: dict[str, Any]


def recover(config: RecoverConfig, progress: Any = None) -> RecoverResult:
    """Train a checkpoint further by LoRA, as `config` says, and write the result.

        result = recover(RecoverConfig(model="pruned", data="alpaca.jsonl", output="recovered"))
        print(result.facts["recovery"]["perplexity"])

    Args:
        progress: as of `prune`.

    Raises:
        StreampruneError: anything that cannot be done, with the remedy; nothing is left at the output then.
    """
    started = time.perf_counter()
    progress = Progress.of(progress)
    journal_directory = resume.journal_directory(config)
    check_output(config.output, overwrite=config.overwrite)
    check_packages(config)
    own = check_source(config)
    with ExitStack() as output:
        work, before, trained = _train(config, own, output, progress, journal_directory)
        trained.check()
        directory = output.enter_context(atomic_directory(config.output, overwrite=config.overwrite))
        facts = _write(config, work, trained, directory, progress)
        try:
            after = _measure_after(config, work, trained.adapter, directory, progress)
            facts["recovery"] |= _figures(config, work, before, after)
        except (MemoryError, torch.OutOfMemoryError):  # a training of hours is worth more than its figures
            progress.say("out of memory while the result is measured: it is written; try `streamprune eval` on it")
        facts["recovery"] |= {"seconds": time.perf_counter() - started, "peak_rss": peak_rss()}
        write_json(directory / OWN_FILE, facts)
        _write_card(config, work, facts, directory)
    if journal_directory is not None:
        remove_journal(journal_directory)
    return RecoverResult(config.output, facts["layout"], facts)


def _train(
    config: RecoverConfig, own: dict[str, Any], output: ExitStack, progress: Progress, journal_directory: Path | None
) -> tuple[RecoveryWork, dict[str, float], Trained]:
    """Do all that comes before the output: check, measure, ask the teacher, and train."""
    journal = None
    with source_of(config).open(progress) as sweeper:
        for note in sweeper.skeleton.notes:
            progress.say(note)
        work = prepare_recovery(config, sweeper, own, progress)
        if journal_directory is not None:
            journal = Journal(journal_directory, recovery_fingerprint(config, work, sweeper.skeleton))
            output.callback(journal.release)
            if not (journal_directory / JOURNAL).is_file():  # of a run that was killed while it removed its journal
                shutil.rmtree(journal_directory / TRAINER, ignore_errors=True)
            output.push(partial(resume.say_what_stays, journal_directory, progress))
        limit_memory(sweeper.skeleton.device, config.gpu_memory)
        output.callback(limit_memory, sweeper.skeleton.device, None)
        saved: dict[str, Any] = {} if journal is None else journal.facts
        evaluated = resume.hash_ids(work.segments)
        if saved.get("before", [""])[0] != evaluated:
            saved["before"] = [evaluated, _measure(sweeper, work, "before", progress)]
        if journal is not None:
            journal.save()
        measured = saved["before"][1]
        if work.course is None:
            return work, measured, Trained(work.adapter, ())
    # Here the source's embeddings and head are gone: a teacher has the memory alone, and so has a model that comes as a
    # whole.
    with _teacher(config, work, journal, progress) as teacher:
        train = _train_streamed if config.streamed else _train_in_memory
        return work, measured, train(config, work, teacher, journal, progress)


@contextmanager
def _opened(config: RecoverConfig, work: RecoveryWork, model: str, progress: Progress) -> Iterator[Sweeper]:
    """Open a model, whose hidden states stay where those of the training do."""
    with replace(source_of(config), model=model).open(progress) as sweeper:
        sweeper.place, sweeper.scratch = work.place, config.scratch
        yield sweeper


@contextmanager
def _teacher(
    config: RecoverConfig, work: RecoveryWork, journal: Journal | None, progress: Progress
) -> Iterator[TeacherLogits | None]:
    """Give what the teacher says of the sequences, if there is one and a step is left, as long as the block runs."""
    if config.distill is None or _is_trained(config, work, journal):
        yield None
        return
    with ExitStack() as stack:
        kept = TeacherLogits(scratch_of(config), config.top_k, work.train)
        stack.callback(kept.close)
        with _opened(config, work, config.distill, progress) as sweeper:
            assert work.course is not None, "there is a teacher where something is learnt"
            asked = set(work.course.order())
            sweeps = len(list(grouped(sweeper, work.train, asked)))
            with progress.stage("teacher", sweeps * sweeper.pager.layer_bytes()):
                keep_logits(sweeper, work.train, kept, asked)
        yield kept


def _is_trained(config: RecoverConfig, work: RecoveryWork, journal: Journal | None) -> bool:
    """Tell whether an earlier run has made all steps."""
    if journal is None or work.course is None:
        return False
    if config.streamed:
        return len(journal.facts.get("steps", ())) == work.course.steps
    from streamprune.recovery.in_memory import saved_steps

    return saved_steps(journal.directory / TRAINER) == work.course.steps


def _train_streamed(
    config: RecoverConfig,
    work: RecoveryWork,
    teacher: TeacherLogits | None,
    journal: Journal | None,
    progress: Progress,
) -> Trained:
    assert work.course is not None
    steps, done = work.course.steps, 0 if journal is None else len(journal.facts.get("steps", ()))
    with _opened(config, work, config.model, progress) as sweeper:
        sweeper.pager.slots = work.slots
        with progress.stage("training", 2 * (steps - done) * sweeper.pager.layer_bytes()):
            return train_streamed(
                sweeper,
                work.adapter,
                work.train,
                work.course,
                dropout=config.dropout,
                teacher=teacher,
                saved=None if journal is None else SavedTraining(journal),
                note=lambda step: _tell(progress, step, steps),
            )


def _train_in_memory(
    config: RecoverConfig,
    work: RecoveryWork,
    teacher: TeacherLogits | None,
    journal: Journal | None,
    progress: Progress,
) -> Trained:
    from streamprune.recovery.in_memory import train_in_memory

    assert work.course is not None
    steps = work.course.steps

    def note(step: TrainingStep) -> None:
        progress.advance(1, read=0)
        _tell(progress, step, steps)

    source = source_of(config, planned=True)
    with source.open() as planned, progress.stage("training", steps):
        return train_in_memory(
            planned.skeleton,
            work.adapter,
            work.train,
            work.course,
            micro_batch=source.micro_batch,
            dropout=config.dropout,
            teacher=teacher,
            directory=None if journal is None else journal.directory / TRAINER,
            trust_remote_code=config.trust_remote_code,
            note=note,
        )


def _tell(progress: Progress, step: TrainingStep, steps: int) -> None:
    progress.note(step.number, steps, loss=step.loss, learning_rate=step.learning_rate)


def _measure(sweeper: Sweeper, work: RecoveryWork, when: str, progress: Progress) -> dict[str, float]:
    """Measure the perplexity, and the loss of the sequences that are held out, as far as there are any."""
    found = {}
    sweeps = 0 if work.segments is None else sweeps_needed(sweeper, work.segments)
    sweeps += len(list(grouped(sweeper, work.held_out)))
    if sweeps:
        with progress.stage(f"measuring {when}", sweeps * sweeper.pager.layer_bytes()):
            if work.segments is not None:
                found["perplexity"] = perplexity(sweeper, work.segments).perplexity
            if work.held_out:
                found["loss"] = mean_loss(sweeper, work.held_out)
    for name, value in found.items():
        remedy = "give another --dtype" if when == "before" else SMALLER
        check_number(f"{when} the training: the {name}", value, remedy)
    return found


def _measure_after(
    config: RecoverConfig, work: RecoveryWork, adapter: Adapter, directory: Path, progress: Progress
) -> dict[str, float]:
    """Measure the output: the merged checkpoint, or the source with the adapter attached."""
    if config.adapter:
        with _opened(config, work, config.model, progress) as sweeper, AttachedAdapter(sweeper, adapter).attached():
            return _measure(sweeper, work, "after", progress)
    with _opened(config, work, str(directory), progress) as sweeper:
        return _measure(sweeper, work, "after", progress)


def _write(
    config: RecoverConfig, work: RecoveryWork, trained: Trained, directory: Path, progress: Progress
) -> dict[str, Any]:
    """Write the tensors and what lies beside them; return the facts so far."""
    with _opened(config, work, config.model, progress) as sweeper:
        skeleton = sweeper.skeleton
        beside = companions.prepare(unchanged_form(skeleton), trust_remote_code=config.trust_remote_code)
        facts: dict[str, Any] = {"base_model": base_name(config.model), "license": beside.license}
        if config.adapter:
            write_adapter(directory, skeleton, trained.adapter, source_name(config.model), config.dropout)
            facts["layout"], digest = ADAPTER_LAYOUT, None
        else:
            for note in beside.notes:
                progress.say(note)
            form = unchanged_form(skeleton)
            facts = {**facts, "layout": form.layout, **work.own}
            digest = _merge(sweeper, trained.adapter, directory, config.max_shard_size, progress)
            beside.write(form.config(), directory, files=form.files())
        if trained.steps:
            lines = "".join(json.dumps(asdict(step), allow_nan=False) + "\n" for step in trained.steps)
            (directory / RECOVERY_STEPS).write_text(lines, encoding="utf-8")
        facts["recovery"] = _recovery_facts(config, work, trained, digest)
        return facts


def _merge(sweeper: Sweeper, adapter: Adapter, directory: Path, max_shard_size: int, progress: Progress) -> str:
    """Write the source's tensors with the adapter added, a layer in memory at a time; return the source's hash."""
    skeleton = sweeper.skeleton

    def merged(page: Page) -> dict[str, Tensor]:
        made = {}
        for name, transposed in skeleton.matrices(page.layer).items():
            stored = page.tensors[name]
            # Rounded once, where PEFT rounds the product first.
            wide = stored.to(torch.promote_types(stored.dtype, adapter.parameters[0].dtype))
            delta = adapter.delta((page.layer, name), transposed=transposed, device=stored.device)
            made[name] = (wide + delta).to(stored.dtype)
            if not is_finite(made[name]):
                raise StreampruneError(f"layer {page.layer}, {name} overflows with the adapter added; {SMALLER}")
        return made

    with (
        OutputWriter(unchanged_form(skeleton), directory, max_shard_size) as writer,
        progress.stage("writing", sweeper.pager.layer_bytes()),
    ):
        return writer.finish(sweeper.pager, merged)


def _recovery_facts(
    config: RecoverConfig, work: RecoveryWork, trained: Trained, source_hash: str | None
) -> dict[str, Any]:
    """Gather what streamprune.json says of the training: enough to repeat it."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    rank, alpha = len(trained.adapter.parameters[0]), trained.adapter.alpha
    merged = "kept apart" if config.adapter else "merged into the weights"
    lora = f"LoRA of rank {rank}, alpha {alpha:g}, on all linear layers of the decoder"
    steps = f"{number_of(len(trained.steps), 'step')} of {number_of(config.batch, 'sequence')}, "
    facts: dict[str, Any] = {
        "done": f"{lora}: {steps * (work.course is not None)}{merged}",
        "recipe": _recipe(config),
        "options": options,
        "versions": {name: importlib.metadata.version(name) for name in LORA_PACKAGES if config.data or name != "peft"}
        | {"python": platform.python_version()},
        "source": {"model": source_name(config.model), "sha256_of_tensors": source_hash},
    }
    if work.data is not None:
        sequences = {"trained on": len(work.train), "held out": len(work.held_out)}
        hashed = hash_examples([*work.train, *work.held_out])
        longest = max(len(each.ids) for each in work.train)
        facts["data"] = {"layout": work.data.layout, "sequences": sequences, "longest": longest, "sha256": hashed}
    if "recovery" in work.own:
        facts["earlier"] = work.own["recovery"]
    return facts


def _recipe(config: RecoverConfig) -> dict[str, Any]:
    """Choose the options that decided the result: those that were given, or say something in any case."""
    recipe = {}
    for each in fields(config):
        value, said = getattr(config, each.name), each.metadata["option"]
        if each.name in ("model", "adapter") or not said.changes_bytes or said.card == "never" or value is None:
            continue
        if value != default_of(each) or each.name in ("epochs", "batch", "learning_rate", "seed"):
            named = each.name in ("data", "distill", "merge", "init_adapter")
            recipe[each.name] = sources.shown(str(value)) if named else value
    return recipe if config.data is not None else {"merge": recipe["merge"]}


def _figures(
    config: RecoverConfig, work: RecoveryWork, before: dict[str, float], after: dict[str, float]
) -> dict[str, Any]:
    """Put what was measured before and after side by side."""
    found: dict[str, Any] = {}
    if work.segments is not None:
        found["perplexity"] = {
            "text": sources.shown(config.evaluate) if config.evaluate else "embedded held-out prose",
            "segments": list(work.segments.shape),
            "sha256_of_ids": resume.hash_ids(work.segments),
            "before": before["perplexity"],
            "after": after["perplexity"],
        }
    if work.held_out:
        found["loss"] = {"sequences": len(work.held_out), "before": before["loss"], "after": after["loss"]}
    return found


def _write_card(config: RecoverConfig, work: RecoveryWork, facts: dict[str, Any], directory: Path) -> None:
    previous = resolve_model(config.model, trust_remote_code=config.trust_remote_code) / "README.md"
    text = None
    if work.own and previous.is_file() and not config.adapter:
        text = previous.read_text(encoding="utf-8", errors="replace")  # somebody may have edited it
    card = recovered_card(facts, type(work.form), text)
    (directory / "README.md").write_text(card, encoding="utf-8", errors="backslashreplace")
