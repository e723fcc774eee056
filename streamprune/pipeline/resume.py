"""Resumption of an earlier run: what it must have in common with this one, and what it has left."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
from pathlib import Path

from torch import Tensor

from streamprune.config import PruneConfig
from streamprune.errors import JournalError, OutputError
from streamprune.figures import human
from streamprune.methods.table import resolve_settings
from streamprune.model.skeleton import Skeleton
from streamprune.output.form import OutputForm
from streamprune.paging.device import device_name
from streamprune.pipeline.progress import Progress
from streamprune.recovery.options import RecoverConfig
from streamprune.schema import flag_of, options_of
from streamprune.storage.checkpoint import Checkpoint, byte_view
from streamprune.storage.directory import OWN_FILE, PARTIAL
from streamprune.storage.journal import JOURNAL, Journal, in_use, remove_journal


def journal_directory(config: PruneConfig | RecoverConfig) -> Path | None:
    """Return where a run that can be resumed has its journal; one whose run is finished is removed.

    Raises:
        OutputError: the output has no name, as that of a whole disk.
    """
    if not config.resume:
        return None
    output = config.output.absolute()
    if not output.name:
        raise OutputError(f"{output} exists; choose another --output")
    directory = output.with_name(f".{output.name}.resume")
    if not config.overwrite:
        remove_finished(directory, config.output)
    return directory


def open_journal(
    config: PruneConfig,
    skeleton: Skeleton,
    ids: Tensor | None,
    repair_ids: Tensor | None,
    directory: Path,
    progress: Progress,
    form: type[OutputForm] | None = None,
) -> Journal:
    """Open the journal of this run, or of the one before that it goes on from; `form` as `prune` was given it.

    Raises:
        UsageError: the journal there is of another run.
        OutputError: it cannot be written, or another run uses it.
        JournalError: it is damaged.
    """
    journal = Journal(directory, _fingerprint(config, skeleton, ids, repair_ids, form))
    try:
        _take_over(journal, directory / "output", progress)
    except BaseException:
        journal.release()
        raise
    return journal


def _take_over(journal: Journal, partial_output: Path, progress: Progress) -> None:
    """Keep what counts of an earlier run's output, and remove the rest."""
    if journal.facts.get("digests") and not partial_output.is_dir():
        progress.say(
            f"{partial_output} is gone; the run begins anew{', from its scores' * bool(journal.facts.get('scored'))}"
        )
        journal.forget()
    if not journal.facts.get("digests"):
        # Begun, but nothing in it counts.
        shutil.rmtree(partial_output, ignore_errors=True)
    for copy in partial_output.parent.glob(f".{partial_output.name}{PARTIAL}*"):
        shutil.rmtree(copy, ignore_errors=True)  # of compressed weights, whose perplexity was being measured


def _fingerprint(
    config: PruneConfig,
    skeleton: Skeleton,
    ids: Tensor | None,
    repair_ids: Tensor | None,
    form: type[OutputForm] | None,
) -> dict[str, str | None]:
    """Gather what decides the bytes that come out: options, versions, tokens, the source's headers, sizes and dates."""
    options = {
        flag_of(name): str(getattr(config, name))
        for name, said in options_of(config).items()
        if said.changes_bytes and not said.resolved and name != "settings"
    }
    versions = {name: importlib.metadata.version(name) for name in ("streamprune", "torch", "transformers")}
    tokens = {"calibration tokens": hash_ids(ids), "repair tokens": hash_ids(repair_ids)}
    compute = {"compute device": device_name(skeleton.device)}
    named = {"output form": None if form is None else form.__qualname__}
    # With the defaults, which depend on other options, and may on the version.
    settings = resolve_settings(config.method, config.settings, config.target, repairs=config.compensate)
    options["--set"] = " ".join(f"{name}={value}" for name, value in sorted(settings.items()))
    return {**options, **named, **versions, **tokens, **compute, "source": hash_source(skeleton.checkpoint)}


def hash_source(checkpoint: Checkpoint) -> str:
    """Hash a checkpoint's config, headers, sizes and dates by SHA-256; its weights would have to be read for it."""
    source = hashlib.sha256(repr(sorted(checkpoint.tensors.values(), key=lambda entry: entry.name)).encode())
    source.update((checkpoint.path / "config.json").read_bytes())
    for file in checkpoint.files:
        source.update(repr((file.name, file.stat().st_size, file.stat().st_mtime_ns)).encode())
    return source.hexdigest()


def hash_ids(ids: Tensor | None) -> str | None:
    """Hash token ids, int64, by SHA-256: the text may change or go, what was computed on is known."""
    return None if ids is None else hashlib.sha256(byte_view(ids.contiguous())).hexdigest()


def already_there(journal_directory: Path | None) -> int:
    """Count the bytes that an earlier run has taken for its output and its state."""
    if journal_directory is None or not journal_directory.is_dir():
        return 0
    return sum(file.stat().st_size for file in journal_directory.rglob("*") if file.is_file())


def remove_finished(directory: Path, output: Path) -> None:
    """Remove the journal of a run that was killed when its output was there already: nothing in it is under way.

    Where the output is older than the journal it is of another run, which this one was to replace.
    """
    journal, own = directory / JOURNAL, output / OWN_FILE
    if not (journal.is_file() and own.is_file()) or (directory / "output").exists() or in_use(directory):
        return
    if own.stat().st_mtime_ns >= journal.stat().st_mtime_ns:
        remove_journal(directory)


def say_what_stays(directory: Path, progress: Progress, kind: type[BaseException] | None, *rest: object) -> None:
    """Say, of a run that did not end well, where its journal is; a journal that holds nothing goes."""
    if kind is not None and not (directory / JOURNAL).is_file():
        remove_journal(directory)
    elif kind is not None and not issubclass(kind, JournalError):
        nbytes = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
        progress.say(f"{directory} keeps {human(nbytes)} to go on from: repeat the command, or remove it")
