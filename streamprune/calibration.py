"""What tokenizers make of texts: their tokens, what begins them, and conversations by their template."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from streamprune.errors import CalibrationError, CheckpointError, UsageError
from streamprune.records import Messages

# Characters tokenised at once: a whole book in one call makes some tokenizers quadratic, and takes 300 bytes each.
BLOCK_CHARACTERS = 1 << 17
# A line that a block may end with: what follows it is no more of the same white space, which makes one token.
LINE_END = re.compile(r"\n(?= ?\S)")
PROBE = "a"  # a text that shows what a tokenizer adds


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for missing or damaged files
        reason = " ".join(str(error).split())[:200]
        code = "pass --trust-remote-code to run its code, or " if "trust_remote_code" in reason else ""
        raise CheckpointError(
            f"{path} has no usable tokenizer ({reason}); {code}copy the tokenizer files there"
        ) from error


def beginning(tokenizer: Any, bos: str) -> tuple[int, ...]:
    """The tokens that begin every sequence.

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
    plain = tokenizer(PROBE, add_special_tokens=False)["input_ids"]
    encoded = tokenizer(PROBE)["input_ids"]
    starts = (n for n in range(len(encoded) - len(plain) + 1) if encoded[n : n + len(plain)] == plain)
    before = encoded[: next(starts, 0)]
    # Only what is no text: some tokenizers mark a beginning in the first word itself.
    return tuple(before) if set(before) <= set(tokenizer.all_special_ids) else ()


def chat_renderer(tokenizer: Any) -> Callable[[Messages], str]:
    """The text of a conversation by the tokenizer's chat template."""

    def render(messages: Messages) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception as error:  # the template's own, and those of the engine that runs it
            reason = " ".join(str(error).split())[:200]
            raise CalibrationError(
                f"the chat template cannot take a conversation ({reason}); name a field of plain text with --field"
            ) from error

    return render


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids [tokens] of a text without special tokens, int64."""
    return torch.cat([torch.empty(0, dtype=torch.int64), *token_blocks(tokenizer, [text])])


def token_blocks(tokenizer: Any, pieces: Iterable[str]) -> Iterator[Tensor]:
    """Token ids of a text that comes in pieces, a block of it at a time."""
    for block in _blocks(pieces):
        ids = tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"]
        yield torch.tensor(ids, dtype=torch.int64)


def _blocks(pieces: Iterable[str]) -> Iterator[str]:
    """The text in blocks of about BLOCK_CHARACTERS that have the tokens of the whole, where they end with a line."""
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
    """After a line where its end makes a token of its own, else after any line, else before a word."""
    line = text.rfind("\n", start, stop)
    while line > start:
        if LINE_END.match(text, line):
            return line + 1
        line = text.rfind("\n", start, line)
    line, word = text.rfind("\n", start, stop), text.rfind(" ", start, stop)
    if line > start:
        return line + 1
    return word if word > start else stop
