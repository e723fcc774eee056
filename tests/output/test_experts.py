"""Mixtral: what checkpoints hold for each expert is bound, scored, counted and written as it should be."""

import json
import math

import pytest
import torch
from marks import slow
from safetensors.torch import load_file
from tiny_models import EXPERTS, N_LAYERS, make_sweeper, save_tiny, token_ids, whole_model_gradients
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from streamprune import PruneConfig, prune
from streamprune.errors import CheckpointError, UsageError
from streamprune.pipeline.run import foretell
from streamprune.streaming.costs import Sizes, Task
from streamprune.streaming.statistics import Statistics

EXPERT = "block_sparse_moe.experts.2.w3.weight"
ATTENTION = [f"self_attn.{name}_proj.weight" for name in "qkvo"]


@pytest.fixture
def mixtral(tmp_path):
    save_tiny(tmp_path / "in", "mixtral", dtype=torch.float32)
    return tmp_path / "in"


def run(path, output, **options):
    defaults = {"method": "random", "evaluate": False, "seq_len": 16, "samples": 3}
    return prune(PruneConfig(model=str(path), output=output, **{**defaults, **options}))


@pytest.mark.parametrize("own", [False, True], ids=["in place", "own"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("compute", [torch.float32, torch.float64])
def test_bound_weights_are_the_parameters_that_transformers_loads(own, stored, compute, tmp_path):
    save_tiny(tmp_path, "mixtral", dtype=stored)
    assert f"model.layers.0.{EXPERT}" in load_file(tmp_path / "model.safetensors"), "the published form"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=compute)
    sweeper, seen, buffers = make_sweeper(tmp_path, dtype=compute), 0, set()
    for _ in range(2):  # the second time into a buffer that has been used
        with sweeper.pager.pages(range(N_LAYERS)) as pages:
            for page in pages:
                bound = sweeper.binder.bind(page, own=own)
                loaded = dict(model.model.layers[page.layer].named_parameters())
                assert bound.keys() == loaded.keys()
                for name, weight in bound.items():
                    assert weight.dtype == compute and torch.equal(weight, loaded[name]), name
                    seen += 1
                experts = bound["mlp.experts.down_proj"].untyped_storage()  # pieces are always copied
                buffers.add((experts.data_ptr(), experts.nbytes()))
    assert seen == 2 * N_LAYERS * 9
    assert [nbytes for _, nbytes in buffers] == [sweeper.binder.buffer_bytes]


def test_the_buffer_of_the_experts_is_counted_although_nothing_is_widened(mixtral, tmp_path):
    options = PruneConfig(str(mixtral), tmp_path / "out", "taylor", stock=True, ratio=0.4, evaluate=False, seq_len=16)
    sweeper = make_sweeper(mixtral, dtype=torch.float32)
    with sweeper.pager.pages([0]) as pages:
        held = sweeper.binder.bind(next(pages))["mlp.experts.down_proj"].untyped_storage().nbytes()
    experts = 4 * 3 * 40 * 48
    assert 4 * experts < held < 4 * 1.5 * experts
    for stage in foretell(options).placement.stages:
        assert stage.device["bound layer"] == held, stage.name


def test_flops_are_those_of_the_experts_that_a_token_passes(tmp_path):
    """Counted by torch in the whole model, where heads are as wide as the hidden states together."""
    save_tiny(tmp_path, "mixtral", dtype=torch.float32, head_dim=8)
    ids = token_ids(n=3, seq=16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager", **EXPERTS)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.model.layers[0](torch.randn(3, 16, 48), position_embeddings=(torch.ones(1, 16, 8), torch.zeros(1, 16, 8)))
    sweeper = make_sweeper(tmp_path, dtype=torch.float32)
    assert Task(Sizes(sweeper), tuple(ids.shape)).flops([0]) == counter.get_total_flops()


def test_a_gradient_sweep_holds_no_more_activations_than_are_counted(tmp_path):
    """What autograd saves of a layer, weights apart, where hidden states are wide enough for norms to be little."""
    from streamprune.methods.needs import GRADIENTS

    save_tiny(tmp_path, "mixtral", dtype=torch.float32, hidden_size=96, intermediate_size=336)
    sweeper, ids = make_sweeper(tmp_path, dtype=torch.float32), token_ids(n=2, seq=64)
    call, saved = sweeper.skeleton.record(ids)[0], {}
    with sweeper.pager.pages([0]) as pages:
        weights = sweeper.binder.bind(next(pages))
        scored = {name: weight.detach().requires_grad_(name in ATTENTION) for name, weight in weights.items()}
        own = {weight.untyped_storage().data_ptr() for weight in weights.values()}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = tensor  # alive, so that no other takes its place
            return tensor

        hidden = torch.randn(2, 64, 96, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            sweeper.skeleton.run_layer(0, scored, call, hidden)
    held = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    counted = GRADIENTS.cost(Task(Sizes(sweeper), (2, 64), micro_batch=2, layers=[0])).device["activations"]
    assert counted / 2 < held <= counted


@pytest.mark.parametrize("method", ["taylor", "magnitude"])
def test_layers_are_scored_by_their_attention_matrices(method, tmp_path):
    from streamprune.methods.sinks import LayerScores
    from streamprune.methods.table import METHODS, resolve_settings

    model, ids = save_tiny(tmp_path, "mixtral"), token_ids()
    sweeper = make_sweeper(tmp_path)
    sweeper.scope = "matrices"
    scores = LayerScores(range(N_LAYERS))
    statistics = Statistics(sweeper, ids, range(N_LAYERS), 0)
    METHODS[method].score(statistics, resolve_settings(method, {}, "layers"), scores)
    grads = whole_model_gradients(model, ids)
    for layer in range(N_LAYERS):
        matrices = {f"model.layers.{layer}.{name}": None for name in ATTENTION}
        weights = {name: model.get_parameter(name).detach() for name in matrices}
        if method == "taylor":
            expected = sum(float((weight * grads[name]).abs().sum()) for name, weight in weights.items())
        else:
            expected = math.sqrt(sum(float(weight.square().sum()) for weight in weights.values()))
        assert abs(scores.values[layer] - expected) <= 1e-9 * expected


@pytest.mark.parametrize(
    "options",
    [
        slow(("--stock", "--ratio", "0.4", "--method", "taylor")),
        slow(("--stock", "--ratio", "0.4", "--method", "wanda-sp")),
        ("--stock", "--ratio", "0.4", "--method", "random", "--compensate", "--compensate-tokens", "640"),
        slow(("--granularity", "layers", "--method", "taylor", "--layers", "0:4", "--ratio", "0.5")),
        slow(("--granularity", "layers", "--method", "layer-ppl", "--layers", "0:4", "--ratio", "0.25")),
    ],
    ids=" ".join,
)
def test_the_command_line_prunes_and_verify_passes(options, streamprune, mixtral, output):
    result = streamprune(
        "--model", mixtral, "--output", output, *options, "--seq-len", "32", "--samples", "3", "--quiet"
    )
    assert result.code == 0, result.err
    before, after = (load_file(path / "model.safetensors") for path in (mixtral, output))
    kept = json.loads((output / "streamprune.json").read_text())["kept"]
    layers = [int(layer) for layer in kept]
    whole = {f"model.layers.{layer}.{name}" for layer in layers for name in ATTENTION}
    for name, tensor in after.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str(layers[int(parts[2])])
        source = ".".join(parts)
        if "--stock" in options and source in whole:
            assert tensor.numel() * 3 == before[source].numel() * 2  # two of three KV groups
        else:
            assert torch.equal(tensor, before[source]), name
    assert len(after) == len(before) - (N_LAYERS - len(layers)) * (len(before) - 3) // N_LAYERS
    checked = streamprune("verify", output)
    assert checked.code == 0 and "FAILED" not in checked.out, checked


@pytest.mark.parametrize(
    ("options", "names"),
    [
        (("--stock", "--mlp-ratio", "0.3"), ("mixtral", "--mlp-ratio")),
        (("--stock", "--round-to", "8"), ("mixtral", "--round-to")),
        (("--stock", "--ratio", "0.1"), ("0.1", "3 KV groups")),
        (("--layers", "1:3", "--ratio", "0.4"), ("mixtral", "one width", "--stock (all layers, KV groups only)")),
        (("--allocation", "global", "--layers", "1:3"), ("mixtral", "one width", "--stock")),
        (("--granularity", "weights"), ("--granularity weights", "mixtral", "experts")),
        (("--granularity", "2:4"), ("--granularity 2:4", "mixtral", "experts")),
        (("--stock", "--compensate", "--compensate-target", "stream"), ("mixtral", "experts", "own")),
        (
            ("--granularity", "layers", "--layers", "0:4", "--compensate"),
            ("mixtral", "experts", "leave --compensate out"),
        ),
    ],
    ids=lambda value: " ".join(value) if str(value[0]).startswith("--") else "",
)
def test_what_experts_do_not_have_is_refused(options, names, refused, mixtral):
    remedy = r"\b(leave|pass|use|raise)\b"
    refused(mixtral, "--method", "magnitude", *options, code=2, names=names, remedy=remedy)


def test_the_plan_says_that_o_alone_is_fitted(mixtral, tmp_path):
    options = {"stock": True, "ratio": 0.4, "compensate": True, "evaluate": False, "seq_len": 16}
    text = foretell(PruneConfig(str(mixtral), tmp_path / "out", "taylor", **options)).text
    assert "o is then fitted anew to the layer's own output" in text


def test_biases_in_the_place_of_heads_are_refused(mixtral, tmp_path):
    with pytest.raises(UsageError, match="--no-bias"):
        run(mixtral, tmp_path / "out", method="flap", allocation="uniform", stock=True, ratio=0.4)
    result = run(
        mixtral, tmp_path / "out", method="flap", allocation="uniform", stock=True, ratio=0.4, settings={"bias": "no"}
    )
    assert result.layout == "stock"


@pytest.mark.parametrize(
    ("value", "dtype", "error"), [(math.nan, "float32", CheckpointError), (1e30, "float16", UsageError)]
)
def test_an_experts_bad_weight_is_named_as_it_is_stored(value, dtype, error, mixtral, tmp_path):
    from safetensors.torch import save_file

    file = mixtral / "model.safetensors"
    tensors = load_file(file)
    tensors[f"model.layers.1.{EXPERT}"][3, 4] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(error, match=f"layer 1, {EXPERT}"):
        run(mixtral, tmp_path / "out", method="taylor", stock=True, ratio=0.4, dtype=dtype)


def test_an_expert_that_is_missing_or_of_another_width_is_refused(mixtral, tmp_path):
    from safetensors.torch import save_file

    file = mixtral / "model.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.{EXPERT}"
    narrow = tensors | {name: tensors[name][:-1].clone()}
    missing = {key: tensor for key, tensor in tensors.items() if key != name}
    for damaged, message in ((narrow, r"is \[39, 48\]"), (missing, f"no tensor {name}")):
        save_file(damaged, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            run(mixtral, tmp_path / "out", stock=True)
