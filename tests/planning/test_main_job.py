"""bench/main_job.py: targets are judged by what was measured, time is kept to, and everything runs on a CPU."""

import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """The modules of bench/ by name; its directory is not on the path otherwise."""
    monkeypatch.syspath_prepend(str(BENCH))
    return {name: importlib.import_module(name) for name in ("main_job", "timed")}


def measured(bench, **changed):
    """Results in which every target is met, but for a row's figures that are `changed`."""
    sizes = {"peak": 100, "reserved": 100, "planned": 100, "limit": 100}
    results = bench["main_job"].Results("cuda", None)
    for name in bench["main_job"].ROWS:
        slow = 1.1 if name == "in memory: taylor" else 1.0
        results.rows[name] = {"first": slow, "second": slow, "sum": 5.0, "up": 2e9, "down": 1e9, "flops": 5e13, **sizes}
    product = {"product": "weight gradient", "way": "as_is", "flops": 1e14}
    results.rows["rates"] = {"link": {"up": 2e9, "down": 2e9}, "products": [product]}
    results.profile.update(row="gblm", profile={"own": 0.01})
    for row, figures in changed.items():
        results.rows[row] |= figures
    return results


def missed(bench, results):
    lines = bench["main_job"].verdicts(results).splitlines()
    assert all(line.startswith(("met: ", "MISSED: ", "not measured: ")) for line in lines)
    return [line for line in lines if not line.startswith("met: ")]


@pytest.mark.parametrize(
    "changed,lines",
    [
        ({}, []),
        (
            {"moreau-gs": {"second": 1.4}},
            ["MISSED: moreau-gs: seconds / the longer of link and arithmetic <= 1.3: 1.4"],
        ),
        # The link goes both ways at the same time, and the slower way counts, or the arithmetic.
        ({"moreau-gs": {"down": 4e9, "second": 2.5}, "moreau-gs, 12 GiB": {"flops": 3e14, "second": 3.8}}, []),
        ({"repair": {"first": 11.0}}, ["MISSED: repair: seconds, the first time <= 10.0: 11"]),
        ({"repair": {"peak": 120}}, ["MISSED: repair: peak / plan <= 1.1: 1.2"]),
        ({"gblm": {"peak": 80}}, ["MISSED: gblm: plan / peak <= 1.1: 1.25"]),
        ({"gblm": {"reserved": 101}}, ["MISSED: gblm: reserved / --gpu-memory <= 1.0: 1.01"]),
        ({"gblm": {"sum": 4.0}}, ["MISSED: gblm: sum of scores, apart from in memory <= 0.02: 0.2"]),
        ({"forward, two slots": {"second": 1.05}}, ["MISSED: forward, two slots: seconds / in memory <= 1.03: 1.05"]),
        ({"gblm": {"second": None}}, ["not measured: gblm: seconds / taylor's <= 2.0"]),
    ],
)
def test_each_target_is_judged_by_its_own_figures(changed, lines, bench):
    assert missed(bench, measured(bench, **changed)) == lines


def test_what_was_not_measured_is_not_met(bench):
    results = bench["main_job"].Results("cuda", None)
    assert all(line.startswith("not measured: ") for line in missed(bench, results))
    assert not any(each["met"] for each in results.as_dict()["targets"])


def test_a_row_is_not_begun_without_the_time_for_it(bench, tmp_path, monkeypatch):
    script, file = bench["main_job"], tmp_path / "figures.json"
    monkeypatch.setattr(script.subprocess, "Popen", lambda *_, **__: pytest.fail("a process was begun"))
    results = script.Results("cuda", file)
    script.Bench(tmp_path, results, time.monotonic() + 30, dry=False).measure_all(["moreau-gs", "gblm"])
    rows = json.loads(file.read_text())["rows"]
    assert list(rows) == ["moreau-gs", "gblm"] and all("left_out" in row for row in rows.values())


@pytest.mark.parametrize(
    "seconds,says,kept",
    [
        (0.1, "time.sleep(600)", {}),
        (600, "print('{\"first\": 2.5}', flush=True); os.kill(os.getpid(), 9)", {"first": 2.5}),
    ],
)
def test_a_row_is_ended_in_time_and_what_it_has_said_is_kept(seconds, says, kept, bench, tmp_path, monkeypatch):
    script, file, popen = bench["main_job"], tmp_path / "figures.json", subprocess.Popen
    command = [sys.executable, "-c", f"import os, time; {says}"]
    monkeypatch.setattr(script.subprocess, "Popen", lambda _, **given: popen(command, **given))
    results = script.Results("cpu", file)
    script.Bench(tmp_path, results, time.monotonic() + seconds, dry=True).measure_all(["rates"])
    row = json.loads(file.read_text())["rows"]["rates"]
    assert row.pop("error").startswith("ended by signal ") and row.pop("process") < 60 and row == kept


def test_a_device_is_busy_while_anything_runs_on_it(bench):
    assert bench["timed"].busy([(0, 10), (20, 5), (22, 1), (5, 10), (24, 3)]) == 15 + 7
    assert bench["timed"].busy([]) == 0


def test_our_kernels_are_known_by_name(bench):
    assert {"perturb_kernel", "gram_kernel", "obs_block_kernel", "grad_norm_kernel"} <= bench["timed"].own_kernels()


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(bench, tmp_path):
    file = tmp_path / "figures.json"
    command = [sys.executable, BENCH / "main_job.py", "--dry", "--scratch", tmp_path / "scratch", "--json", file]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert list(figures["rows"]) == list(bench["main_job"].ROWS) and not list((tmp_path / "scratch").iterdir())
    for name, row in figures["rows"].items():
        assert ("link" in row and "products" in row) if name == "rates" else row["first"] > 0 and row["second"] > 0
    assert figures["profile"]["row"] in figures["rows"] and len(figures["profile"]["profile"]["top"]) == 15
    targets = {each["target"]: each for each in figures["targets"]}
    sums = [each for name, each in targets.items() if "sum of scores" in name]
    assert len(sums) == 7 and all(each["met"] for each in sums)
    for name, each in targets.items():
        assert each["value"] is not None, name
        assert f": {name} <= {each['at_most']}" in done.stdout
