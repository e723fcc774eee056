"""Vocabulary of a tokenizer.json as GGUF files have it, for llama.cpp's own tokenizers."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from streamprune.errors import UsageError

BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a text is split before its pieces are merged -> llama.cpp's name for it (its `tokenizer.ggml.pre`). Other ways of
# splitting have names too, but none that can be told from tokenizer.json alone.
PRE_TOKENIZERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _REST, "ByteLevel"): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _REST, "ByteLevel"): "qwen2",
}


class TokenKind(IntEnum):
    """Kinds of token, by GGUF's numbers."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and how a text becomes them.

    Attributes:
        model: "gpt2", merges of bytes, or "llama", SentencePiece's merges by score.
        pre: how a text is split before that, by llama.cpp's name.
        scores: of tokens; None with "gpt2", which has the merges themselves.
        space_prefix: whether a space is put before a text.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[TokenKind]
    scores: list[float] | None = None
    space_prefix: bool | None = None

    def add_to(self, writer: Any, directory: Path) -> None:
        """Add it to a `gguf.GGUFWriter`, with special tokens and the chat template of a model's directory."""
        from gguf import SpecialVocab

        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types([int(kind) for kind in self.kinds])
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        special = SpecialVocab(directory, load_merges=self.model == "gpt2", n_vocab=len(self.tokens))
        template = directory / "chat_template.jinja"
        if special.chat_template is None and template.is_file():
            special.chat_template = template.read_text(encoding="utf-8")
        special.add_to_gguf(writer, quiet=True)


def read_vocabulary(directory: Path, size: int, pre: str | None = None) -> Vocabulary:
    """Read the vocabulary of a model's directory, padded with unused tokens to the `size` of its embeddings.

    Args:
        pre: llama.cpp's name of how a text is split first, where it cannot be told.

    Raises:
        UsageError: no tokenizer.json, or one that llama.cpp has no tokenizer for.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UsageError(f"{directory} has no tokenizer.json, which a GGUF file's vocabulary is made of; add it")
    stored = json.loads(file.read_text(encoding="utf-8"))
    model = stored["model"]
    if model["type"] != "BPE":
        raise UsageError(f"{file}: a tokenizer of type {model['type']}; llama.cpp's are made of BPE only here")
    if not model["merges"]:
        raise UsageError(f"{file}: its tokenizer merges nothing; llama.cpp has none such")
    known: dict[str, int] = model["vocab"]
    tokens = [f"[PAD{number}]" for number in range(max(size, len(known)))]
    kinds = [TokenKind.UNUSED] * len(tokens)
    by_bytes = bool(model.get("byte_fallback"))
    for token, number in known.items():
        is_byte, is_unknown = by_bytes and BYTE_TOKEN.fullmatch(token), token == model.get("unk_token")
        tokens[number] = token
        kinds[number] = TokenKind.BYTE if is_byte else TokenKind.UNKNOWN if is_unknown else TokenKind.NORMAL
    for added in stored.get("added_tokens") or ():
        number = added["id"]
        if number >= size:
            raise UsageError(f"{file}: token {added['content']!r} is number {number} of {size} embeddings; mend one")
        tokens[number] = added["content"]
        if kinds[number] is not TokenKind.UNKNOWN:
            kinds[number] = TokenKind.CONTROL if added.get("special") else TokenKind.USER_DEFINED
    if not by_bytes:
        return Vocabulary("gpt2", pre or _pre_tokenizer(file, stored), tokens[:size], kinds[:size])
    scores = _scores(model["merges"], tokens)
    return Vocabulary("llama", pre or "default", tokens[:size], kinds[:size], scores[:size], _puts_a_space(stored))


def _pre_tokenizer(file: Path, stored: dict[str, Any]) -> str:
    """Name the way in which a text is split."""
    parts = stored.get("pre_tokenizer") or {}
    steps = parts.get("pretokenizers", [parts])
    names = tuple(step["pattern"].get("Regex") if step.get("type") == "Split" else step.get("type") for step in steps)
    if names not in PRE_TOKENIZERS:
        raise UsageError(
            f"{file}: splits texts in a way whose name for llama.cpp is not known here; give it with --pre, as "
            "convert_hf_to_gguf.py of llama.cpp names it"
        )
    return PRE_TOKENIZERS[names]


def _scores(merges: list[Any], tokens: list[str]) -> list[float]:
    """Return scores by which SentencePiece merges in the order of `merges`: the sooner, the higher."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(merges):
        rank.setdefault("".join(pair if isinstance(pair, list) else pair.split(" ")), number)
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _puts_a_space(stored: dict[str, Any]) -> bool:
    """Tell whether a space is put before a text, by the normalizer or the pre-tokenizer."""
    said = [stored.get(part) or {} for part in ("normalizer", "pre_tokenizer")]
    steps = [step for part in said for step in part.get("normalizers", part.get("pretokenizers", [part]))]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )
