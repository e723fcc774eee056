"""`streamprune speed`: two models in turn, each in its process; what is written of it; refusals."""

from __future__ import annotations

import json
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runner import check_refusal, snapshot
from tiny_models import merge_once

from streamprune import PruneConfig, Speeds, prune, report, speed
from streamprune.reports.recorded import record_speed
from streamprune.reports.speed import Speed
from streamprune.storage.checkpoint import Checkpoint

SMALL = ("--prompt", 8, "--new", 3, "--runs", 3)


@pytest.fixture
def pruned(tiny_llama: Path, tmp_path: Path) -> Path:
    config = PruneConfig(tiny_llama, tmp_path / "pruned", method="magnitude", layers=(2, 7), evaluate=False)
    return prune(config).output


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of models in the order in which they were measured, by children that are none."""
    order: list[str] = []

    class Child:
        def __init__(self, task: Mapping[str, Any], model: Path) -> None:
            self.task, self.name, self.count = task, model.name, 0

        def __enter__(self) -> Child:
            return self

        def __exit__(self, *exc: object) -> None:
            order.append(f"end of {self.name}")

        def measure(self) -> dict[str, float]:
            order.append(self.name)
            self.count += 1
            rate = 100.0 * self.count * (2 if self.name == "pruned" else 1)
            return {"prefill": rate, "decode": rate / 10, "peak_rss": 10**6 + self.count}

    monkeypatch.setattr("streamprune.reports.speed._Child", Child)
    return order


def test_models_are_measured_in_turn(pruned: Path, tiny_llama: Path, asked: list[str]) -> None:
    found = speed(pruned, tiny_llama, prompt=8, new=3, runs=3, llama_cpp=False)
    assert asked == ["pruned", "llama"] * 3 + ["end of llama", "end of pruned"]
    one, other = found.speeds
    assert one.prefill == (200.0, 400.0, 600.0) and other.decode == (10.0, 20.0, 30.0)
    assert one.peak_rss == 10**6 + 3 and one.peak_gpu is None
    assert "pruned beside llama: prefill × 2.00 (2.00 to 2.00)" in found.text
    assert "400.0 (200.0 to 600.0)" in found.text


def test_what_llama_cpp_cannot_take_is_said(pruned: Path, asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (pruned / "config.json").write_text(
        json.dumps(json.loads((pruned / "config.json").read_text()) | {"hidden_act": "gelu"})
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    found = speed(pruned, prompt=8, new=3, runs=1)
    assert {each.engine for each in found.speeds} == {"transformers"}
    assert found.notes[0].startswith("llama.cpp: not measured, ") and found.notes[0] in found.text
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "xllamacpp is not installed" in speed(pruned, prompt=8, new=3, runs=1).notes[0]


def test_a_fresh_process_measures_and_the_card_says_it(pruned: Path, streamprune: Any) -> None:
    card = (pruned / "README.md").read_text()
    done = streamprune("speed", pruned, *SMALL, "--no-llama-cpp", "--write")
    assert done.code == 0, done.err
    measured = json.loads((pruned / "streamprune.json").read_text())["speed"]
    (one,) = measured["speeds"]
    assert (measured["prompt"], measured["new"], one["engine"]) == (8, 3, "transformers")
    assert len(one["prefill"]) == len(one["decode"]) == 3 and min(one["prefill"] + one["decode"]) > 0
    assert one["peak_rss"] > 10**7
    for name in ("prefill", "decode"):
        assert f"{statistics.median(one[name]):,.1f} (" in done.out
    written = (pruned / "README.md").read_text()
    assert written.startswith(card.rstrip()) and written.count("## Speed") == 1
    assert f"{statistics.median(one['decode']):,.1f} (" in report(pruned).read_text()


def test_a_second_measurement_takes_the_place_of_the_first(pruned: Path) -> None:
    for rate in (11.0, 22.0):
        found = Speed("transformers", str(pruned), "float32", (rate,), (rate,), 10**6)
        record_speed(pruned, Speeds(8, 3, "cpu", (found,)))
    card = (pruned / "README.md").read_text()
    assert card.count("## Speed") == 1 and "22.0" in card and "11.0" not in card
    facts = json.loads((pruned / "streamprune.json").read_text())
    assert facts["speed"]["speeds"][0]["prefill"] == [22.0] and "kept" in facts


@pytest.mark.slow
def test_llama_cpp_measures_a_ragged_output(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    merge_once(model)  # or llama.cpp has no such tokenizer
    config = PruneConfig(model, tmp_path / "pruned", method="magnitude", layers=(2, 7), evaluate=False)
    found = speed(prune(config).output, model, prompt=8, new=3, runs=1)
    assert [each.engine for each in found.speeds] == ["transformers"] * 2 + ["llama.cpp"] * 2, found.notes
    assert all(min(each.prefill + each.decode) > 0 for each in found.speeds)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--prompt", 1), ("--prompt",)),
        (("--new", 0), ("--new",)),
        (("--runs", 0), ("--runs",)),
        (("--prompt", 65), ("64 tokens",)),
        (("--dtype", "float17"), ("float17",)),
        (("--device", "abacus"), ("abacus",)),
    ],
)
def test_numbers_that_cannot_be_are_refused(
    options: tuple[str, object], names: tuple[str, ...], pruned: Path, streamprune: Any
) -> None:
    check_refusal(streamprune("speed", pruned, *options), 2, names, remedy="must be|lower|choose|give|use")


def test_what_is_no_model_is_refused(tiny_llama: Path, tmp_path: Path, streamprune: Any) -> None:
    check_refusal(streamprune("speed", tmp_path / "nowhere"), 1, ("nowhere", "give a model directory"))
    check_refusal(streamprune("speed", tiny_llama, "--against", tmp_path), 1, (str(tmp_path), "config.json"))
    before = snapshot(tiny_llama)
    check_refusal(streamprune("speed", tiny_llama, "--write"), 1, ("streamprune.json",))
    assert snapshot(tiny_llama) == before


def test_a_model_that_does_not_load_is_named(pruned: Path, streamprune: Any) -> None:
    (pruned / "config.json").write_text(
        json.dumps(json.loads((pruned / "config.json").read_text()) | {"model_type": "unheard_of", "auto_map": {}})
    )
    result = streamprune("speed", pruned, *SMALL, "--no-llama-cpp")
    check_refusal(result, 1, ("pruned cannot be measured with transformers", "verify"), remedy="verify")


def test_models_that_there_is_no_memory_for_are_refused_before_they_are_loaded(
    pruned: Path, tiny_llama: Path, streamprune: Any, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoint(pruned) as one, Checkpoint(tiny_llama) as other:
        both = one.nbytes_in(torch.float32) + other.nbytes_in(torch.float32)
    monkeypatch.setattr("streamprune.paging.host_memory.available_memory", lambda: both - 1)
    options = (*SMALL, "--dtype", "float32", "--device", "cpu", "--no-llama-cpp")
    refused = streamprune("speed", pruned, "--against", tiny_llama, *options)
    check_refusal(refused, 1, (str(pruned), str(tiny_llama), "of weights"), "without --against")
    assert not asked
    assert streamprune("speed", pruned, *options).code == 0
    assert "pruned" in asked


def test_a_process_that_is_killed_is_said_to_be(
    pruned: Path, streamprune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = "import os, signal; input(); os.kill(os.getpid(), signal.SIGKILL)"
    started = subprocess.Popen
    monkeypatch.setattr("subprocess.Popen", lambda command, **given: started([command[0], "-c", child], **given))
    result = streamprune("speed", pruned, *SMALL, "--no-llama-cpp")
    check_refusal(result, 1, (str(pruned), "transformers", "was killed"), "free some")
