"""Examples to train on: instructions with answers, conversations, or plain text, as token ids and what the loss counts.

Which of them a data set holds is told by the fields of its first record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from streamprune.errors import CalibrationError, UsageError
from streamprune.texts.corpus import Corpus
from streamprune.texts.documents import BLANK_LINE, Documents
from streamprune.texts.records import INSTRUCTION, MOST_FIELDS, messages_of, rendered, repaired, text_of
from streamprune.texts.sources import open_documents
from streamprune.texts.tokenizer import beginning, chat_renderer, load_tokenizer

IGNORED = -100  # label of a token that the loss does not count, as torch and transformers have it
# The prompts of Stanford Alpaca (github.com/tatsu-lab/stanford_alpaca, train.py), which LLM-Pruner's recovery uses too.
WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
OUTPUT, INPUT, TEXT = "output", "input", "text"
CONVERSATIONS = ("messages", "conversations")
RECORDS_AT_ONCE = 256  # that are tokenised together
Layout = Literal["instructions", "conversations", "text"]
# A text to train on, and prefixes of it where the loss begins and ends to count, in turn; it counts to the end after an
# odd number of them.
Marked = tuple[str, Sequence[str]]


@dataclass(frozen=True)
class Example:
    """Sequence to train on.

    Attributes:
        ids: tokens [n], int64.
        labels: the same, IGNORED where the loss does not count the token.
    """

    ids: Tensor
    labels: Tensor

    @property
    def counted(self) -> int:
        """Number of tokens that the loss counts: the first has nothing before it that could predict it."""
        return int((self.labels[1:] != IGNORED).sum())


@dataclass(frozen=True)
class Examples:
    """Sequences to train on, and what they are in words.

    Attributes:
        layout: what they were made of.
        dropped: records of which the cutoff has left nothing that the loss counts. cut: those that were longer than it.
    """

    where: str
    layout: Layout
    found: Sequence[Example]
    cut: int = 0
    dropped: int = 0

    def describe(self) -> str:
        """Say how many there are, and how many of their tokens the loss counts."""
        tokens, counted = sum(len(each.ids) for each in self.found), sum(each.counted for each in self.found)
        parts = [f"{len(self.found):,} sequences of {self.layout}, {tokens:,} tokens, {counted:,} of them in the loss"]
        if self.cut:
            parts.append(f"{self.cut:,} were longer and are cut off")
        if self.dropped:
            parts.append(f"{self.dropped:,} have no answer before the cutoff and are left out")
        return "; ".join(parts)


def open_examples(
    model: Path,
    source: str | Path,
    *,
    field: str | None = None,
    cutoff: int = 256,
    bos: str = "auto",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Examples:
    """Read all sequences of a data set for the tokenizer of a model directory.

    Args:
        source: as a calibration text. field: of a text or of messages, where records have several.
        cutoff: tokens of a sequence at the most; plain text is cut into sequences of as many.
        bos, trust_remote_code: as of `PruneConfig`. say: told while much is read.

    Raises:
        CalibrationError: no such data, no fields that are known, or nothing in it that the loss counts.
        UsageError: `bos` beside conversations.
    """
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    begins = beginning(tokenizer, bos)
    documents = open_documents(source, None)
    layout, field = _layout_of(documents, field)
    if layout == "text":
        segments = Corpus(_texts_of(documents, field), tokenizer, begins, say).segments(cutoff, None)
        return Examples(documents.where, layout, [Example(ids, ids) for ids in segments])
    assert documents.rows is not None, "prose is text"
    if layout == "instructions":
        marked = (_instruction(record, where, tokenizer.eos_token or "") for where, record in documents.rows())
    else:
        if bos != "auto":
            raise UsageError(f"--bos {bos}: the chat template says what a conversation begins with; leave it out")
        begins = ()
        marked = (_conversation(record, field, where, tokenizer) for where, record in documents.rows())
    made = Examples(documents.where, layout, [])
    made = _gather(made, _encoded(marked, tokenizer, torch.tensor(begins, dtype=torch.int64)), cutoff)
    if not made.found:
        many = f"has {made.dropped:,} records, none of which has an answer" if made.dropped else "has no records"
        raise CalibrationError(f"{documents.where} {many} within {cutoff} tokens; give other --data, or raise --cutoff")
    return made


def _layout_of(documents: Documents, field: str | None) -> tuple[Layout, str]:
    """Tell what the records are, and the field that holds it, by the first of them."""
    first = None if documents.rows is None else next(documents.rows(), None)
    if first is None:  # prose, or nothing at all
        return "text", field or TEXT
    where, record = first
    if not isinstance(record, Mapping):
        return ("conversations" if isinstance(record, list) else "text"), field or TEXT
    if field is None and INSTRUCTION in record and OUTPUT in record:
        return "instructions", INSTRUCTION
    names = (*CONVERSATIONS, TEXT) if field is None else (field,)
    name = next((each for each in names if each in record), None)
    if name is None:
        there = ", ".join(map(str, list(record)[:MOST_FIELDS])) or "no fields"
        wanted = f"no field {field!r}" if field else f"neither {INSTRUCTION} and {OUTPUT}, nor messages, nor text"
        raise CalibrationError(f"{where} has {wanted}; it has {there}: name that of a text or of messages with --field")
    return ("conversations" if isinstance(record[name], list) else "text"), name


def _texts_of(documents: Documents, field: str) -> Documents:
    """Return the texts in the field of records; prose as it is."""
    rows = documents.rows
    if rows is None:
        return documents

    def texts() -> Iterator[str]:
        found = (text_of(record, field, where, _no_conversation(field)) for where, record in rows())
        return (text for text in found if text)

    return replace(documents, separator=BLANK_LINE, records=texts)


def _no_conversation(field: str) -> Callable[[Any], str]:
    def refuse(messages: Any) -> str:
        raise CalibrationError(f"{field!r} holds messages, where the first record has a text; use one kind")

    return refuse


def _instruction(record: Any, where: str, end: str) -> Marked:
    """Write an instruction and its answer out; the loss counts the answer and the `end` behind it."""
    fields = {name: _string(record, name, where) for name in (INSTRUCTION, OUTPUT)}
    given = _string(record, INPUT, where) if isinstance(record, Mapping) and record.get(INPUT) else ""
    template = WITH_INPUT if given else WITHOUT_INPUT
    prompt = template.format(instruction=fields[INSTRUCTION], input=given)
    return prompt + fields[OUTPUT] + end, [prompt]


def _string(record: Any, name: str, where: str) -> str:
    value = record.get(name) if isinstance(record, Mapping) else None
    if not isinstance(value, str):
        there = ", ".join(map(str, list(record)[:MOST_FIELDS])) if isinstance(record, Mapping) else "no fields"
        raise CalibrationError(
            f"{where} has no text under {name!r}; it has {there}: use the same fields in all records"
        )
    return value


def _conversation(record: Any, field: str, where: str, tokenizer: Any) -> Marked:
    """Write a conversation out by the chat template; the loss counts what the assistant answers."""
    messages = messages_of(record, field, where)
    render, prompt = chat_renderer(tokenizer), chat_renderer(tokenizer, prompt=True)
    full, marks = rendered(render, messages, where), list[str]()
    for number, message in enumerate(messages):
        if message["role"] == "assistant" and number:  # no template takes none before it
            before, until = messages[:number], messages[: number + 1]
            marks += [rendered(prompt, before, where), rendered(render, until, where)]
    if not all(full.startswith(mark) for mark in marks):
        raise CalibrationError(
            f"{where}: the chat template writes a turn otherwise when others follow, so answers cannot be told; "
            "give conversations of one answer"
        )
    return full, marks if marks else [full]


def _encoded(marked: Iterable[Marked], tokenizer: Any, begins: Tensor) -> Iterator[Example]:
    """Tokenise marked texts, many at once."""
    source = iter(marked)
    while some := list(islice(source, RECORDS_AT_ONCE)):
        texts = [repaired(each) for text, marks in some for each in (text, *marks)]
        found = iter(tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"])
        for _, marks in some:
            ids = torch.cat([begins, torch.tensor(next(found), dtype=torch.int64)])
            labels = torch.full_like(ids, IGNORED)
            # As LLM-Pruner counts them: a prefix's own tokens are as many as the text's tokens before its end.
            ends = [len(begins) + len(next(found)) for _ in marks]
            for start, stop in zip(ends[::2], [*ends[1::2], None], strict=False):
                labels[start:stop] = ids[start:stop]
            yield Example(ids, labels)


def _gather(made: Examples, examples: Iterable[Example], cutoff: int) -> Examples:
    """Cut examples off at `cutoff` tokens, and leave out those of which nothing is counted then."""
    found, cut, dropped = [], 0, 0
    for each in examples:
        cut += len(each.ids) > cutoff
        short = Example(each.ids[:cutoff].clone(), each.labels[:cutoff].clone())
        if short.counted:
            found.append(short)
        else:
            dropped += 1
    return replace(made, found=found, cut=cut, dropped=dropped)
