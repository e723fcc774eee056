"""Tokens of a run: what the method, the repair and the evaluation compute on."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from streamprune.config import PruneConfig
from streamprune.errors import CalibrationError, CheckpointError, UsageError
from streamprune.figures import human
from streamprune.methods.table import METHODS
from streamprune.model.skeleton import Skeleton
from streamprune.planning.stage import Work, calibration_shape
from streamprune.schema import flag_of
from streamprune.texts import documents, sources
from streamprune.texts.corpus import WHOLE_CHARACTERS, Corpus
from streamprune.texts.tokenizer import beginning, chat_renderer, load_tokenizer

EVALUATION_SEQ_LEN = 128
EVALUATION_SEGMENTS = 100  # at most
REPAIR_SEQ_LEN = 512
# Bytes of a compressed text, an array or a table: the least that two cores were measured to pass.
PASSED_A_SECOND = 50e6


def expected_work(config: PruneConfig, skeleton: Skeleton, text_tokens: int | None = None) -> Work:
    """Count the sequences of each part of a run and the tokens of each: as asked, else as the method's paper has it.

    Args:
        text_tokens: tokens of the calibration text, counted up to what the repair may take; None before the text is
            read, which is then taken to have as many.
    """
    limit, reads = skeleton.positions, METHODS[config.method].needs_text
    repair_tokens = config.compensate_tokens if text_tokens is None else min(config.compensate_tokens, text_tokens)
    repair_len = min(REPAIR_SEQ_LEN, limit, repair_tokens)
    return Work(
        calibration_shape(config, limit) if reads else None,
        (repair_tokens // repair_len, repair_len) if config.compensate else None,
        None if config.evaluate is False else (EVALUATION_SEGMENTS, min(EVALUATION_SEQ_LEN, limit)),
    )


@dataclass(frozen=True)
class Tokens:
    """Token ids that a run computes on, int64.

    Attributes:
        calibration: ids for the method [n, seq]. repair: ids for the least squares [n, seq]. evaluation: ids for the
            perplexity before and after [n, seq]. None where there are none.
        beginning: the tokens that begin each sequence, and what they are called.
        said: all of it in words.
    """

    calibration: Tensor | None = None
    repair: Tensor | None = None
    evaluation: Tensor | None = None
    beginning: tuple[tuple[int, str], ...] = ()
    said: str = ""


@dataclass(frozen=True)
class Texts:
    """Opened texts of a run: what can be wrong with them is known, but little was read."""

    tokenizer: Any = None
    calibration: Corpus | None = None
    evaluation: Corpus | None = None

    def work(self, config: PruneConfig, skeleton: Skeleton) -> Work:
        """Count what a run will compute on: by its tokens where it calibrates on the package's text, which is short.

        Raises:
            CalibrationError: as of `tokens`, where they are read.
        """
        expected = expected_work(config, skeleton)
        if self.calibration is None or config.calibration is not None:
            return expected
        read = replace(self, evaluation=None).tokens(config, skeleton)
        calibration, repair = (
            None if ids is None else (len(ids), ids.shape[1]) for ids in (read.calibration, read.repair)
        )
        return Work(calibration, repair, expected.evaluation)

    def plan(self, config: PruneConfig, skeleton: Skeleton) -> str:
        """Say what will be read of the texts that the user gave, a line for each."""
        lines = []
        if self.calibration is not None and config.calibration is not None:
            work = expected_work(config, skeleton)
            samples = sum(shape[0] for shape in (work.calibration, work.repair) if shape is not None)
            lines.append(f"calibration reads {_what_is_read(self.calibration, samples, config.sampling)}")
        if self.evaluation is not None and config.evaluate is not None:
            lines.append(f"evaluation reads {_what_is_read(self.evaluation, EVALUATION_SEGMENTS, 'first')}")
        return "\n".join(lines)

    def tokens(self, config: PruneConfig, skeleton: Skeleton) -> Tokens:
        """Read and tokenise what is needed.

        Raises:
            CalibrationError: a text is too short or damaged.
            CheckpointError: the tokenizer is another model's.
        """
        found: dict[str, tuple[Corpus, Tensor]] = {}
        work = expected_work(config, skeleton)
        if self.calibration is not None and work.calibration is not None:
            check_length(work.calibration[1], skeleton)
            ids = self.calibration.sequences(*work.calibration, config.sampling, config.seed)
            found["calibration"] = self.calibration, ids
        if self.calibration is not None and work.repair is not None:
            found["repair"] = self.calibration, _repair_ids(config, skeleton, self.calibration)
        if self.evaluation is not None and work.evaluation is not None:
            segments, seq_len = work.evaluation
            found["evaluation"] = self.evaluation, self.evaluation.segments(seq_len, None, segments)
        for corpus, ids in found.values():
            check_tokens(ids, skeleton)
            begins = corpus.beginning
        if not found:
            return Tokens()
        named = zip(begins, self.tokenizer.convert_ids_to_tokens(list(begins)), strict=True)
        said = "; ".join(f"{name} on {corpus.describe(ids)}" for name, (corpus, ids) in found.items())
        return Tokens(**{name: ids for name, (_, ids) in found.items()}, beginning=tuple(named), said=said)


def open_texts(
    config: PruneConfig, skeleton: Skeleton, say: Callable[[str], None] = lambda line: None, *, planned: bool = False
) -> Texts:
    """Load the tokenizer and open the texts, where the run needs any.

    Args:
        say: told while much is read.
        planned: leave a pipe to the run that will read it.

    Raises:
        CheckpointError: no usable tokenizer.
        CalibrationError: a text is missing, or not of a kind that is read.
    """
    calibrated = METHODS[config.method].needs_text or config.compensate
    unused = [flag_of(name) for name in ("calibration", "samples") if getattr(config, name) is not None]
    if unused and not calibrated:
        say(f"{config.method} is not calibrated: {' and '.join(unused)} mean nothing to it")
    if not calibrated and config.evaluate is False:
        return Texts()
    tokenizer = load_tokenizer(skeleton.checkpoint.path, trust_remote_code=config.trust_remote_code)
    start = beginning(tokenizer, config.bos)
    render = chat_renderer(tokenizer)

    def corpus(source: str | Path | None, prose: str) -> Corpus | None:
        """Open the text that was named, or that of the package; None for a pipe that is not to be read yet."""
        if source is None:
            return Corpus(documents.embedded(prose), tokenizer, start)
        if planned and _is_pipe(str(source)):
            return None
        found = sources.open_documents(source, config.field, render)
        if planned:
            next(found.records(), None)  # the first is as good or bad as the others
        return Corpus(found, tokenizer, start, say)

    return Texts(
        tokenizer,
        corpus(config.calibration, "calibration") if calibrated else None,
        None if config.evaluate is False else corpus(config.evaluate, "heldout"),
    )


def _what_is_read(corpus: Corpus, samples: int, sampling: str) -> str:
    """Say how much of a text is read for so many sequences."""
    stored, where = corpus.documents.stored, corpus.documents.where
    if sampling == "first":
        return f"the beginning of {where}"
    if stored is None or stored <= WHOLE_CHARACTERS:
        return f"all of {where}" if stored is not None else f"{samples} places in {where}"
    if corpus.documents.places is not None:
        return f"{samples} places in {human(stored)} of {where}"
    return f"all {human(stored)} of {where}, about {stored / PASSED_A_SECOND:,.0f} s"


def _is_pipe(source: str) -> bool:
    path = Path(source)
    return source == "-" or (path.exists() and stat.S_ISFIFO(path.stat().st_mode))


def _repair_ids(config: PruneConfig, skeleton: Skeleton, corpus: Corpus) -> Tensor:
    """Take sequences [n, seq] for the least squares: `compensate_tokens` tokens, or as many as the text has."""
    count = corpus.count(config.compensate_tokens)
    if count < 1:
        raise CalibrationError(f"--calibration {config.calibration}: the text has no tokens; give a longer one")
    shape = expected_work(config, skeleton, count).repair
    assert shape is not None, "a repair is asked for"
    if shape[1] <= len(corpus.beginning):
        raise UsageError(f"--compensate-tokens {config.compensate_tokens}: none is left of the text; raise it")
    # Few records are as long as these sequences.
    sampling = "random" if config.sampling == "records" else config.sampling
    return corpus.sequences(*shape, sampling, config.seed)


def check_length(seq_len: int, skeleton: Skeleton) -> None:
    """Refuse sequences longer than the model's positions."""
    if seq_len > skeleton.positions:
        raise UsageError(f"--seq-len {seq_len}: the model takes at most {skeleton.positions} positions; lower it")


def check_tokens(ids: Tensor, skeleton: Skeleton) -> None:
    """Refuse the tokens [n, seq] of another model's tokenizer."""
    vocabulary = skeleton.config.vocab_size
    if int(ids.max()) >= vocabulary:
        raise CheckpointError(
            f"{skeleton.checkpoint.path}: its tokenizer gives token {int(ids.max())}, the model knows {vocabulary}; "
            "copy the tokenizer files of this model there"
        )
