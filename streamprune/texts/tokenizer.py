"""Tokenizers: the tokens of texts, the marks that begin them, and conversations by their chat template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from streamprune.errors import CalibrationError, CheckpointError, UsageError
from streamprune.texts.records import Messages

# Characters tokenised at once: a whole book in one call makes some tokenizers quadratic, and takes 300 bytes each.
BLOCK_CHARACTERS = 1 << 17
# A line that a block may end with: its end is no part of more white space, of which tokenizers make one token.
LINE_END = re.compile(r"\n(?= \S)|(?<=\S)\n(?=\S)")
BEFORE_WORD = re.compile(r"(?<=\S) (?=\S)")
ANYWHERE = re.compile("")
# Some templates write today's date, by a function: sequences would be others on another day.
DATE = "strftime_now"
SAME_DAY = "{%- macro " + DATE + "(format) -%}01 January 2025{%- endmacro %}"
PROBES = ("a", "A", "1", ".")  # texts that show what a tokenizer adds, if it has a token for them


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model directory.

    Raises:
        CheckpointError: there is none that can be used.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for missing or damaged files
        reason = " ".join(str(error).split())[:200]
        code = "pass --trust-remote-code to run its code, or " if "trust_remote_code" in reason else ""
        raise CheckpointError(
            f"{path} has no usable tokenizer ({reason}); {code}copy the tokenizer files there"
        ) from error


def beginning(tokenizer: Any, bos: str) -> tuple[int, ...]:
    """Return the tokens that begin every sequence.

    Args:
        bos: "auto" for what encoding a text puts before it, "always" for BOS, "never" for none.

    Raises:
        UsageError: "always" with a tokenizer that has no BOS.
    """
    if bos == "never":
        return ()
    if bos == "always":
        if tokenizer.bos_token_id is None:
            raise UsageError(f"--bos always: {type(tokenizer).__name__} has no BOS token; leave it out")
        return (int(tokenizer.bos_token_id),)
    probe = next((each for each in PROBES if tokenizer(each, add_special_tokens=False)["input_ids"]), PROBES[0])
    plain, encoded = tokenizer(probe, add_special_tokens=False)["input_ids"], tokenizer(probe)["input_ids"]
    starts = (n for n in range(len(encoded) - len(plain) + 1) if encoded[n : n + len(plain)] == plain)
    before = encoded[: next(starts, 0)]
    # Only what is no text: some tokenizers mark a beginning in the first word itself.
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return tuple(before) if set(before) <= special | set(tokenizer.all_special_ids) else ()


def chat_renderer(tokenizer: Any, *, prompt: bool = False) -> Callable[[Messages], str]:
    """Make a function that gives the text of a conversation by the tokenizer's chat template.

    `prompt`: followed by what begins the assistant's next turn.
    """

    def render(messages: Messages) -> str:
        try:
            template = tokenizer.get_chat_template()
            if DATE in template:
                template = SAME_DAY + template
            return tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, chat_template=template
            )
        except Exception as error:  # the template's own, and those of the engine that runs it
            reason = " ".join(str(error).split())[:200]
            raise CalibrationError(
                f"the chat template cannot take it ({reason}); mend it, or name a field of plain text with --field"
            ) from error

    return render


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Return the token ids [tokens] of a text without special tokens, int64."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *token_blocks(tokenizer, [text])])


def token_blocks(tokenizer: Any, pieces: Iterable[str]) -> Iterator[Tensor]:
    """Yield the token ids of a text that comes in pieces, a block of it at a time: together those of the whole text."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    before = ""
    for block in _blocks(pieces):
        # Some tokenizers put something before a text, which in the middle of one is not there.
        known, ids = encode(before) if before else [], encode(before + block)
        ids = ids[len(known) :] if ids[: len(known)] == known else encode(block)
        before = block[-1]
        yield torch.tensor(ids, dtype=torch.int64)


def _blocks(pieces: Iterable[str]) -> Iterator[str]:
    """Cut a text into blocks of about BLOCK_CHARACTERS that keep the tokens of the whole where they end with a line."""
    rest = ""
    for piece in pieces:
        rest += piece
        start = 0
        while len(rest) - start > BLOCK_CHARACTERS + 2:
            stop = _end_of_block(rest, start, start + BLOCK_CHARACTERS)
            yield rest[start:stop]
            start = stop
        rest = rest[start:]
    if rest:
        yield rest


def _end_of_block(text: str, start: int, stop: int) -> int:
    """Find a block's end: after a line whose end is a token of its own, else before a word, else after any line."""
    for letter, allowed, after in (("\n", LINE_END, 1), (" ", BEFORE_WORD, 0), ("\n", ANYWHERE, 1)):
        at = text.rfind(letter, start + 1, stop)
        while at > start:
            if allowed.match(text, at):
                return at + after
            at = text.rfind(letter, start + 1, at)
    return stop
