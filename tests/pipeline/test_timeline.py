"""What a run records over time: its stages as they were said, and samples that stay few."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

from streamprune import PruneConfig, prune
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.timeline import SAMPLES_KEPT

MB = 10**6


class Run:
    """A progress on a clock that the test moves."""

    def __init__(self) -> None:
        self.now, self.stream = 5.0, io.StringIO()
        self.progress = Progress(self.stream, as_json=True, clock=lambda: self.now)

    def stage(self, name: str, layers: int, seconds: float, read: int = MB) -> None:
        with self.progress.stage(name, layers * MB, 7.0):
            for _ in range(layers):
                self.now += seconds
                self.progress.advance(MB, read=read)


def test_stages_and_samples_are_those_of_the_run() -> None:
    run = Run()
    run.stage("an earlier run", 3, 1.0)
    timeline = run.progress.begin_timeline()
    run.now += 2
    run.stage("scoring", 4, 0.5, read=MB // 2)
    run.stage("writing", 2, 1.0)
    facts = timeline.facts()
    scoring, writing = facts["stages"]
    assert (scoring["name"], scoring["start"], scoring["elapsed_seconds"], scoring["bytes_read"]) == (
        *("scoring", 2.0, 2.0),
        2 * MB,
    )
    assert (writing["start"], writing["predicted_seconds"], writing["total_bytes"]) == (4.0, 7.0, 2 * MB)
    samples = facts["timeline"]
    assert samples["seconds"] == [2.5, 3.0, 3.5, 4.0, 4.0, 5.0, 6.0, 6.0]
    assert samples["bytes_read"] == [MB // 2 * count for count in (1, 2, 3, 4, 4, 6, 8, 8)]
    assert all(rss > MB for rss in samples["rss"])


@pytest.mark.parametrize("seconds", [0.001, 1.0])
def test_samples_are_few_however_long_the_run_is(seconds: float) -> None:
    run = Run()
    timeline = run.progress.begin_timeline()
    run.stage("scoring", 5000, seconds)
    samples = timeline.facts()["timeline"]
    assert SAMPLES_KEPT / 2 - 2 < len(samples["seconds"]) <= SAMPLES_KEPT
    assert samples["bytes_read"][-1] == 5000 * MB
    gaps = [after - before for before, after in zip(samples["seconds"], samples["seconds"][1:], strict=False)]
    assert max(gaps) < 4 * 5000 * seconds / SAMPLES_KEPT, "no part of the run is left out"


def test_a_run_writes_what_it_recorded(tiny_llama: Path, tmp_path: Path) -> None:
    config: dict[str, Any] = {"method": "taylor", "layers": (2, 7), "samples": 2, "seq_len": 16, "compensate": True}
    prune(PruneConfig(tiny_llama, tmp_path / "out", **config))
    facts = json.loads((tmp_path / "out" / "streamprune.json").read_text())
    names = [stage["name"] for stage in facts["stages"]]
    assert names == ["perplexity before", "scoring taylor", "repairing", "writing", "perplexity after"]
    assert sum(stage["elapsed_seconds"] for stage in facts["stages"]) <= facts["seconds"]["total"]
    samples = facts["timeline"]
    assert samples["seconds"] == sorted(samples["seconds"])
    assert max(samples["rss"]) <= facts["peak_rss"] * 1.02  # the kernel counts pages of threads in batches
    assert samples["bytes_read"][-1] == sum(stage["bytes_read"] for stage in facts["stages"])
    assert facts["memory"]["planned_disk"].keys() == facts["memory"]["planned_read"].keys()
