"""What notebooks pass as options is taken for what it is, or refused when the config is made."""

from __future__ import annotations

import io
import json
from pathlib import Path, PurePosixPath
from typing import ClassVar

import numpy
import pytest
import torch
from tqdm import tqdm

from streamprune import PruneConfig, prune
from streamprune.errors import UsageError
from streamprune.pipeline.progress import Progress

REQUIRED = {"model": "m", "output": "o"}

TAKEN = [
    ("model", Path("a/b"), "a/b"),
    ("output", "o", Path("o")),
    ("output", PurePosixPath("o"), Path("o")),
    ("calibration", Path("a.txt"), "a.txt"),
    ("evaluate", Path("a.txt"), "a.txt"),
    ("evaluate", False, False),
    ("evaluate", True, None),
    ("evaluate", numpy.bool_(False), False),
    ("scratch", "s", Path("s")),
    ("ratio", numpy.float32(0.25), 0.25),
    ("ratio", "0.2", 0.2),
    ("ratio", torch.tensor(0.5), 0.5),
    ("ratio", 0, 0.0),
    ("min_keep", "1e-1", 0.1),
    ("samples", numpy.int64(5), 5),
    ("samples", "5", 5),
    ("samples", 5.0, 5),
    ("seed", "9223372036854775807", 2**63 - 1),
    ("seed", torch.tensor(7), 7),
    ("layers", "4:28", (4, 28)),
    ("layers", [4, 28], (4, 28)),
    ("layers", numpy.array([4, 28]), (4, 28)),
    ("layers", (numpy.int32(4), "28"), (4, 28)),
    ("host_memory", "2GiB", 2 << 30),
    ("host_memory", 1.5e9, 1_500_000_000),
    ("max_shard_size", "5GB", 5_000_000_000),
    ("max_shard_size", " 0.5 kb ", 500),
    ("dtype", torch.bfloat16, "bfloat16"),
    ("dtype", "float32", "float32"),
    ("dtype", "torch.float32", "float32"),
    ("state_dtype", torch.bfloat16, "bfloat16"),
    ("device", torch.device("cpu"), "cpu"),
    ("device", torch.device("cuda", 1), "cuda:1"),
    ("device", 0, "cuda:0"),
    ("stock", numpy.bool_(True), True),
    ("layers", range(4, 28), (4, 28)),
    ("settings", {"steps": numpy.int64(2)}, {"steps": 2}),
]


@pytest.mark.parametrize(("name", "given", "taken"), TAKEN, ids=lambda value: str(value)[:20])
def test_values_are_taken_for_what_they_are(name, given, taken):
    config = PruneConfig(**REQUIRED | {name: given})
    value = getattr(config, name)
    assert value == taken
    assert type(value) is type(taken)


REFUSED = [
    ("model", None),
    ("model", 3),
    ("model", b"bytes"),
    ("output", None),
    ("output", 3),
    ("method", None),
    ("method", 3),
    ("ratio", "a fifth"),
    ("ratio", "nan"),
    ("ratio", True),
    ("ratio", torch.tensor([0.2, 0.3])),
    ("ratio", [0.2]),
    ("samples", 2.5),
    ("samples", "2.5"),
    ("samples", float("inf")),
    ("samples", True),
    ("seed", "zero"),
    ("seed", None),
    ("layers", "4"),
    ("layers", (4,)),
    ("layers", 4),
    ("layers", "a:b"),
    ("layers", (4.5, 6)),
    ("host_memory", "much"),
    ("host_memory", "GiB"),
    ("host_memory", [1]),
    ("dtype", torch.int8),
    ("dtype", 32),
    ("dtype", numpy.float32),
    ("device", 1.5),
    ("device", True),
    ("stock", "yes"),
    ("stock", 1),
    ("stock", None),
    ("settings", [("steps", 2)]),
    ("settings", {2: "steps"}),
    ("settings", None),
    ("sampling", "last"),
    ("bos", True),
    ("evaluate", 3),
    ("evaluate", ""),
    ("calibration", ""),
    ("model", ""),
    ("output", "a\0b"),
    ("samples", "--5"),
    ("samples", 10**400),
    ("seed", "1" * 5000),
    ("granularity", "1" * 5000 + ":4"),
    ("ratio", torch.tensor(0.2, device="meta")),
    ("layers", {8, 4}),
    ("layers", {4: 5, 8: 9}),
    ("layers", range(4, 28, 2)),
    ("settings", {"steps": True}),
    ("settings", {"steps": [1]}),
]


@pytest.mark.parametrize(("name", "given"), REFUSED, ids=lambda value: str(value)[:20])
def test_values_of_another_type_are_refused_by_option_and_value(name, given):
    with pytest.raises(UsageError) as refused:
        PruneConfig(**REQUIRED | {name: given})
    message = str(refused.value)
    assert "\n" not in message
    assert f"--{name.replace('_', '-')} " in message


def test_a_run_with_such_values_ends_with_its_facts_on_disk(tiny_llama, tmp_path):
    config = PruneConfig(
        model=tiny_llama,
        output=str(tmp_path / "pruned"),
        method="moreau",
        settings={"steps": numpy.int64(2), "rho": numpy.float32(0.25)},
        ratio=numpy.float32(0.25),
        layers=numpy.array([2, 6]),
        samples=numpy.int64(2),
        seq_len=torch.tensor(16),
        device=torch.device("cpu"),
        dtype=torch.float32,
        host_memory="4GiB",
        evaluate=False,
    )
    result = prune(config)
    options = json.loads((result.output / "streamprune.json").read_text())["options"]
    assert (options["dtype"], options["device"], options["layers"]) == ("float32", "cpu", [2, 6])
    assert options["settings"]["steps"] == 2


# Progress.


class Bar(tqdm):
    """A class of bars as a notebook has one, which writes to no terminal."""

    made: ClassVar[list[Bar]] = []

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"file": io.StringIO()})
        self.most = 0
        Bar.made.append(self)

    def update(self, n=1):
        self.most += n
        return super().update(n)


@pytest.mark.parametrize("progress", [Bar, lambda: Progress(io.StringIO(), bars=Bar)], ids=["class", "progress"])
def test_a_class_of_bars_is_used_where_one_is_given(progress, tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Bar, "made", [])
    config = PruneConfig(model=tiny_llama, output=tmp_path / "pruned", method="magnitude")
    prune(config, progress=progress if progress is Bar else progress())
    names = [bar.desc.removesuffix(": ") for bar in Bar.made]
    assert names == ["perplexity before", "scoring magnitude", "writing", "perplexity after"]
    assert all(bar.most == bar.total for bar in Bar.made)


def test_true_says_lines_and_none_says_nothing(tiny_llama, tmp_path, capsys):
    for progress, says in ((True, True), (None, False), (False, False)):
        config = PruneConfig(model=tiny_llama, output=tmp_path / str(progress), method="random", evaluate=False)
        prune(config, progress=progress)
        assert bool(capsys.readouterr().err) == says


def test_what_is_no_progress_is_refused_before_the_run(tiny_llama, tmp_path):
    config = PruneConfig(model=tiny_llama, output=tmp_path / "pruned")
    with pytest.raises(UsageError, match=r"progress 3: give True, a class of bars such as tqdm"):
        prune(config, progress=3)
    assert not (tmp_path / "pruned").exists()
