"""Vocabulary of a tokenizer.json as GGUF files have it, for llama.cpp's own tokenizers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from streamprune.errors import UsageError
from streamprune.storage.checkpoint import read_json
from streamprune.texts.tokenizer import load_tokenizer

SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a text is split before its pieces are merged -> llama.cpp's name for it (its `tokenizer.ggml.pre`). Other ways of
# splitting have names too, but none that can be told from tokenizer.json alone.
_Step = dict[str, Any]
_BYTES: _Step = {"type": "ByteLevel", "add_prefix_space": False}


def _split(digits: str) -> list[_Step]:
    regex = {"Regex": _CONTRACTIONS + digits + _REST}
    return [
        {"type": "Split", "pattern": regex, "behavior": "Isolated", "invert": False},
        _BYTES | {"use_regex": False},
    ]


PRE_TOKENIZERS: tuple[tuple[list[_Step], str], ...] = (
    ([_BYTES | {"use_regex": True}], "gpt-2"),
    ([{"type": "Digits", "individual_digits": True}, _BYTES | {"use_regex": True}], "smollm"),
    (_split(r"\p{N}{1,3}"), "llama-bpe"),
    (_split(r"\p{N}"), "qwen2"),
)


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
        merges: pairs that are merged, the first ones first. scores: of tokens. Either model has one of the two.
        space_prefix: whether a space is put before a text.
        special: ids of tokens by what they are for: "bos", "eos", "unk", "sep", "pad" and "mask".
        added: those of "bos" and "eos" that are put around a text.
        template: the chat template, or several, by their names.
    """

    model: str
    pre: str
    tokens: list[str]
    kinds: list[TokenKind]
    merges: list[str] | None
    scores: list[float] | None
    space_prefix: bool | None
    special: dict[str, int]
    added: tuple[str, ...]
    template: str | tuple[tuple[str, str], ...] | None

    def add_to(self, writer: Any) -> None:
        """Add it to a `gguf.GGUFWriter`."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types([int(kind) for kind in self.kinds])
        if self.merges is not None:
            writer.add_token_merges(self.merges)
        if self.scores is not None:
            writer.add_token_scores(self.scores)
        if self.space_prefix is not None:
            writer.add_add_space_prefix(self.space_prefix)
        for name, number in self.special.items():
            getattr(writer, f"add_{name}_token_id")(number)
        # Said outright: left out, some of llama.cpp's tokenizers put BOS before a text.
        writer.add_add_bos_token("bos" in self.added)
        writer.add_add_eos_token("eos" in self.added)
        if isinstance(self.template, str):
            writer.add_chat_template(self.template)
        elif self.template:
            writer.add_chat_template([{"name": name, "template": each} for name, each in self.template])


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
    stored = read_json(file)
    model = stored.get("model") or {}
    if model.get("type", "BPE") != "BPE":
        raise UsageError(f"{file}: a tokenizer of type {model['type']}; llama.cpp's are made of BPE only here")
    if not model.get("merges"):
        raise UsageError(f"{file}: its tokenizer merges nothing; llama.cpp has none such")
    by_bytes = bool(model.get("byte_fallback"))
    pre = pre or ("default" if by_bytes else _pre_tokenizer(file, stored))
    tokens, kinds = _tokens(file, stored, size, by_bytes)
    pairs = [pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"]]
    # Spaces stand between the two, and in them as bytes do.
    merges = None if by_bytes else [" ".join(part.replace(" ", "Ġ") for part in pair) for pair in pairs]
    tokenizer = load_tokenizer(directory)
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in SPECIAL}
    given, bare = (tokenizer("a", add_special_tokens=each)["input_ids"] for each in (True, False))
    around = {"bos": given[:1] != bare[:1] and given[0], "eos": given[-1:] != bare[-1:] and given[-1]}
    template = tokenizer.chat_template
    return Vocabulary(
        model="llama" if by_bytes else "gpt2",
        pre=pre,
        tokens=tokens,
        kinds=kinds,
        merges=merges,
        scores=_scores(pairs, tokens) if by_bytes else None,
        space_prefix=_puts_a_space(stored) if by_bytes else None,
        special={name: number for name, number in special.items() if number is not None and 0 <= number < size},
        added=tuple(name for name, number in around.items() if number is not False and number == special[name]),
        template=template if isinstance(template, str | None) else tuple(template.items()),
    )


def _tokens(file: Path, stored: dict[str, Any], size: int, by_bytes: bool) -> tuple[list[str], list[TokenKind]]:
    """List tokens and their kinds by id."""
    tokens, kinds = [f"[PAD{number}]" for number in range(size)], [TokenKind.UNUSED] * size

    def put(token: str, number: int, kind: TokenKind) -> None:
        if not 0 <= number < size:
            raise UsageError(f"{file}: token {token!r} is number {number} of {size} embeddings; mend one of the two")
        tokens[number], kinds[number] = token, kind

    for token, number in stored["model"]["vocab"].items():
        is_byte, is_unknown = by_bytes and BYTE_TOKEN.fullmatch(token), token == stored["model"].get("unk_token")
        put(token, number, TokenKind.BYTE if is_byte else TokenKind.UNKNOWN if is_unknown else TokenKind.NORMAL)
    for added in stored.get("added_tokens") or ():
        kind = TokenKind.CONTROL if added.get("special") else TokenKind.USER_DEFINED
        known = 0 <= added["id"] < size and kinds[added["id"]] is TokenKind.UNKNOWN
        put(added["content"], added["id"], TokenKind.UNKNOWN if known else kind)
    return tokens, kinds


def _pre_tokenizer(file: Path, stored: dict[str, Any]) -> str:
    """Name the way in which a text is split."""
    parts = stored.get("pre_tokenizer") or {}
    steps = parts.get("pretokenizers", [parts])
    plain = (stored.get("normalizer") or {}).get("type") in (None, "NFC")
    for wanted, name in PRE_TOKENIZERS:
        same = len(steps) == len(wanted) and all(map(_holds, steps, wanted))
        if plain and same:
            return name
    raise UsageError(
        f"{file}: splits texts in a way whose name for llama.cpp is not known here; give it with --pre, as "
        "convert_hf_to_gguf.py of llama.cpp names it"
    )


def _holds(step: _Step, wanted: _Step) -> bool:
    """Tell whether a step has all that is wanted of it."""
    return all(step.get(key) == value for key, value in wanted.items())


def _scores(pairs: list[list[str]], tokens: list[str]) -> list[float]:
    """Return scores by which SentencePiece merges in the order of `pairs`: the sooner, the higher."""
    rank: dict[str, int] = {}
    for number, pair in enumerate(pairs):
        rank.setdefault("".join(pair), number)
    return [-float(rank.get(token, len(rank))) for token in tokens]


def _puts_a_space(stored: dict[str, Any]) -> bool:
    """Tell whether a space is put before a text, by the normalizer or the pre-tokenizer."""
    said = [stored.get(part) or {} for part in ("normalizer", "pre_tokenizer")]
    steps = [step for part in said for step in part.get("normalizers", part.get("pretokenizers", [part]))]
    return any(
        step.get("type") == "Prepend"
        or (
            step.get("type") == "Metaspace"
            and step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never") != "never"
        )
        for step in steps
    )
