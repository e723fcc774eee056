"""Text to token batches: files, hub data sets, and the prose that comes with the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from streamprune.errors import CalibrationError, CheckpointError

# Characters tokenised at once: a whole book in one call makes some tokenizers quadratic.
BLOCK_CHARACTERS = 1 << 20


def embedded_text(name: str) -> str:
    """Prose in the package: "calibration" (about 4,000 words) or "heldout" (about 2,400 others)."""
    return resources.files("streamprune").joinpath("data", f"{name}.txt").read_text(encoding="utf-8")


def read_text(source: str | Path, field: str = "text") -> str:
    """The text of a .txt, .jsonl or .parquet file, or of a hub data set "name" or "name:split".

    Records of jsonl, parquet and data sets are joined by blank lines.

    Raises:
        CalibrationError: no such file, no such field, or the optional package that reads it is absent.
    """
    path = Path(source)
    if path.is_dir():
        raise CalibrationError(f"{path} is a directory; give a .txt, .jsonl or .parquet file")
    if not path.is_file():
        if path.suffix in (".txt", ".jsonl", ".json", ".parquet") or str(source).startswith((".", "/")):
            raise CalibrationError(f"{path} does not exist; give a text file, or leave --calibration out")
        return "\n\n".join(_dataset_records(str(source), field))
    if path.suffix == ".jsonl":
        return "\n\n".join(_jsonl_records(path, field))
    if path.suffix == ".parquet":
        return "\n\n".join(_parquet_records(path, field))
    return _read_file(path)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} is not readable UTF-8 text ({error}); convert it") from error


def _texts(values: Iterable[Any], field: str, where: object) -> list[str]:
    """The texts of a column without its empty rows; refuses a column of anything else."""
    texts = [value for value in values if value]
    if not all(isinstance(value, str) for value in texts):
        raise CalibrationError(f"{where}: the column {field!r} holds no text; name the column of the text with --field")
    return texts


def _jsonl_records(path: Path, field: str) -> Iterator[str]:
    # Not splitlines: it also splits at U+2028, which JSON allows inside strings.
    for number, line in enumerate(_read_file(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise CalibrationError(f"{path}:{number} is not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            raise CalibrationError(f"{path}:{number} has no text under {field!r}; name the field with --field")
        yield record[field]


def _parquet_records(path: Path, field: str) -> list[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise CalibrationError(f"{path}: reading parquet needs pyarrow; pip install 'streamprune[parquet]'") from None
    try:
        columns = pyarrow.parquet.read_schema(path).names
        if field not in columns:
            raise CalibrationError(f"{path} has the columns {', '.join(columns)}; name one with --field")
        return _texts(pyarrow.parquet.read_table(path, columns=[field])[field].to_pylist(), field, path)
    except pyarrow.ArrowException as error:
        raise CalibrationError(f"{path} is not a readable parquet file ({error})") from error


def _dataset_records(name: str, field: str) -> list[str]:
    try:
        import datasets
    except ImportError:
        raise CalibrationError(
            f"{name} is no file; to read it as a hub data set, pip install 'streamprune[datasets]'"
        ) from None
    name, _, split = name.partition(":")
    try:
        data = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the hub client raises many kinds
        raise CalibrationError(f"data set {name} cannot be loaded: {' '.join(str(error).split())}") from error
    if field not in data.column_names:
        raise CalibrationError(f"data set {name} has the columns {', '.join(data.column_names)}; name one with --field")
    return _texts(data[field], field, f"data set {name}")


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model directory."""
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises many kinds for missing or damaged files
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} has no usable tokenizer ({reason}); copy the tokenizer files there") from error


def tokenize(tokenizer: Any, text: str) -> Tensor:
    """Token ids [tokens] of a text without special tokens, int64."""
    ids: list[int] = []
    for block in _blocks(text):
        ids.extend(tokenizer(block, add_special_tokens=False, verbose=False)["input_ids"])
    return torch.tensor(ids, dtype=torch.int64)


def _blocks(text: str) -> Iterator[str]:
    """The text in pieces of about BLOCK_CHARACTERS that end with a paragraph where there is one."""
    start = 0
    while start < len(text):
        stop = start + BLOCK_CHARACTERS
        if stop < len(text):
            paragraph = text.rfind("\n", start, stop)
            stop = paragraph + 1 if paragraph > start else stop
        yield text[start:stop]
        start = stop


def sample_sequences(tokens: Tensor, samples: int, seq_len: int, sampling: str, seed: int) -> Tensor:
    """Calibration ids [samples, seq_len] from the tokens of a text.

    Args:
        sampling: "random" draws windows at seeded positions; "first" takes consecutive ones from the start.

    Raises:
        CalibrationError: fewer than samples × seq_len tokens.
    """
    needed = samples * seq_len
    if len(tokens) < needed:
        raise CalibrationError(
            f"the text has {len(tokens):,} tokens, {samples} samples of {seq_len} need {needed:,}; "
            "give a longer --calibration, or lower --samples or --seq-len"
        )
    if sampling == "first":
        return tokens[:needed].view(samples, seq_len)
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - seq_len + 1, (samples,), generator=generator)
    return torch.stack([tokens[start : start + seq_len] for start in starts.tolist()])
