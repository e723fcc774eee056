"""Running the command line from a test: what it returns, what a refusal promises, and how inputs are damaged."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

COMMAND = [sys.executable, "-m", "streamprune"]
SHORT = ("--seq-len", "16", "--samples", "2")
REMEDY = r"\b(download|export|give|use|pass|choose|lower|make room|leave|copy|convert|prune|write|name)\b"
Outcome = namedtuple("Outcome", "code out err")
Streamprune = Callable[..., Outcome]


def snapshot(directory: Path) -> dict[str, Any]:
    """Everything below `directory`: kinds of entries and contents of files."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else path.is_dir()
        for path in sorted(directory.rglob("*"))
    }


LEFT: set[threading.Thread] = set()


def running_threads() -> list[str]:
    """Filling threads that run still and were not blamed on an earlier test; they own the readers."""
    left = {thread for thread in threading.enumerate() if thread.name == "streamprune-pager"} - LEFT
    LEFT.update(left)
    return [thread.name for thread in left]


def check_refusal(result: Outcome, code: int, names: tuple[str, ...], remedy: str = REMEDY) -> None:
    """One line on stderr that names the things and the remedy, the exit code, no thread left."""
    assert result.code == code, result
    assert result.out == ""
    assert result.err.endswith("\n")
    (line,) = result.err.splitlines()
    assert line.startswith("streamprune: ")
    for name in names:
        assert name in line
    assert re.search(remedy, line), f"no remedy in: {line}"
    assert not running_threads()


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Load the single-file model, let `change` damage it, and save it in place."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def parquet(file: Path, **columns: list[Any]) -> Path:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    writer.write_table(pyarrow.table(columns), file)
    return file


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def cells(out: str, row: str) -> list[str]:
    """The numbers of a row of a printed table."""
    (line,) = (line for line in out.splitlines() if line.startswith(f"{row} "))
    return [cell.replace(",", "") for cell in line.split()[1:]]
