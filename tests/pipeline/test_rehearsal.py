"""Kernels that are compiled ahead: those that a method starts on a GPU, each for the arguments that it is given."""

import os
import subprocess
import sys

import pytest
import torch
from kernel_inputs import needs_triton
from tiny_models import make_sweeper, save_tiny, token_ids

from streamprune import prune
from streamprune.config import PruneConfig
from streamprune.kernels.launch import Launch
from streamprune.methods.sinks import LayerScores, UnitScores, WeightPruner
from streamprune.methods.table import METHODS
from streamprune.paging.device import HostDevice
from streamprune.paging.pager import Pager
from streamprune.pipeline.rehearsal import rehearse
from streamprune.planning.decision import make_plan
from streamprune.planning.stage import Work
from streamprune.recovery.least_squares import compensate
from streamprune.streaming.statistics import Statistics
from streamprune.streaming.sweeper import Sweeper

pytestmark = needs_triton
WIDE = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}
MADE = {"out_ptr", "partial_ptr", "errors_ptr"}  # operands that hold anything before
RUNS = [
    ("magnitude", "units", {}),
    ("magnitude", "2:4", {}),
    ("random", "units", {}),
    ("random", "weights", {}),
    ("random", "layers", {}),
    *(("taylor", "units", {"order": order}) for order in ("first", "second", "mix", "vectorize")),
    ("taylor", "weights", {"order": "mix"}),
    ("taylor", "layers", {}),
    ("smoothgrad", "units", {"draws": 2}),
    ("smoothgrad", "units", {"draws": 2, "mean": "score"}),
    ("smoothgrad", "units", {"draws": 1, "sigma": 0}),
    ("moreau", "units", {"steps": 3, "draws": 2}),
    ("moreau", "4:8", {"steps": 2}),
    ("moreau-gs", "units", {"steps": 1}),
    ("moreau-gs", "units", {"steps": 2}),
    ("moreau-gs", "units", {"steps": 2, "eta_quantile": 0.5}),
    ("moreau-gs", "weights", {"steps": 2}),
    ("wanda", "units", {}),
    ("wanda", "weights", {}),
    ("wanda-sp", "units", {}),
    ("thinet", "units", {}),
    ("thinet", "units", {"refit": "yes"}),
    ("flap", "units", {}),
    ("gblm", "units", {"p": 2}),
    ("gblm", "2:4", {}),
    ("gblm", "units", {"terms": "gradient"}),
    ("sparsegpt", "weights", {}),
    ("sparsegpt", "2:4", {}),
    ("layer-ppl", "layers", {}),
    ("block-influence", "layers", {}),
]


class Apart(HostDevice):
    """A device that readers cannot write to, as a GPU: there a slot's tensors begin where vector loads can."""

    direct = False


def specialised(launch):
    """What Triton compiles a start for: the kernel, types, values and alignment of its arguments, and its options."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, compute_cache_key, create_function_from_signature

    kernel = launch.kernel
    if not isinstance(kernel, JITFunction):  # the interpreter's
        kernel = JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    _, specialisation, options = bind(**launch.arguments, **launch.constants, **launch.options)
    return launch.kernel.__name__, compute_cache_key({}, specialisation, options)


@pytest.fixture
def started(monkeypatch):
    """Starts of kernels as they come, by what they are compiled for; none runs, and what they would make is 0."""
    starts = []

    def noted(launch):
        starts.append(specialised(launch))
        for name in MADE & set(launch.arguments):
            launch.arguments[name].zero_()
        if "total_ptr" in launch.arguments:
            launch.arguments["total_ptr"].fill_diagonal_(1.0)  # SparseGPT and the repair take factors of it

    monkeypatch.setattr(Launch, "run", noted)
    return starts


def sweeper_of(path, dtype, granularity):
    skeleton = make_sweeper(path, dtype=dtype).skeleton
    pager = Pager(skeleton.checkpoint, skeleton.entries, Apart())
    return Sweeper(skeleton, pager, 2, "units" if granularity == "units" else "matrices", "triton")


def run_and_rehearse(started, path, method, granularity, settings, dtype=torch.bfloat16):
    """What the sweeps of a run have started, and what its rehearsal has."""
    sweeper = sweeper_of(path, dtype, granularity)
    skeleton = sweeper.skeleton
    options = {"granularity": granularity, "ratio": 0.5} if granularity != "units" else {}
    config = PruneConfig("in", path / "out", method, settings, layers=(1, 3), **options)
    plan, ids = make_plan(config, skeleton), token_ids(3, 16)
    sinks = {
        "units": lambda: UnitScores(skeleton.all_units(plan.layers), "triton"),
        "layers": lambda: LayerScores(plan.layers, "triton"),
        "weights": lambda: WeightPruner(plan.sparsity, lambda ref, stored, pruned: None, "triton"),
    }
    started.clear()
    METHODS[method].score(Statistics(sweeper, ids, plan.layers, 0), plan.settings, sinks[config.target]())
    in_sweeps = set(started)
    started.clear()
    rehearse(sweeper, config, plan, Work(tuple(ids.shape), None, None))
    return in_sweeps, set(started)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "wide"
    save_tiny(path, "llama", dtype=torch.bfloat16, **WIDE)
    return path


@pytest.mark.parametrize("method,granularity,settings", RUNS)
def test_what_sweeps_start_was_compiled_for_these_arguments(method, granularity, settings, model, started):
    in_sweeps, rehearsed = run_and_rehearse(started, model, method, granularity, settings)
    assert rehearsed == in_sweeps


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
@pytest.mark.parametrize("method,settings", [("moreau-gs", {"steps": 2}), ("gblm", {}), ("sparsegpt", {})])
def test_so_it_was_for_odd_widths_and_matrices_that_are_fused_or_transposed(
    method, settings, family, tmp_path, started
):
    save_tiny(tmp_path, family, dtype=torch.float32)
    in_sweeps, rehearsed = run_and_rehearse(started, tmp_path, method, "weights", settings, torch.float16)
    assert rehearsed == in_sweeps


def test_layers_of_other_widths_are_rehearsed_too_and_those_that_are_alike_once(model, tmp_path, started):
    run_and_rehearse(started, model, "moreau-gs", "units", {"steps": 1})
    assert len(started) == 7 * 3  # of each matrix of one layer: noise, the step, its score
    prune(PruneConfig(model, tmp_path / "in", "magnitude", layers=(2, 3), ratio=0.3, evaluate=False))
    in_sweeps, rehearsed = run_and_rehearse(started, tmp_path / "in", "moreau-gs", "units", {"steps": 1})
    assert len(started) == 2 * 7 * 3
    assert rehearsed == in_sweeps


@pytest.mark.parametrize("ratio", [0.2, 0.35])  # channels that stay: a multiple of 16, or not
def test_what_the_repair_starts_was_compiled_too(ratio, model, tmp_path, started):
    sweeper = sweeper_of(model, torch.bfloat16, "units")
    config = PruneConfig(
        "in", tmp_path / "out", "magnitude", layers=(1, 3), ratio=ratio, compensate=True, micro_batch=2
    )
    plan, ids = make_plan(config, sweeper.skeleton), token_ids(3, 16)
    given = {"ridge": None, "goal": plan.repair, "micro_batch": 2, "write": lambda page, fitted: None}
    compensate(sweeper, ids, plan.form.kept, **given)
    repaired = set(started)
    assert {name for name, _ in repaired} == {"gram_kernel"}
    started.clear()
    rehearse(sweeper, config, plan, Work(None, tuple(ids.shape), None))
    assert {each for each in started if each[0] == "gram_kernel"} == repaired


COMPILED = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget

class Driver:
    def get_current_target(self): return GPUTarget("cuda", 90, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0

triton.runtime.driver.set_active(Driver())
from streamprune.config import PruneConfig
from streamprune.kernels.launch import KernelFailure, Launch, compiling
from streamprune.pipeline.rehearsal import rehearse
from streamprune.pipeline.source import Source
from streamprune.planning.decision import make_plan
from streamprune.planning.stage import Work

config = PruneConfig(sys.argv[1], "out", "moreau-gs", {"steps": 2}, layers=(1, 3))
run, launches = Launch.run, []
Launch.run = lambda launch: launches.append(launch) or run(launch)
with Source(config.model, dtype="bfloat16", micro_batch=2, backend="triton").open() as sweeper:
    with compiling(torch.device("cpu")):
        rehearse(sweeper, config, make_plan(config, sweeper.skeleton), Work((3, 16), None, None))
for kernel in {launch.kernel for launch in launches}:
    made = kernel.device_caches[0][0].values()
    made = [each.result() if hasattr(each, "result") else each for each in made]  # before Triton 3.7 no futures
    print(kernel.__name__, len(made), all(each.asm["cubin"] for each in made))
wrong = Launch(launches[0].kernel, (1,), launches[0].arguments, launches[0].constants | {"BLOCK": 3})
with compiling(torch.device("cpu")):
    wrong.run()
real = {name: torch.empty(8, 8) if torch.is_tensor(each) else each for name, each in wrong.arguments.items()}
real = {name: each.to(wrong.arguments[name].dtype) if torch.is_tensor(each) else each for name, each in real.items()}
try:
    Launch(wrong.kernel, (1,), real, wrong.constants).run()
except KernelFailure as failure:
    print(failure)
"""


@pytest.mark.slow
def test_they_are_compiled_in_threads_and_whoever_starts_one_that_is_not_learns_why(model, tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", COMPILED, model]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    *made, failure = done.stdout.splitlines()
    assert sorted(made) == [
        "column_score_kernel 1 True",
        "moreau_columns_kernel 2 True",  # without δ and with it
        "moreau_rows_kernel 2 True",
        "perturb_kernel 2 True",
        "row_score_kernel 1 True",
    ]
    assert failure.startswith("the kernel perturb_kernel does not run here: CompilationError: ")
    assert "power of 2" in failure
