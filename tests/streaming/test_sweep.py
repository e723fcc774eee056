"""Streamed losses, hidden states and gradients equal those of the whole model under autograd."""

import weakref
from functools import partial
from itertools import chain
from pathlib import Path

import numpy
import pytest
import torch
from marks import slow
from tiny_models import (
    FAMILY_NAMES,
    N_LAYERS,
    make_sweeper,
    save_tiny,
    tiny_model,
    token_ids,
    whole_model_gradients,
)

from streamprune.methods.needs import GRADIENTS
from streamprune.model.units import TensorRef
from streamprune.streaming.binder import Perturbation
from streamprune.streaming.costs import Sizes, Task
from streamprune.streaming.gradients import GradientCollector, gradient_scale, watched
from streamprune.streaming.statistics import Statistics

LAYERS = range(1, N_LAYERS)


def collect(statistics, perturbation=None):
    """The loss and every gradient that a sweep hands over."""
    grads = {}

    def consume(ref, weight, grad):
        assert ref.key not in grads, "each tensor comes once"
        grads[ref.key] = grad.clone()

    return statistics.gradients(consume, perturbation), grads


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradients_equal_whole_model_autograd(family, tied, tmp_path):
    model = save_tiny(tmp_path, family, tied=tied)
    ids = token_ids(seq=20)  # longer than the sliding windows
    sweeper = make_sweeper(tmp_path)
    loss, grads = collect(Statistics(sweeper, ids, range(N_LAYERS), seed=0))
    expected = whole_model_gradients(model, ids)
    path = sweeper.skeleton.family.layers
    scored = [m.tensor for m in sweeper.skeleton.family.members if m.scored]
    names = {(layer, tensor): f"{path}.{layer}.{tensor}" for layer in range(N_LAYERS) for tensor in scored}
    names = {key: name for key, name in names.items() if name in expected}
    assert set(grads) == set(names)
    for key, name in names.items():
        scale = expected[name].abs().max()
        assert scale > 0
        assert (grads[key] - expected[name]).abs().max() <= 1e-10 * scale, name
    logits = model(ids).logits[:, :-1].detach()
    whole = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert abs(loss - whole.item()) <= 1e-12 * whole.item()


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
def test_micro_batches_give_the_same_gradients_to_rounding(micro_batch, tmp_path):
    save_tiny(tmp_path, "llama")
    ids = token_ids(n=5)
    whole = collect(Statistics(make_sweeper(tmp_path), ids, LAYERS, 0))[1]
    parts = collect(Statistics(make_sweeper(tmp_path, micro_batch=micro_batch), ids, LAYERS, 0))[1]
    for key, grad in whole.items():
        # Llama's norms compute in float32 whatever the model's dtype.
        torch.testing.assert_close(parts[key], grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("micro_batch,lowest", [(64, 0), (3, 1), slow(64, 1), slow(3, 0)])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradient_powers_are_sums_over_per_sample_gradients(family, micro_batch, lowest, tmp_path):
    model = save_tiny(tmp_path, family)
    ids = token_ids(n=4)
    sweeper, layers, found = make_sweeper(tmp_path, micro_batch=micro_batch), range(lowest, N_LAYERS), {}

    def consume(ref, weight, sums):
        assert ref.key not in found and set(sums) == {0, 1, 2}
        found[ref.key] = {power: value.clone() for power, value in sums.items()}

    loss = Statistics(sweeper, ids, layers, 0).gradient_powers(consume, (0, 1, 2))
    assert set(found) == set(collect(Statistics(sweeper, ids, layers, 0))[1])
    samples = [whole_model_gradients(model, ids[n : n + 1]) for n in range(len(ids))]
    path = sweeper.skeleton.family.layers
    for (layer, tensor), sums in found.items():
        per_sample = torch.stack([sample[f"{path}.{layer}.{tensor}"] for sample in samples])
        # The samples' gradients come from batches of another size, and the norms compute in float32.
        for value, expected in (
            (sums[0], per_sample.mean(0)),
            (sums[1], per_sample.abs().sum(0)),
            (sums[2], per_sample.square().sum(0)),
        ):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert abs(loss - collect(Statistics(sweeper, ids, layers, 0))[0]) < 1e-12
    assert not any(module._forward_hooks for layer in sweeper.skeleton.layers for module in layer.modules())


def test_perturbed_gradients_equal_those_of_a_perturbed_whole_model(tmp_path):
    from streamprune.kernels import noise_seed, perturb

    model = save_tiny(tmp_path, "mistral")
    ids = token_ids()
    key, sigma = (3, 1, 0), 0.05
    delta = {(2, "mlp.up_proj.weight"): torch.full((37, 48), 1e-3)}
    perturbation = Perturbation(sigma, key, delta)
    _, grads = collect(Statistics(make_sweeper(tmp_path), ids, LAYERS, 3), perturbation)
    with torch.no_grad():
        for layer in LAYERS:
            for name, weight in model.model.layers[layer].named_parameters():
                if weight.ndim == 2:
                    seed = noise_seed(*key, layer, name)
                    weight.copy_(
                        perturb(torch.empty_like(weight), weight.clone(), delta.get((layer, name)), sigma, seed)
                    )
    expected = whole_model_gradients(model, ids)
    for (layer, tensor), grad in grads.items():
        torch.testing.assert_close(grad, expected[f"model.layers.{layer}.{tensor}"], rtol=1e-9, atol=1e-14)


def test_sweeps_are_the_same_bits_each_time(tmp_path):
    save_tiny(tmp_path, "qwen2", dtype=torch.bfloat16)
    ids = token_ids()
    perturbation = Perturbation(0.05, (0, 0, 0))
    statistics = Statistics(make_sweeper(tmp_path, dtype=torch.float32), ids, LAYERS, 0)
    runs = [collect(statistics, perturbation) for _ in range(2)]
    fresh = Statistics(make_sweeper(tmp_path, dtype=torch.float32), ids, LAYERS, 0)
    runs.append(collect(fresh, perturbation))
    for loss, grads in runs[1:]:
        assert loss == runs[0][0]
        assert all(torch.equal(grads[key], runs[0][1][key]) for key in grads)


@pytest.mark.parametrize(("chunk", "readers"), [(4096, 1), (5000, 5), (1 << 24, 2)])
def test_the_size_of_reads_and_their_number_change_no_bit(chunk, readers, tmp_path, monkeypatch):
    save_tiny(tmp_path, "qwen3", dtype=torch.bfloat16)
    ids = token_ids()
    reference = collect(Statistics(make_sweeper(tmp_path, dtype=torch.float32), ids, LAYERS, 0))[1]
    monkeypatch.setattr("streamprune.paging.pager.CHUNK_BYTES", chunk)
    sweeper = make_sweeper(tmp_path, dtype=torch.float32)
    sweeper.pager.readers = readers
    grads = collect(Statistics(sweeper, ids, LAYERS, 0))[1]
    assert all(torch.equal(grads[key], reference[key]) for key in reference)


def test_a_columns_signed_score_is_its_inputs_times_their_gradients(tmp_path):
    """Σ_i W_ij g_ij = Σ_t x_tj ∂L/∂x_tj for the input x of a projection, seen by a hook in the whole model."""
    model = save_tiny(tmp_path, "mistral")
    ids, seen = token_ids(), {}

    def keep(name):
        def hook(module, inputs):
            inputs[0].retain_grad()
            seen[name] = inputs[0]

        return hook

    for layer in LAYERS:
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            module = model.get_submodule(f"model.layers.{layer}.{name}")
            module.register_forward_pre_hook(keep((layer, f"{name}.weight")))
    whole_model_gradients(model, ids)
    grads = collect(Statistics(make_sweeper(tmp_path), ids, LAYERS, 0))[1]
    for (layer, tensor), x in seen.items():
        weight = model.get_parameter(f"model.layers.{layer}.{tensor}").detach()
        signed = (weight * grads[layer, tensor]).sum(dim=0)
        torch.testing.assert_close(signed, (x * x.grad).sum(dim=(0, 1)).detach(), rtol=1e-6, atol=1e-10)


def test_a_tied_checkpoint_may_store_either_name(tmp_path):
    from safetensors.torch import load_file, save_file

    save_tiny(tmp_path, "llama", tied=True)
    ids, file = token_ids(), tmp_path / "model.safetensors"
    expected = collect(Statistics(make_sweeper(tmp_path), ids, LAYERS, 0))[0]
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, file)
    assert collect(Statistics(make_sweeper(tmp_path), ids, LAYERS, 0))[0] == expected


def test_head_in_chunks_equals_the_whole_head(tmp_path, monkeypatch):
    model = save_tiny(tmp_path, "gemma2", tied=True)
    ids = token_ids(n=3, seq=16)
    sweeper = make_sweeper(tmp_path)
    hidden = sweeper.forward(ids)
    whole, whole_grad = sweeper.head_loss(hidden, ids, with_grad=True)
    for tokens in (1, 7, 20):
        monkeypatch.setattr("streamprune.model.skeleton.LOGITS_BYTES", tokens * 4 * model.config.vocab_size)
        loss, grad = sweeper.head_loss(hidden, ids, with_grad=True)
        assert abs(loss - whole) < 1e-10
        torch.testing.assert_close(grad, whole_grad, rtol=1e-6, atol=1e-9)


def test_a_sweep_reads_each_layer_once(tmp_path):
    save_tiny(tmp_path, "llama")
    statistics = Statistics(make_sweeper(tmp_path), token_ids(), LAYERS, 0)
    checkpoint, sizes = statistics.sweeper.skeleton.checkpoint, []
    pager = statistics.sweeper.pager
    passes = GRADIENTS.passes(Task(Sizes(statistics.sweeper), (3, 12), layers=LAYERS, sweeps=2))
    for orders in (passes[:2], passes[2:]):
        read = pager.to_read((order, "back") for order in orders)
        foretold = sum(map(pager.bytes_of, chain.from_iterable(read)))
        before = checkpoint.bytes_read
        collect(statistics)
        sizes.append(checkpoint.bytes_read - before)
        assert sizes[-1] == foretold
    # Two slots hold the two layers at each turn.
    layers, above = pager.layer_bytes(), sum(map(pager.bytes_of, range(LAYERS[0], N_LAYERS)))
    assert sizes[0] == layers + above - 2 * pager.bytes_of(0)
    assert sizes[1] == 2 * above - 4 * pager.bytes_of(0)


def test_layers_split_over_shards_and_base_model_names_are_read(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_model("gpt2", tied=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    ids = token_ids()
    sharded = collect(Statistics(make_sweeper(tmp_path), ids, LAYERS, 0))[1]
    tensors = {}
    for file in Path(tmp_path).glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (tmp_path / "model.safetensors.index.json").unlink()
    # As the published GPT-2 names them.
    save_file({k.removeprefix("transformer."): v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    plain = collect(Statistics(make_sweeper(tmp_path), ids, LAYERS, 0))[1]
    assert all(torch.equal(sharded[key], plain[key]) for key in sharded)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_do_not_underflow_in_half_precision(dtype, tmp_path):
    save_tiny(tmp_path, "llama", dtype=torch.float32)
    ids = token_ids(n=5, seq=40)
    exact = collect(Statistics(make_sweeper(tmp_path), ids, LAYERS, 0))[1]
    _, rough = collect(Statistics(make_sweeper(tmp_path, dtype=dtype), ids, LAYERS, 0))
    for key, grad in exact.items():
        assert rough[key].dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(rough[key].double().flatten(), grad.flatten(), dim=0)
        assert cosine > 0.99, (key, cosine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_graphs_that_are_kept_change_no_bit_and_save_the_recomputing(family, dtype, tmp_path):
    save_tiny(tmp_path, family)
    ids, layers, seen = token_ids(n=5, seq=12), range(1, N_LAYERS), []
    for graphs in (0, 2, N_LAYERS):
        sweeper, found, calls = make_sweeper(tmp_path, dtype=dtype, micro_batch=2), {}, []
        sweeper.graphs, run_layer = graphs, sweeper.skeleton.run_layer
        sweeper.skeleton.run_layer = lambda *given, run=run_layer, calls=calls: calls.append(given[0]) or run(*given)
        statistics = Statistics(sweeper, ids, layers, 0)

        def consume(ref, weight, grad, found=found):
            found["mean", ref.key] = grad.clone(), weight.clone()

        def consume_powers(ref, weight, sums, found=found):
            found["powers", ref.key] = sums[0].clone(), sums[2].clone()

        statistics.gradients(consume, Perturbation(0.05, (0, 0, 0)))
        statistics.gradient_powers(consume_powers, (0, 2))
        first, again = N_LAYERS + N_LAYERS - 1, 2 * (N_LAYERS - 1)  # layers of a sweep and of the next one
        assert len(calls) == 3 * (first + again - 2 * min(graphs, N_LAYERS - 1)), "of three micro-batches each"
        seen.append(found)
    assert seen[0].keys() == seen[1].keys() == seen[2].keys()
    for other in seen[1:]:
        for key, pair in seen[0].items():
            assert all(torch.equal(a, b) for a, b in zip(pair, other[key], strict=True)), key


@pytest.fixture
def from_ends(monkeypatch):
    """Weight gradients are made of the Linears' ends, as on a GPU in half precision."""
    monkeypatch.setattr("streamprune.streaming.gradients.sums_halves", lambda tensor: True)


@pytest.mark.parametrize("micro_batch,lowest", [(2, 1), slow(64, 0)])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_gradients_from_ends_equal_whole_model_autograd(family, micro_batch, lowest, tmp_path, from_ends):
    model, ids = save_tiny(tmp_path, family), token_ids(n=3)
    sweeper = make_sweeper(tmp_path, micro_batch=micro_batch)
    layers = range(lowest, N_LAYERS)
    _, grads = collect(Statistics(sweeper, ids, layers, 0))
    expected, path = whole_model_gradients(model, ids), sweeper.skeleton.family.layers
    assert set(grads) == {ref.key for layer in layers for ref in sweeper.scored[layer].values()}
    for (layer, tensor), grad in grads.items():
        whole = expected[f"{path}.{layer}.{tensor}"]
        # Norms compute in float32 whatever the model's dtype, and here other sequences together.
        torch.testing.assert_close(grad, whole, rtol=1e-5, atol=1e-6 * float(whole.abs().max()))
    assert not any(module._forward_hooks for layer in sweeper.skeleton.layers for module in layer.modules())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_from_half_ends_are_not_rounded_to_half(dtype, family, tmp_path, from_ends):
    """Σ dYᵀX over micro-batches, in float64 from what hooks of the modules see."""
    save_tiny(tmp_path, family, dtype=torch.float32)
    sweeper, ids = make_sweeper(tmp_path, dtype=dtype, micro_batch=2), token_ids(n=5)
    expected, hooks = {}, []

    def watch(key, transposed):
        def add(x, dy):
            ends = [end.double().flatten(0, -2) for end in ((dy, x) if transposed else (x, dy))]
            expected[key] = expected.get(key, 0) + ends[1].T @ ends[0] / gradient_scale(dtype)

        def after(module, given, output):
            if output.requires_grad:
                x = given[0].detach().clone()
                output.register_hook(lambda dy: add(x, dy))

        return after

    for layer in LAYERS:
        for name, ref in sweeper.scored[layer].items():
            module = sweeper.skeleton.layers[layer].get_submodule(name.removesuffix(".weight"))
            hooks.append(module.register_forward_hook(watch(ref.key, ref.transposed)))
    _, grads = collect(Statistics(sweeper, ids, LAYERS, 0))
    for hook in hooks:
        hook.remove()
    assert set(grads) == set(expected)
    for key, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - expected[key]).abs().max() <= 1e-6 * expected[key].abs().max(), key


def test_a_linears_input_is_let_go_of_with_its_gradient(from_ends):
    """The output, and with it the graph's nodes, is there until the next micro-batch is through."""
    layer, memory, found = torch.nn.Sequential(torch.nn.Linear(3, 2)), numpy.ones((4, 3), dtype=numpy.float32), []
    alive, ref, weight = weakref.ref(memory), TensorRef(0, "0.weight", None, None), layer[0].weight.detach()
    collector = GradientCollector(lambda *handed: found.append(handed), ref, weight, 1)
    with watched(layer, {"0.weight": weight}, [collector]) as bound:
        given = torch.from_numpy(memory)
        output = torch.func.functional_call(layer, bound, given)  # its bias makes a graph
        del memory, given
        assert alive() is not None
        output.sum().backward()
    assert alive() is None
    assert torch.equal(found[0][2], torch.full((2, 3), 4.0)) and output.requires_grad


@pytest.mark.parametrize("hidden_size", [48, slow(240)])
@pytest.mark.parametrize("seq", [16, slow(60)])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_bytes_of_a_kept_graph_are_counted(family, seq, hidden_size, tmp_path):
    save_tiny(tmp_path, family, dtype=torch.float32, hidden_size=hidden_size)
    sweeper, saved = make_sweeper(tmp_path, dtype=torch.float32, micro_batch=2), {}
    sweeper.graphs = 1

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        collector = partial(GradientCollector, lambda ref, weight, grad: None)
        sweeper.forward_keeping(token_ids(n=4, seq=seq), 1, prunable=range(1, N_LAYERS), collector=collector)
    elsewhere = {states.untyped_storage().data_ptr() for states in sweeper._kept}
    held = sum(nbytes for pointer, nbytes in saved.items() if pointer not in elsewhere)
    held += sum(output.nbytes for _, _, output in sweeper._graphs[N_LAYERS - 1].runs)
    task = Task(Sizes(sweeper), (4, seq), micro_batch=2, layers=range(1, N_LAYERS), graphs=1)
    assert held <= GRADIENTS.cost(task).device["graphs of layers"] <= 2 * held
