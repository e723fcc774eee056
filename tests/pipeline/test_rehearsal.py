"""Kernels that are compiled ahead: those that a method starts on a GPU, each for the very arguments that it is given."""

import pytest
import torch
from kernel_inputs import DEVICE, needs_triton
from tiny_models import make_sweeper, save_tiny, token_ids

from streamprune.config import PruneConfig
from streamprune.kernels.launch import Launch
from streamprune.methods.sinks import LayerScores, UnitScores, WeightPruner
from streamprune.methods.table import METHODS
from streamprune.paging.device import HostDevice
from streamprune.paging.pager import Pager
from streamprune.pipeline.rehearsal import rehearse
from streamprune.planning.decision import make_plan
from streamprune.streaming.statistics import Statistics

pytestmark = needs_triton
WIDE = {"hidden_size": 64, "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160}
RUNS = [
    ("magnitude", "units", {}),
    ("magnitude", "2:4", {}),
    ("random", "weights", {}),
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
    """Starts of kernels as they come, by what they are compiled for."""
    starts, run = [], Launch.run

    def noted(launch):
        starts.append(specialised(launch))
        run(launch)

    monkeypatch.setattr(Launch, "run", noted)
    return starts


def run_and_rehearse(started, path, method, granularity, settings, dtype=torch.bfloat16):
    """What the sweeps of a run have started, and what its rehearsal has."""
    sweeper = make_sweeper(path, dtype=dtype, micro_batch=2)
    sweeper.pager = Pager(sweeper.skeleton.checkpoint, sweeper.skeleton.entries, Apart(), poison=True)
    sweeper.backend = sweeper.binder.backend = "triton"
    sweeper.scope = "units" if granularity == "units" else "matrices"
    config = PruneConfig("in", path / "out", method, settings, granularity=granularity, layers=(1, 3))
    plan, ids = make_plan(config, sweeper.skeleton), token_ids(3, 16)
    sinks = {
        "units": lambda: UnitScores(sweeper.skeleton.all_units(plan.layers), "triton"),
        "layers": lambda: LayerScores(plan.layers, "triton"),
        "weights": lambda: WeightPruner(plan.sparsity, lambda ref, stored, pruned: None, "triton"),
    }
    started.clear()
    METHODS[method].score(Statistics(sweeper, ids, plan.layers, 0), plan.settings, sinks[config.target]())
    in_sweeps = set(started)
    started.clear()
    rehearse(sweeper, config, plan, tuple(ids.shape))
    return in_sweeps, set(started)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "wide"
    save_tiny(path, "llama", dtype=torch.bfloat16, **WIDE)
    return path


@pytest.mark.parametrize("method,granularity,settings", RUNS)
def test_what_sweeps_start_was_compiled_for_these_arguments(method, granularity, settings, model, started):
    in_sweeps, rehearsed = run_and_rehearse(started, model, method, granularity, settings)
    for each in sorted(rehearsed - in_sweeps): print("R", each)
    for each in sorted(in_sweeps - rehearsed): print("S", each)
    assert rehearsed == in_sweeps
