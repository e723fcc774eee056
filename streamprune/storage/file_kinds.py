"""Recognition of what stands where weights or JSON should be: a pointer, a web page, part of a download, an adapter, a
pickle.

A file is told by its first bytes and by the files beside it; nothing is opened that could run code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from streamprune.errors import CheckpointError

FIRST_BYTES = 512
SHORT_TEXT_BYTES = 4096  # a server's error message is no longer
PARTIAL_SUFFIXES = (".incomplete", ".part", ".partial", ".crdownload", ".download", ".aria2")
HUB_PARTIALS = ".cache/huggingface/download"  # where the hub's client keeps them, inside a directory it fills
POINTER = b"version https://git-lfs"
PAGES = (b"<!doctype", b"<html", b"<?xml")
# Files that a tokenizer is made of; a repository's clone may leave them as pointers.
OF_TOKENIZERS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "tekken", "chat_template", "spiece")


def mistaken(file: Path) -> str | None:
    """Say what a file is instead of weights or JSON, and the remedy; None if it cannot be told.

    The words go on from the file's name: "FILE is a web page, ...".
    """
    with file.open("rb") as stream:
        head, size = stream.read(FIRST_BYTES), file.stat().st_size
    if (placeholder := placeholder_of(head)) is not None:
        return placeholder
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "is a pickle under another name; convert it with save_pretrained(...) in transformers"
    if head.startswith(b"GGUF"):
        return "is a GGUF file, which holds quantised weights as a rule; use the safetensors that it was made from"
    if len(head) >= 8 and not any(head):
        return "begins with zeros alone, its download was not finished; download it again"
    if (partial := unfinished(file)) is not None:
        return f"is part of an unfinished download ({partial.name} lies beside it); download it again"
    text = " ".join(head.decode("latin-1").split())
    if text and size <= SHORT_TEXT_BYTES and head.isascii() and text.isprintable() and not text.startswith(("{", "[")):
        return f"holds the text {text[:80]!r}; download it again"
    return None


def placeholder_of(head: bytes) -> str | None:
    """Say that a file with these first bytes is a Git LFS pointer or a web page, as `mistaken` does; else None."""
    if head.startswith(POINTER):
        return "is a Git LFS pointer, not the file itself; download it with git lfs pull"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(PAGES):
        return "is a web page, not the file itself; download it again, logged in where the model asks for that"
    return None


def unfinished(file: Path) -> Path | None:
    """Find the file in which a downloader keeps `file` until it is whole, beside it or where the hub's client does."""
    beside = (file.with_name(file.name + suffix) for suffix in PARTIAL_SUFFIXES)
    return next((each for each in beside if each.is_file()), None) or _hub_partial(file.parent)


def partials(directory: Path) -> list[Path]:
    """List the parts of unfinished downloads in `directory`, sorted."""
    found = sorted(each for each in directory.iterdir() if each.name.endswith(PARTIAL_SUFFIXES) and each.is_file())
    hub = _hub_partial(directory)
    return found if hub is None else [*found, hub]


def _hub_partial(directory: Path) -> Path | None:
    return min(directory.joinpath(HUB_PARTIALS).glob("*.incomplete"), default=None)


def refuse_placeholders(directory: Path) -> None:
    """Refuse pointers and web pages in the place of a tokenizer's files.

    Raises:
        CheckpointError: the first of them.
    """
    for file in sorted(directory.iterdir()):
        if file.is_file() and (file.name.startswith(OF_TOKENIZERS) or file.name.endswith((".model", ".tiktoken"))):
            with suppress(OSError), file.open("rb") as stream:  # who needs the file says that it cannot be read
                placeholder = placeholder_of(stream.read(FIRST_BYTES))
                if placeholder is not None:
                    raise CheckpointError(f"{file} {placeholder}")


def refuse_unfinished(shards: Iterable[Path]) -> None:
    """Refuse shards that aria2 is not done with: it makes them at full size at once, and a file beside them tells.

    Raises:
        CheckpointError: the first of them.
    """
    for shard in shards:
        if shard.with_name(f"{shard.name}.aria2").is_file():
            raise CheckpointError(
                f"{shard} is an unfinished download ({shard.name}.aria2 lies beside it); download it to its end"
            )


def refuse_adapter(directory: Path) -> None:
    """Refuse an adapter that PEFT wrote, in a directory without a model of its own.

    Raises:
        CheckpointError: with the base model, if it is named.
    """
    adapters = sorted(directory.glob("adapter_*"))
    if not adapters:
        return
    base = "its base model"
    with suppress(OSError, ValueError, AttributeError):
        fields = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        base = fields.get("base_model_name_or_path") or base
    raise CheckpointError(
        f"{directory} holds a PEFT adapter ({adapters[-1].name}) and no model; load it on {base}, call "
        "merge_and_unload() and save_pretrained(...), and give the directory that this writes"
    )


def refuse_without_weights(directory: Path, single: str, index: str) -> NoReturn:
    """Refuse a directory that has neither the file `single` nor `index`.

    Raises:
        CheckpointError: always; it says what the directory has instead, and the remedy for that.
    """
    refuse_adapter(directory)

    def first(*patterns: str) -> str | None:
        return min((each.name for pattern in patterns for each in directory.glob(pattern)), default=None)

    neither = f"{directory} has neither {single} nor {index}"
    if (shard := first("*-of-*.safetensors")) is not None:
        raise CheckpointError(f"{directory} has shards ({shard}) without {index}, by which they are read; download it")
    if parts := partials(directory):
        raise CheckpointError(f"{neither}, but an unfinished download ({parts[0].name}); download it to its end")
    if (pickle := first("*.bin", "*.pt", "*.pth")) is not None:
        raise CheckpointError(
            f"{directory} holds pickled weights only ({pickle}), which can run code when opened; "
            "convert it with save_pretrained(...) in transformers, which writes safetensors"
        )
    if (gguf := first("*.gguf")) is not None:
        raise CheckpointError(
            f"{directory} holds GGUF weights only ({gguf}), which are quantised as a rule; use the safetensors that "
            "they were made from"
        )
    if (other := first("*.safetensors")) is not None:
        raise CheckpointError(
            f"{neither}, but {other}, which transformers does not read; if it holds the model as transformers has it, "
            f"name it {single}, else download the transformers checkpoint"
        )
    raise CheckpointError(
        f"{neither}; download the weights, or where they are published as pickles only, convert them with "
        "save_pretrained(...) in transformers"
    )
