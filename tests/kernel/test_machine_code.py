"""What the compiler makes of every kernel for cards that are not here: no spills, wide loads, tensor cores."""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from kernel_inputs import needs_triton

pytestmark = [needs_triton, pytest.mark.slow]
BENCH = Path(__file__).parent.parent.parent / "bench"


def run_bench(mode, directory, *options):
    """The figures of `bench/kernels.py`, which compiles or interprets in a process of its own."""
    file = directory / "figures.json"
    command = [sys.executable, BENCH / "kernels.py", f"--{mode}", "--json", file, *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


MOST_SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "gfx942": 64}  # KiB per program


def test_machine_code_of_every_kernel(tmp_path):
    targets = [*MOST_SHARED][: None if "amd" in pytest.importorskip("triton.backends").backends else -1]
    figures = run_bench("static", tmp_path)
    assert {(each["target"], each["model"]) for each in figures} == set(product(targets, ("13B", "70B")))
    for figure in figures:
        name = f"{figure['kernel']}, {figure['model']}, {figure['target']}"
        assert figure["local"] == 0 and figure["local_accesses"] == 0, f"{name} spills"
        assert figure["shared"] <= MOST_SHARED[figure["target"]] << 10, name
        multiplies = figure["kernel"].startswith(("grad_norm", "gram"))
        assert (figure["tensor_cores"] > 0) == multiplies, name
        if figure["target"].startswith("sm_"):
            # Rows of U, and what goes of M columns, are a number for each thread.
            narrow = ["32"] if figure["kernel"].startswith("obs_block") else []
            assert list(figure["loads"]) == [*narrow, "128"], f"{name}: {figure['loads']}"
            assert (figure["async_copies"] > 0) == multiplies, name


def test_kernels_move_the_least_bytes(tmp_path):
    figures = run_bench("traffic", tmp_path, "--dry")
    for figure in figures:
        assert figure["minimum"] <= figure["counted"] <= 1.05 * figure["minimum"], figure
        assert figure["eager"] > figure["counted"], figure
