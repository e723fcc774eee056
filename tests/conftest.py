"""What the tests of all rooms share: a tiny model, the command line, runs that are killed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS is not deterministic
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton's first import: its kernels then run on CPU tensors

from streamprune.cli import main

pytest.register_assert_rewrite("cli_runner", "plain_methods")
from cli_runner import REMEDY, SHORT, Outcome, Streamprune, check_refusal, snapshot  # noqa: E402
from killed_runs import killing  # noqa: E402, F401
from tiny_models import save_tiny  # noqa: E402


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved float32 Llama of 8 layers with its tokenizer, read-only."""
    path = tmp_path_factory.mktemp("models") / "llama"
    save_tiny(path, "llama", dtype=torch.float32, num_hidden_layers=8)
    return path


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Take Ctrl-C, which a shell lets its background jobs, and all that they start, ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# The command line.


@pytest.fixture
def streamprune(capsys: pytest.CaptureFixture[str]) -> Streamprune:
    """Runs the command in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        return Outcome(stopped.value.code, *capsys.readouterr())

    return run


@pytest.fixture
def model(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A free name in a directory of its own."""
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "pruned"


@pytest.fixture
def refused(streamprune: Streamprune, tmp_path: Path, output: Path) -> Callable[..., str]:
    """Runs a prune that must be refused, checks all that every refusal promises, and returns the message."""

    def run(model: object, *arguments: object, code: int, names: tuple[str, ...], remedy: str = REMEDY) -> str:
        before = snapshot(tmp_path)
        result = streamprune("--model", model, "--output", output, "--quiet", *SHORT, *arguments)
        assert snapshot(tmp_path) == before, "something was written or removed"
        check_refusal(result, code, names, remedy)
        return result.err

    return run


@pytest.fixture
def earlier(streamprune: Streamprune, model: Path, output: Path) -> Path:
    """An output that an earlier run left, with a file that no run writes."""
    done = streamprune("--model", model, "--output", output, "--method", "random", "--no-evaluate", "--quiet")
    assert done.code == 0
    (output / "notes.txt").write_text("mine")
    return output
