"""What the compiler makes of every kernel for cards that are not here: no spills, wide loads, tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_inputs import needs_triton

pytestmark = [needs_triton, pytest.mark.slow]
BENCH = Path(__file__).parent.parent.parent / "bench"


def run_bench(mode, tmp_path, *options):
    """The figures of `bench/kernels.py`, which compiles or interprets in a process of its own."""
    file = tmp_path / "figures.json"
    command = [sys.executable, BENCH / "kernels.py", f"--{mode}", "--json", file, *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text())


MOST_SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "gfx942": 64}  # KiB per program


@pytest.mark.parametrize("target", MOST_SHARED)
def test_machine_code_of_every_kernel(target, tmp_path):
    if target == "gfx942" and "amd" not in pytest.importorskip("triton.backends").backends:
        pytest.skip("this Triton has no AMD backend")
    figures = run_bench("static", tmp_path, "--target", target)
    assert {figure["model"] for figure in figures} == {"13B", "70B"}
    for figure in figures:
        name = f"{figure['kernel']}, {figure['model']}"
        assert figure["local"] == 0 and figure["local_accesses"] == 0, f"{name} spills"
        assert figure["shared"] <= MOST_SHARED[target] << 10, name
        product = figure["kernel"].startswith(("grad_norm", "gram"))
        assert (figure["tensor_cores"] > 0) == product, name
        if target.startswith("sm_"):
            # Rows of U, and what goes of M columns, are a number for each thread.
            narrow = ["32"] if figure["kernel"].startswith("obs_block") else []
            assert list(figure["loads"]) == [*narrow, "128"], f"{name}: {figure['loads']}"
            assert (figure["async_copies"] > 0) == product, name


def test_kernels_move_the_least_bytes(tmp_path):
    figures = run_bench("traffic", tmp_path, "--dry")
    for figure in figures:
        assert figure["minimum"] <= figure["counted"] <= 1.05 * figure["minimum"], figure
        assert figure["eager"] > figure["counted"], figure
