"""What only a GPU can show: the same gradients and scores as on a CPU, from slots that are poisoned when released."""

import pytest
import torch
from plain_methods import assert_scores
from plain_methods import run as run_method
from safetensors.torch import load_file
from tiny_models import N_LAYERS, need_direct, save_tiny, token_ids, whole_model_gradients

from streamprune import PruneConfig, prune
from streamprune.kernels import perturb
from streamprune.kernels.launch import compiling
from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS
from streamprune.model.skeleton import Skeleton
from streamprune.paging.device import limit_memory, paging_device
from streamprune.paging.pager import Pager
from streamprune.pipeline.rehearsal import rehearse
from streamprune.planning.decision import make_plan
from streamprune.planning.stage import Work
from streamprune.storage.checkpoint import Checkpoint
from streamprune.streaming.binder import Perturbation
from streamprune.streaming.statistics import Statistics
from streamprune.streaming.sweeper import Sweeper

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
CUDA = torch.device("cuda")
QUIET = {"sigma": 0.0}  # the devices' noise differs
# (method, granularity, its own numbers, options)
RUNS = [
    ("magnitude", "units", {}, {}),
    ("taylor", "units", {"order": "mix"}, {}),
    ("taylor", "units", {}, {"allocation": "global"}),
    ("taylor", "units", {}, {"compensate": True}),
    ("taylor", "units", {}, {"compensate": True, "compensate_target": "own"}),
    ("smoothgrad", "units", QUIET | {"draws": 2}, {}),
    ("moreau", "units", QUIET | {"steps": 3}, {}),
    ("moreau-gs", "units", QUIET | {"steps": 3, "eta_quantile": 0.2}, {}),
    ("wanda", "units", {}, {}),
    ("wanda-sp", "units", {}, {}),
    ("thinet", "units", {}, {}),
    ("thinet", "units", {"refit": "yes"}, {}),
    ("flap", "units", {}, {}),
    ("gblm", "units", {}, {}),
    ("gblm", "units", {"p": 2}, {}),
    ("bernoulli", "units", {"init": "magnitude", "steps": 4}, {}),
    ("bernoulli", "units", {"init": "magnitude", "steps": 4, "repaired": "yes"}, {}),
    *(
        (method, pattern, {}, {})
        for method in ("magnitude", "wanda", "gblm", "sparsegpt", "taylor", "random")
        for pattern in ("weights", "2:4", "4:8")
    ),
    *((method, "layers", {}, {}) for method in ("magnitude", "taylor", "layer-ppl", "block-influence")),
    ("taylor", "layers", {}, {"contiguous": True, "compensate": True}),
]


def cuda_sweeper(path, dtype):
    checkpoint = Checkpoint(path)
    skeleton = Skeleton(checkpoint, dtype, CUDA)
    return Sweeper(skeleton, Pager(checkpoint, skeleton.entries, paging_device(CUDA), poison=True), 2)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "phi3", "gpt2"])
def test_streamed_gradients_equal_whole_model_autograd_on_the_cpu(family, tmp_path):
    model, ids, grads = save_tiny(tmp_path, family), token_ids(n=5, seq=20), {}
    sweeper = cuda_sweeper(tmp_path, torch.float64)
    Statistics(sweeper, ids, range(N_LAYERS), 0).gradients(lambda ref, w, g: grads.update({ref.key: g.cpu()}))
    expected, path = whole_model_gradients(model, ids), sweeper.skeleton.family.layers
    for (layer, tensor), grad in grads.items():
        whole = expected[f"{path}.{layer}.{tensor}"]
        # Norms compute in float32 whatever the model's dtype.
        assert (grad - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_no_sweep_waits_for_a_kernel_that_was_not_compiled_ahead(tmp_path, monkeypatch):
    triton, compiled = pytest.importorskip("triton"), []
    save_tiny(tmp_path, "llama", dtype=torch.bfloat16)
    sweeper, ids = cuda_sweeper(tmp_path, torch.bfloat16), token_ids(n=5, seq=20)
    plan = make_plan(PruneConfig("in", tmp_path / "out", "moreau-gs", {"steps": 2}, layers=(1, 3)), sweeper.skeleton)
    with compiling(CUDA):
        rehearse(sweeper, PruneConfig("in", tmp_path / "out", "moreau-gs"), plan, Work(tuple(ids.shape), None, None))
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", lambda **miss: compiled.append(miss["repr"]))
    scores = UnitScores(sweeper.skeleton.all_units(plan.layers))
    METHODS["moreau-gs"].score(Statistics(sweeper, ids, plan.layers, 0), plan.settings, scores)
    assert compiled == []


def test_every_sweep_gives_the_same_bits(tmp_path):
    save_tiny(
        tmp_path,
        "llama",
        dtype=torch.bfloat16,
        hidden_size=256,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=512,
    )
    perturbation, runs = Perturbation(0.05, (0, 0, 0)), []
    for _ in range(5):
        grads = {}
        statistics = Statistics(cuda_sweeper(tmp_path, torch.bfloat16), token_ids(n=8, seq=48), range(1, N_LAYERS), 0)
        statistics.gradients(lambda ref, w, g, grads=grads: grads.update({ref.key: g.cpu()}), perturbation)
        assert all(torch.isfinite(grad).all() for grad in grads.values())
        runs.append(grads)
    for other in runs[1:]:
        assert all(torch.equal(runs[0][key], grad) for key, grad in other.items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_half_gradients_are_autograds_but_for_its_rounding(family, dtype, tmp_path, monkeypatch):
    save_tiny(tmp_path, family, dtype=torch.float32)
    runs = []
    for by_autograd in (False, True):
        if by_autograd:
            monkeypatch.setattr("streamprune.streaming.gradients.sums_halves", lambda tensor: False)
        grads = {}
        statistics = Statistics(cuda_sweeper(tmp_path, dtype), token_ids(n=5, seq=20), range(1, N_LAYERS), 0)
        statistics.gradients(lambda ref, w, g, grads=grads: grads.update({ref.key: g.cpu()}))
        runs.append(grads)
    assert runs[0].keys() == runs[1].keys()
    for key, grad in runs[0].items():
        assert grad.dtype == torch.float32
        assert (grad - runs[1][key]).abs().max() <= 0.02 * grad.abs().max(), key


@pytest.mark.parametrize("method", ["taylor", "moreau-gs"])
def test_scores_are_those_of_the_cpu(method, tmp_path):
    save_tiny(tmp_path, "llama", dtype=torch.float32)
    ids = token_ids(n=4, seq=20)
    settings = {"steps": 2, "sigma": 0.0} if method == "moreau-gs" else {}  # the devices' noise differs
    checkpoint = Checkpoint(tmp_path)
    on_cpu = Skeleton(checkpoint, torch.float32, torch.device("cpu"))
    cpu = Sweeper(on_cpu, Pager(checkpoint, on_cpu.entries, paging_device(torch.device("cpu"))), 2)
    both = [
        run_method(method, Statistics(sweeper, ids, range(1, 3), 0), **settings)
        for sweeper in (cpu, cuda_sweeper(tmp_path, torch.float32))
    ]
    assert_scores(both[1], both[0], rtol=1e-3, atol=1e-9)


def test_a_gpu_takes_the_kernel_by_itself():
    weight = torch.ones(1000, device=CUDA)
    outs = [perturb(torch.empty_like(weight), weight, None, 0.05, 5, backend=b) for b in (None, "triton", "torch")]
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])


def test_host_memory_is_registered_passed_both_ways_and_given_back():
    up, nbytes = paging_device(CUDA), (3 << 20) + 5
    down, values = up.another(), (torch.arange(nbytes) % 251).to(torch.uint8)
    for _ in range(3):  # what was given back can be registered again
        arena, registered = up.arena(nbytes)
        assert registered and arena.is_pinned()
        arena.copy_(values)
        there = up.buffer(nbytes)
        up.copy_waits(up.record_consumed())
        up.compute_waits(up.copy(there, arena))
        there.add_(1)
        down.copy_waits(up.record_consumed())
        down.chunk_free(down.copy(arena, there))
        assert torch.equal(arena, values + 1)
        up.release(arena)
        assert not arena.is_pinned()


def test_memory_that_cannot_be_registered_spoils_nothing(monkeypatch):
    device = paging_device(CUDA)
    arena, registered = device.arena(4 << 20)
    monkeypatch.setattr("streamprune.paging.device._large_pages", lambda nbytes: arena)  # twice it cannot be
    assert registered and not device.another().arena(4 << 20)[1]
    assert torch.ones(3, device=CUDA).sum() == 3  # no kernel is taken for what failed
    device.release(arena)
    assert torch.ones(3, device=CUDA).sum() == 3


def test_a_limit_is_kept_to_and_lifted():
    torch.cuda.empty_cache()
    limit_memory(CUDA, torch.cuda.memory_reserved() + (64 << 20))
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(128 << 20, dtype=torch.uint8, device=CUDA)
    finally:
        limit_memory(CUDA, None)
    assert torch.empty(128 << 20, dtype=torch.uint8, device=CUDA).is_cuda


@pytest.fixture(scope="module")
def even_llama(tmp_path_factory):
    """A saved float32 Llama of 8 layers whose rows N:M patterns divide."""
    path = tmp_path_factory.mktemp("models") / "llama"
    save_tiny(path, "llama", dtype=torch.float32, num_hidden_layers=8, head_dim=8, intermediate_size=40)
    return path


@pytest.mark.parametrize("method,granularity,settings,options", RUNS)
def test_a_pruned_model_is_that_of_the_cpu(method, granularity, settings, options, even_llama, tmp_path):
    common = {"method": method, "granularity": granularity, "settings": settings, "layers": (1, 7), **options}
    results = []
    for device in ("cpu", "cuda"):
        config = PruneConfig(
            str(even_llama),
            tmp_path / device,
            device=device,
            dtype="float32",
            samples=8,
            seq_len=48,
            evaluate=False,
            **common,
        )
        results.append((prune(config).kept, load_file(tmp_path / device / "model.safetensors")))
    (kept, expected), (kept_there, tensors) = results
    assert kept == kept_there and tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        whole = expected[name]
        same = (tensor == 0) == (whole == 0)
        # Scores that are almost equal may change places, and their weights' neighbours then take other updates.
        assert same.float().mean() >= 0.995, name
        error = (tensor - whole)[same].abs()
        assert error.quantile(0.99) <= 1e-3 * whole.abs().max(), name


@pytest.mark.parametrize("reader", ["buffered", "direct"])
def test_what_comes_around_the_page_cache_is_what_is_stored(reader, tmp_path):
    """Straight into pinned memory, or by way of a bounce buffer where a driver's memory takes no direct reads."""
    need_direct(tmp_path)
    save_tiny(tmp_path, "llama", intermediate_size=4096)
    stored = load_file(tmp_path / "model.safetensors")
    with Checkpoint(tmp_path, reader) as checkpoint:
        skeleton = Skeleton(checkpoint, torch.float32, CUDA)
        pager = Pager(checkpoint, skeleton.entries, paging_device(CUDA))
        pager.page_cache = 0
        with pager.pages(range(N_LAYERS)) as pages:
            for page in pages:
                for name, tensor in page.tensors.items():
                    assert torch.equal(tensor.cpu(), stored[skeleton.layer_prefix(page.layer) + name])


@pytest.mark.parametrize("place", ["device", "host", "scratch"])
@pytest.mark.parametrize("slots", [2, 3, N_LAYERS])
def test_gradients_do_not_depend_on_where_layers_and_hidden_states_stay(place, slots, tmp_path):
    save_tiny(
        tmp_path / "in", "llama", dtype=torch.bfloat16, hidden_size=256, num_attention_heads=8, num_key_value_heads=4
    )
    runs = []
    for where, count in (("device", 2), (place, slots)):
        sweeper, grads = cuda_sweeper(tmp_path / "in", torch.bfloat16), []
        sweeper.place, sweeper.scratch, sweeper.pager.slots = where, tmp_path / "scratch", count
        statistics = Statistics(sweeper, token_ids(n=8, seq=48), range(1, N_LAYERS), 0)
        for draw in range(3):
            perturbation = Perturbation(0.05, (0, 0, draw))
            statistics.gradients(lambda ref, w, g, grads=grads: grads.append((ref.key, g.cpu())), perturbation)
        runs.append(grads)
    assert len(runs[0]) == len(runs[1])
    for (key, grad), (other, again) in zip(*runs, strict=True):
        assert key == other and torch.equal(grad, again)
