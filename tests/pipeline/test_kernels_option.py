"""--kernels: torch's operations take the place of kernels where that is asked for, and nowhere else."""

import sys

import pytest
import torch
from kernel_inputs import needs_triton
from tiny_models import save_tiny

from streamprune import KernelError, PruneConfig, prune
from streamprune.kernels.launch import Launch
from streamprune.pipeline import rehearsal

pytestmark = needs_triton
RUNS = [
    ("random", "weights", {}),
    ("taylor", "units", {"order": "mix"}),
    ("moreau", "2:4", {"steps": 2}),
    ("moreau-gs", "units", {"steps": 2}),
    ("flap", "units", {"bias": "no"}),
    ("thinet", "units", {}),
    ("gblm", "units", {}),
    ("sparsegpt", "weights", {}),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Llama whose rows 2:4 divides."""
    path = tmp_path_factory.mktemp("models") / "llama"
    save_tiny(path, "llama", dtype=torch.bfloat16, num_hidden_layers=8, intermediate_size=40, head_dim=8)
    return path


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Operations start their kernels wherever nobody says "torch", as on a GPU."""
    for name, module in list(sys.modules.items()):
        if name.startswith("streamprune.kernels.") and hasattr(module, "use_triton"):
            monkeypatch.setattr(module, "use_triton", lambda tensor, backend: backend != "torch")
    monkeypatch.setattr(sys.modules["streamprune.kernels.gram"], "FEW_COLUMNS", 0)


def options(model, output, method, granularity, settings, **more):
    repaired = {"compensate": True} if granularity == "units" else {"granularity": granularity, "ratio": 0.5}
    given = {"settings": settings, "dtype": "bfloat16", "layers": (2, 4), "samples": 2, "seq_len": 16}
    return PruneConfig(str(model), output, method, evaluate=False, device="cpu", **given, **repaired, **more)


@pytest.mark.parametrize("method,granularity,settings", RUNS)
def test_with_torch_no_kernel_starts_and_without_it_one_does(
    method, granularity, settings, model, output, as_on_a_gpu, monkeypatch
):
    class Started(Exception):
        pass

    def start(launch):
        raise Started

    monkeypatch.setattr(Launch, "run", start)
    with pytest.raises(Started):
        prune(options(model, output, method, granularity, settings))
    facts = prune(options(model, output, method, granularity, settings, kernels="torch")).facts
    assert facts["options"]["kernels"] == "torch"


class Broken:
    """A kernel that the compiler refuses, in two lines."""

    __name__ = "row_score_kernel"

    def __getitem__(self, grid):
        def start(**named):
            raise RuntimeError("ptxas fatal: unsupported .target\nand more that nobody needs")

        return start


def test_a_kernel_that_does_not_compile_ends_the_run_in_one_line(model, output, as_on_a_gpu, streamprune, monkeypatch):
    monkeypatch.setattr(sys.modules["streamprune.kernels.unit_score"], "row_score_kernel", Broken())
    command = ["--model", model, "--output", output, "--method", "magnitude", "--no-evaluate"]
    done = streamprune(*command)
    assert (done.code, done.err.splitlines()[-1]) == (
        1,
        "streamprune: the kernel row_score_kernel does not run here: RuntimeError: ptxas fatal: unsupported .target; "
        "use --kernels torch, which is slower and draws other noise",
    )
    assert not output.exists()
    assert streamprune(*command, "--kernels", "torch").code == 0


def test_a_gpu_without_triton_is_refused_unless_the_reference_is_asked_for(model, output, monkeypatch):
    monkeypatch.setattr(rehearsal, "has_triton", lambda: False)
    monkeypatch.setattr(rehearsal, "is_gpu", lambda device: True)
    config = PruneConfig(str(model), output, "magnitude")
    with pytest.raises(KernelError, match="Triton is not installed, so cuda:0 has no kernels: pip install triton, or"):
        rehearsal.refuse_without_kernels(config, torch.device("cuda:0"))
    rehearsal.refuse_without_kernels(
        PruneConfig(str(model), output, "magnitude", kernels="torch"), torch.device("cuda:0")
    )
