"""Without Triton everything runs on a CPU; with it a CPU tensor still takes torch unless told otherwise."""

import subprocess
import sys

import pytest
import torch
from kernel_inputs import DEVICE, needs_triton

from streamprune.kernels import perturb
from streamprune.kernels.launch import ceil_div, power_of_two, use_triton

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from streamprune.kernels import add_product, grad_norm, gram, mirror, moreau_step
from streamprune.kernels import perturb, prune_n_of_m, prune_rows, unit_score
w, g = torch.ones(4, 8), torch.ones(4, 8)
assert perturb(torch.empty(4, 8), w, g, 0.05, 1).isfinite().all()
assert moreau_step(None, g.clone(), 0.2, 0.1, threshold=0.01).norms.unique().numel() == 1
assert unit_score(w, g, 0).tolist() == [8.0] * 4
assert grad_norm(torch.zeros(4, 8), torch.ones(1, 2, 8), torch.ones(1, 2, 4), 1).unique().tolist() == [2.0]
assert mirror(gram(torch.zeros(8, 8), w)).unique().tolist() == [4.0]
assert add_product(torch.zeros(8, 8), w, g).unique().tolist() == [4.0]
assert (prune_rows(w.clone(), 3) == 0).sum() == 12 and (prune_n_of_m(w.clone(), 2, 4) == 0).sum() == 16
try:
    perturb(torch.empty(4, 8), w, g, 0.05, 1, backend="triton")
except RuntimeError as error:
    print(error)
"""


def test_without_triton_every_op_runs_on_a_cpu():
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Triton is not installed; pip install triton")


@needs_triton
def test_the_device_picks_the_backend_unless_told():
    assert not use_triton(torch.ones(1), None) and use_triton(torch.ones(1), "triton")
    assert not use_triton(torch.ones(1, dtype=torch.float64), "triton")  # its kernel would compute in float32
    weight = torch.ones(100)
    outs = [perturb(torch.empty(100), weight, None, 0.05, 5, backend=b) for b in (None, "torch")]
    assert torch.equal(*outs)
    weight = weight.to(DEVICE)
    by_kernel = perturb(torch.empty_like(weight), weight, None, 0.05, 5, backend="triton")
    assert not torch.equal(by_kernel.cpu(), outs[0])


@pytest.mark.parametrize("n,power", [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (13824, 16384), (28672, 32768)])
def test_blocks_are_the_next_power_of_two(n, power):
    assert power_of_two(n) == power


def test_ceil_div_rounds_up():
    assert [ceil_div(a, 4) for a in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 3]
