"""Sequences of tokens out of texts: no more of a text is read than they take."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamprune.errors import CalibrationError, UsageError
from streamprune.texts.documents import Documents
from streamprune.texts.sources import open_documents
from streamprune.texts.tokenizer import beginning, chat_renderer, load_tokenizer, token_blocks, tokenize
from streamprune.texts.windows import Windows, at_places, of_stream, starts_of_records

# Of a text up to this long all tokens are known, and any of them may begin a random sequence. Of a longer one places in
# the text are drawn, and only what follows them is read.
WHOLE_CHARACTERS = 4 << 20
SAID_AFTER, SAID_EVERY = 1.0, 15.0  # seconds of reading until a line says so


def joined(documents: Documents) -> Iterator[str]:
    """Yield the text of all records in pieces, with the separator between records."""
    return _with_separators(documents.records(), documents.separator)


def _with_separators(texts: Iterator[str], separator: str) -> Iterator[str]:
    for number, text in enumerate(texts):
        yield separator + text if number and separator else text


def sample_sequences(
    tokens: Tensor, samples: int, seq_len: int, sampling: str, seed: int, marks: tuple[int, ...] = ()
) -> Tensor:
    """Take sequences [samples, seq_len] from the tokens of a text.

    Args:
        sampling: "random" draws windows at seeded positions; "first" takes consecutive ones from the start.
        marks: tokens that a window is not to begin with, since it is given them: a conversation may have them already.

    Raises:
        CalibrationError: fewer than samples × seq_len tokens.
    """
    needed = samples * seq_len
    if len(tokens) < needed:
        raise CalibrationError(_too_short(f"{len(tokens):,}", samples, seq_len))
    if sampling == "first":
        return tokens[:needed].view(samples, seq_len)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - seq_len + 1, (samples,), generator=generator)
    # Drawn longer by the marks, which may have to go from the beginning; at the text's end there may be no more of it.
    windows = [
        without_marks(tokens[start : start + seq_len + len(marks)], marks)[:seq_len] for start in starts.tolist()
    ]
    return torch.stack([window if len(window) == seq_len else tokens[-seq_len:] for window in windows])


def without_marks(tokens: Tensor, marks: tuple[int, ...]) -> Tensor:
    """Return tokens without the marks that they begin with, if they do."""
    return tokens[len(marks) :] if marks and tokens[: len(marks)].tolist() == list(marks) else tokens


def _too_short(tokens: str, samples: int, seq_len: int) -> str:
    return (
        f"the text has {tokens} tokens, {samples} samples of {seq_len} need {samples * seq_len:,}; "
        "give a longer --calibration, or lower --samples or --seq-len"
    )


@dataclasses.dataclass
class Corpus:
    """Source of token sequences out of a text.

    Attributes:
        beginning: tokens that every sequence begins with; the others are the text's.
        say: told how much was read where it takes more than a second.
    """

    documents: Documents
    tokenizer: Any
    beginning: tuple[int, ...] = ()
    say: Callable[[str], None] = dataclasses.field(default=lambda line: None)
    clock: Callable[[], float] = time.perf_counter

    def count(self, most: int) -> int:
        """Count the tokens of the text; where it has more than `most`, any number from `most` on."""
        return len(self._leading(most)) if self._whole is None else len(self._whole)

    def sequences(self, samples: int, seq_len: int, sampling: str, seed: int) -> Tensor:
        """Take sequences of ids [samples, seq_len], int64: the beginning, and then tokens of the text.

        Args:
            sampling: "random" draws windows, "first" takes consecutive ones from the start of the text, "records" the
                starts of records, each that is long enough as likely as any other.

        Raises:
            CalibrationError: the text is too short for as many, or has no records.
        """
        length = self._text_length(seq_len)
        if sampling == "records":
            found = self._from_records(samples, length, seed)
        elif sampling == "first":
            tokens = without_marks(self._leading(samples * length + len(self.beginning)), self.beginning)
            found = sample_sequences(tokens, samples, length, sampling, seed)
        elif self._whole is not None:
            found = sample_sequences(self._whole, samples, length, sampling, seed, self.beginning)
        else:
            found = self._from_places(samples, length, seed)
        return self._begun(found)

    def segments(self, seq_len: int, samples: int | None, most: int | None = None) -> Tensor:
        """Cut non-overlapping sequences [n, seq_len] from the text's start, each with the beginning; the rest goes.

        Args:
            samples: how many; None for all there are, up to `most`.

        Raises:
            CalibrationError: fewer tokens than `samples` need, or than one.
        """
        length = self._text_length(seq_len)
        wanted = samples or most
        tokens = self._leading(None if wanted is None else wanted * length + len(self.beginning))
        tokens = without_marks(tokens, self.beginning)
        n = samples or min(len(tokens) // length, most or len(tokens))
        if len(tokens) < max(1, n) * length:
            remedy = "give a longer text, or " + ("lower --samples or --seq-len" if samples else "shorter segments")
            raise CalibrationError(
                f"{self.documents.where} has {len(tokens):,} tokens, {max(1, n)} segments of {length} need "
                f"{max(1, n) * length:,}; {remedy}"
            )
        return self._begun(tokens[: n * length].view(n, length))

    def describe(self, ids: Tensor) -> str:
        """Describe sequences in words: 10 x 128 tokens, each <bos> and 127 of the text."""
        n, seq_len = ids.shape
        if not self.beginning:
            return f"{n} x {seq_len} tokens"
        marks = "".join(self.tokenizer.convert_ids_to_tokens(list(self.beginning)))
        return f"{n} x {seq_len} tokens, each {marks} and {seq_len - len(self.beginning)} of the text"

    def _text_length(self, seq_len: int) -> int:
        length = seq_len - len(self.beginning)
        if length < 1:
            raise UsageError(f"--seq-len {seq_len}: leaves no token beside the {len(self.beginning)} that begin each")
        return length

    def _begun(self, windows: Tensor) -> Tensor:
        start = torch.tensor(self.beginning, dtype=torch.int64).expand(len(windows), -1)
        return torch.cat([start, windows], dim=1) if self.beginning else windows

    def _leading(self, count: int | None) -> Tensor:
        """Return the first `count` tokens of the text at least, or all that it has."""
        if self._whole is not None:
            return self._whole
        blocks, total, told = [], 0, _Told(self)
        for block in token_blocks(self.tokenizer, told.passing(joined(self.documents))):
            blocks.append(block)
            total += len(block)
            if count is not None and total >= count:
                break
        return torch.cat([torch.empty(0, dtype=torch.int64), *blocks])

    @cached_property
    def _whole(self) -> Tensor | None:
        """Token ids of the whole text, if it has up to WHOLE_CHARACTERS; None for a longer one."""
        pieces, length = [], 0
        for piece in joined(self.documents):
            pieces.append(piece)
            length += len(piece)
            if length > WHOLE_CHARACTERS:
                return None
        return torch.cat([torch.empty(0, dtype=torch.int64), *token_blocks(self.tokenizer, pieces)])

    def _from_places(self, samples: int, length: int, seed: int) -> Tensor:
        """Take windows [samples, length] from a text that is too long to be tokenised as a whole."""
        documents, draw, windows = self.documents, random.Random(seed), Windows(self._encode, length)
        if documents.places is not None:
            at_places(documents, windows, samples, draw)
        else:
            told = _Told(self)
            of_stream(lambda: told.passing(joined(documents)), windows, samples, draw)
        if len(windows.found) < samples:
            raise CalibrationError(self._too_few("places", len(windows.found), samples, length))
        characters = windows.passed or documents.nbytes
        if characters and characters / windows.characters_per_token < samples * length:
            about = f"about {int(characters / windows.characters_per_token):,}"
            raise CalibrationError(_too_short(about, samples, length))
        return torch.stack(windows.found)

    def _from_records(self, samples: int, length: int, seed: int) -> Tensor:
        """Take the starts [samples, length] of as many records."""
        documents, draw = self.documents, random.Random(seed)
        if documents.prose:
            raise UsageError(f"--sampling records: {documents.where} is prose without records; use random or first")
        if documents.shuffled is not None:
            tokens = map(self._encode, documents.shuffled(draw))
            starts = list(islice((ids[:length] for ids in tokens if len(ids) >= length), samples))
        else:
            told = _Told(self).passing(documents.records())
            starts = starts_of_records(told, self._encode, samples, length, draw)
        if len(starts) < samples:
            raise CalibrationError(self._too_few("records", len(starts), samples, length))
        return torch.stack(starts)

    def _too_few(self, what: str, found: int, samples: int, length: int) -> str:
        return (
            f"{self.documents.where}: {found} {what} with {length} tokens of text were found for {samples} samples; "
            "give a longer --calibration, or lower --samples or --seq-len"
        )

    def _encode(self, text: str) -> Tensor:
        return without_marks(tokenize(self.tokenizer, text), self.beginning)


def open_corpus(
    model: Path,
    source: str | Path | Documents,
    *,
    field: str = "text",
    bos: str = "auto",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Corpus:
    """Open a text for the tokenizer of a model directory; arguments as the options of `PruneConfig`."""
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    begins = beginning(tokenizer, bos)
    if not isinstance(source, Documents):
        source = open_documents(source, field, chat_renderer(tokenizer))
    return Corpus(source, tokenizer, begins, say)


class _Told:
    """Reporter of how much of a text was read, after a second of reading and then now and again."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus, self._characters = corpus, 0
        self._next = corpus.clock() + SAID_AFTER

    def passing(self, pieces: Iterable[str]) -> Iterator[str]:
        """Pass pieces on and count their characters."""
        for piece in pieces:
            self._characters += len(piece)
            if (now := self._corpus.clock()) >= self._next:
                self._next = now + SAID_EVERY
                where, millions = self._corpus.documents.where, self._characters / 1e6
                self._corpus.say(f"reading {where}: {millions:,.0f} million characters so far")
            yield piece
