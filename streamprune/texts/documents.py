"""Texts as records, from their start or from random places, wherever they come from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import resources
from typing import Any

from streamprune.errors import CalibrationError
from streamprune.texts.records import Messages

Beginning = tuple[
    float, Iterator[str]
]  # the part of the first record that lies before, and the records from that one on
BLANK_LINE = "\n\n"
WORD = 64  # characters within which a place moves to the end or the beginning of a word


@dataclass(frozen=True)
class Documents:
    """Text as records.

    Attributes:
        where: its name, for messages.
        separator: what stands between two records of the text that they are joined to.
        records: all of them, from the start.
        places: endless random places, any character of the text as likely as any other; None where only a pass through
            the whole text would find one.
        shuffled: the records in random order, of a source without an end in reach.
        prose: whether there is no telling one record from the next.
        nbytes: bytes of the text at the most, where they are known. stored: bytes of its files, compressed or not.
        rows: (where it stands, record) for all records as they are, with all their fields; None of prose.
    """

    where: str
    separator: str
    records: Callable[[], Iterator[str]]
    places: Callable[[random.Random], Iterator[Beginning]] | None = None
    shuffled: Callable[[random.Random], Iterator[str]] | None = None
    prose: bool = False
    nbytes: int | None = None
    stored: int | None = None
    rows: Callable[[], Iterator[tuple[str, Any]]] | None = None


def embedded_text(name: str) -> str:
    """Read prose of the package: "calibration" (about 4,000 words) or "heldout" (about 2,400 others)."""
    return resources.files("streamprune").joinpath("data", f"{name}.txt").read_text(encoding="utf-8")


def embedded(name: str) -> Documents:
    """Return prose of the package, "calibration" or "heldout", as documents."""
    return Documents(f"the embedded {name} text", "", lambda: iter([embedded_text(name)]), prose=True)


def no_messages(messages: Messages) -> str:
    """Refuse conversations: takes the place of a chat template where there is no tokenizer."""
    raise CalibrationError("conversations need a tokenizer with a chat template; give texts")


def from_word(text: str) -> str:
    """Cut off what precedes the first word that begins in a text, if one begins near; "" if none begins at all."""
    gap = next((n for n, letter in enumerate(text[:WORD]) if letter.isspace()), None)
    if gap is None:
        return "" if len(text) < WORD else text
    return text[gap:].lstrip()


def whole_words(text: str, most: int) -> str:
    """Cut a text off between two words where it is longer than `most` characters."""
    if len(text) <= most:
        return text
    gap = next((n for n in range(most, max(0, most - WORD), -1) if text[n].isspace()), most)
    return text[:gap]
