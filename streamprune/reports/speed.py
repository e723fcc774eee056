"""Speed of an output in use: tokens per second and memory, beside the dense model's."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from streamprune.config import as_options
from streamprune.errors import StreampruneError, UsageError
from streamprune.figures import human, table
from streamprune.values import AUTO, dtype_name

SEED = 0  # of the prompt's tokens


@dataclass(frozen=True)
class Speed:
    """Speed of one model with one engine.

    Attributes:
        engine: "transformers" or "llama.cpp". computed_in: a dtype, or a GGUF file's type.
        prefill, decode: tokens per second, of each of the runs. Of two models the runs were made in turn.
        peak_rss: bytes of its process. peak_gpu: of its tensors on a GPU; None without.
    """

    engine: str
    model: str
    computed_in: str
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    peak_rss: int
    peak_gpu: int | None = None


@dataclass(frozen=True)
class Speeds:
    """Speeds that were measured together: of the output and, if it was given, of another model.

    Attributes:
        prompt, new: tokens of the prompt, and those that were generated. device: what transformers computed on.
        speeds: a pair for each engine if there are two models. notes: what was not measured, and why.
    """

    prompt: int
    new: int
    device: str
    speeds: tuple[Speed, ...]
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Table for people, and what it comes to."""
        return "\n".join([table(speed_rows(asdict(self))), *ratio_lines(asdict(self)), *self.notes])


def speed(
    directory: str | os.PathLike[str],
    against: str | os.PathLike[str] | None = None,
    *,
    prompt: int = 256,
    new: int = 32,
    runs: int = 5,
    dtype: str = AUTO,
    device: str | None = None,
    llama_cpp: bool = True,
    trust_remote_code: bool = False,
) -> Speeds:
    """Measure how fast a model reads a prompt and generates, one sequence at a time, each in a fresh process.

        print(speed("pruned", "path/to/model", runs=3).text)

    Args:
        directory: a model, pruned or not. against: another one, measured in turn with it.
        prompt: tokens that are read. new: tokens that are generated after them. runs: measurements of each.
        dtype, device, trust_remote_code: as of `PruneConfig`, for transformers.
        llama_cpp: also measure with llama.cpp, where xllamacpp is installed and the model can be exported.

    Raises:
        UsageError: a number out of range, or a prompt longer than the model's context.
        StreampruneError: no model there, or it does not load.
    """
    if prompt < 2 or new < 1 or runs < 1:
        raise UsageError("--prompt must be at least 2, --new and --runs at least 1")
    dtype, device = as_options(dtype=dtype, device=device)
    from streamprune.paging.device import compute_device, compute_dtype, is_gpu
    from streamprune.storage.checkpoint import Checkpoint, resolve_model

    models = [
        resolve_model(str(model), trust_remote_code=trust_remote_code).absolute()
        for model in (directory, against)
        if model is not None
    ]
    chosen = compute_device(device)
    with ExitStack() as opened:
        checkpoints = [opened.enter_context(Checkpoint(model)) for model in models]
        configs = [checkpoint.config for checkpoint in checkpoints]
        computed_in = compute_dtype(dtype, chosen, checkpoints[0])
        weights = sum(checkpoint.nbytes_in(computed_in) for checkpoint in checkpoints)
    name = dtype_name(computed_in)
    vocabulary = _check_context(models, configs, prompt + new)
    if not is_gpu(chosen):  # which says itself what it lacks
        _check_memory(models, weights)
    task = {"ids": _prompt(prompt, vocabulary), "new": new, "remote_code": trust_remote_code}
    found, notes = list[Speed](), list[str]()
    tasks = [task | {"engine": "transformers", "path": str(model), "dtype": name} for model in models]
    found += _in_turn([each | {"device": str(chosen)} for each in tasks], models, [name] * len(models), runs)
    if llama_cpp:
        with tempfile.TemporaryDirectory(prefix="streamprune-speed-") as scratch:
            files = _exported(models, Path(scratch), notes)
            tasks = [task | {"engine": "llama.cpp", "path": str(file)} for file, _ in files]
            found += _in_turn(tasks, models, [kind for _, kind in files], runs) if files else []
    return Speeds(prompt, new, str(chosen), tuple(found), tuple(notes))


def _check_context(models: Sequence[Path], configs: Sequence[Mapping[str, Any]], tokens: int) -> int:
    """Refuse more tokens than a model takes; return the smallest vocabulary."""
    for model, config in zip(models, configs, strict=True):
        longest = config.get("max_position_embeddings") or config.get("n_positions") or tokens
        if tokens > longest:
            raise UsageError(f"{model} takes {longest} tokens at the most: lower --prompt or --new, {tokens} together")
    return min(int(config.get("vocab_size", 256)) for config in configs)


def _check_memory(models: Sequence[Path], needed: int) -> None:
    """Refuse models that there is no memory for: all of them are loaded, since they are measured in turn."""
    from streamprune.paging.host_memory import available_memory

    if needed > (there := available_memory()):
        alone = ", or without --against" if len(models) > 1 else ""
        raise StreampruneError(
            f"{' and '.join(map(str, models))}: {human(needed)} of weights are loaded as a whole, and there are "
            f"{human(there)}; measure on a machine that has them{alone}"
        )


def _prompt(length: int, vocabulary: int) -> list[int]:
    """Draw the prompt's tokens: what they say does not matter to its time."""
    import random

    draw = random.Random(SEED)
    return [draw.randrange(vocabulary) for _ in range(length)]


def _exported(models: Sequence[Path], scratch: Path, notes: list[str]) -> list[tuple[Path, str]]:
    """Write GGUF files and their types; none of them, with a note, where one cannot be written or read."""
    if importlib.util.find_spec("xllamacpp") is None:
        notes.append("llama.cpp: not measured, xllamacpp is not installed")
        return []
    from streamprune.output.gguf import write_gguf

    files = []
    for number, model in enumerate(models):
        try:
            written = write_gguf(model, scratch / f"{number}.gguf")
        except StreampruneError as error:
            notes.append(f"llama.cpp: not measured, {error}")
            return []
        files.append((written.path, written.type))
    return files


def _in_turn(
    tasks: Sequence[Mapping[str, Any]], models: Sequence[Path], kinds: Sequence[str], runs: int
) -> list[Speed]:
    """Measure the models in turn, run by run: what else the machine does hits both."""
    with ExitStack() as processes:
        children = [processes.enter_context(_Child(task, model)) for task, model in zip(tasks, models, strict=True)]
        rounds = [[child.measure() for child in children] for _ in range(runs)]
    return [
        Speed(
            str(task["engine"]),
            str(model),
            kind,
            tuple(each["prefill"] for each in measured),
            tuple(each["decode"] for each in measured),
            max(int(each["peak_rss"]) for each in measured),
            max((int(each["peak_gpu"]) for each in measured if "peak_gpu" in each), default=None),
        )
        for task, model, kind, measured in zip(tasks, models, kinds, zip(*rounds, strict=True), strict=True)
    ]


class _Child:
    """Process with a loaded model that measures when it is asked to."""

    def __init__(self, task: Mapping[str, Any], model: Path) -> None:
        self._model, self._engine, self._task = model, task["engine"], task
        self._said = tempfile.TemporaryFile("w+", prefix="streamprune-speed-", errors="replace")  # noqa: SIM115
        # -P: a file of the current directory must not stand for a module.
        command = [sys.executable, "-P", "-m", "streamprune.reports._speed_child"]
        self._process = subprocess.Popen(
            command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said
        )

    def __enter__(self) -> _Child:
        try:
            self._tell(json.dumps(self._task))
            self._answer()
        except BaseException:  # Ctrl-C while it loads, too
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._said.close()

    def measure(self) -> dict[str, float]:
        """Return one measurement."""
        self._tell("")
        return self._answer()

    def _tell(self, line: str) -> None:
        with suppress(BrokenPipeError):  # it has failed; `_answer` says how
            assert self._process.stdin is not None, "it is a pipe"
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None, "it is a pipe"
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            if status == -signal.SIGKILL:
                where = f"{self._model} could not be measured with {self._engine}"
                raise StreampruneError(f"{where}: its process was killed, probably for memory; free some")
            last = (self._said.read().strip().splitlines() or ["no message"])[-1]
            raise StreampruneError(
                f"{self._model} cannot be measured with {self._engine}: {last}; streamprune verify says if it loads"
            )
        return json.loads(line)


def speed_rows(measured: Mapping[str, Any]) -> list[list[str]]:
    """Make table rows of what `Speeds` holds as a mapping: medians, with the least and the most behind them."""
    rows = [["engine", "model", "in", "prefill tokens/s", "decode tokens/s", "memory"]]
    for each in measured["speeds"]:
        gpu = "" if each["peak_gpu"] is None else f" (GPU {human(each['peak_gpu'])})"
        rates = [_spread(each[name]) for name in ("prefill", "decode")]
        name = _name(each["model"])
        rows.append([each["engine"], name, each["computed_in"], *rates, f"{human(each['peak_rss'])}{gpu}"])
    return rows


def ratio_lines(measured: Mapping[str, Any]) -> list[str]:
    """Say how much faster the first model is than the second: the median of the ratios of runs side by side."""
    lines, speeds = [], measured["speeds"]
    for one, other in _pairs(speeds):
        ratios = {name: [a / b for a, b in zip(one[name], other[name], strict=True)] for name in ("prefill", "decode")}
        said = ", ".join(f"{name} × {_spread(each, '.2f')}" for name, each in ratios.items())
        lines.append(f"{one['engine']}: {_name(one['model'])} beside {_name(other['model'])}: {said}")
    return lines


def _name(model: str) -> str:
    """Return a model's name: of a hub's snapshot, models--owner--name/snapshots/commit, that of the model."""
    parts = Path(model).parts
    return parts[-3].rpartition("--")[2] if "snapshots" in parts[-2:-1] else parts[-1]


def _pairs(speeds: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    for first, second in pairwise(speeds):
        if first["engine"] == second["engine"]:
            yield first, second


def _spread(values: Sequence[float], form: str = ",.1f") -> str:
    """Write a median, and between what the values lie."""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"
