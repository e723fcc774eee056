"""Adapters: gradients by sweeps, PEFT's files both ways, and those of other models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from ragged_models import BASE, dense_model, random_cuts, write_checkpoint
from safetensors.torch import load_file, save_file
from tiny_models import make_sweeper, save_tiny, token_ids
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from streamprune.errors import StreampruneError, UsageError
from streamprune.model.skeleton import Skeleton
from streamprune.recovery.course import objective_of
from streamprune.recovery.lora import (
    Adapter,
    new_adapter,
    peft_config,
    peft_name,
    peft_tensors,
    read_adapter,
    write_adapter,
)
from streamprune.recovery.streamed import AttachedAdapter

SEQUENCES, SEQ = 5, 12
# transformers 5.23 renames this; peft has the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def random_adapter(skeleton: Skeleton, rank: int = 4) -> Adapter:
    """An adapter whose B is random too."""
    adapter = new_adapter(skeleton, rank, 16.0, 1)
    generator = torch.Generator().manual_seed(3)
    for _, b in adapter.pairs.values():
        b.copy_(0.1 * torch.randn(b.shape, generator=generator))
    return adapter


def with_peft(model: Any, skeleton: Skeleton, adapter: Adapter) -> Any:
    config = peft_config(skeleton, adapter, None)
    config.inference_mode = False
    adapted = get_peft_model(model, config)
    assert not set_peft_model_state_dict(adapted, peft_tensors(skeleton, adapter)).unexpected_keys
    return adapted


def labelled() -> tuple[Tensor, Tensor]:
    """Tokens and labels of which some are not counted; of the smallest vocabulary."""
    ids = token_ids(SEQUENCES, SEQ) % BASE["vocab_size"]
    labels = ids.clone()
    labels[0, :5] = labels[2, 9:] = -100
    return ids, labels


def gradients_by_sweeps(path: Path, adapter: Adapter, **options: Any) -> float:
    sweeper = make_sweeper(path, dtype=torch.float32, micro_batch=2)
    ids, labels = labelled()
    attached = AttachedAdapter(sweeper, adapter, **options)
    count = int((labels[:, 1:] != -100).sum())
    with attached.attached():
        return attached.gradients(0, ids, objective_of(labels, torch.device("cpu")), count)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt2", "mixtral"])
def test_streamed_gradients_are_peft_s(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / family, family, dtype=torch.float32)
    _compare_with_peft(tmp_path / family, model)


def test_streamed_gradients_of_a_ragged_checkpoint_are_peft_s(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ragged", dense_model("llama"), "llama", random_cuts("lora"))
    _compare_with_peft(tmp_path / "ragged", AutoModelForCausalLM.from_pretrained(tmp_path / "ragged"))


def _compare_with_peft(path: Path, model: Any) -> None:
    skeleton = make_sweeper(path, dtype=torch.float32).skeleton
    adapter = random_adapter(skeleton)
    loss = gradients_by_sweeps(path, adapter)
    ids, labels = labelled()
    adapted = with_peft(model, skeleton, adapter)
    logits = adapted(ids, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    theirs = {name: parameter.grad for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    mine = {
        f"{peft_name(skeleton, key)}.lora_{letter}.default.weight": each.grad
        for key, pair in adapter.pairs.items()
        for letter, each in zip("AB", pair, strict=True)
    }
    assert mine.keys() == theirs.keys()
    for name, grad in theirs.items():
        assert (mine[name] - grad).norm() <= 1e-6 * grad.norm(), name


def test_dropout_is_the_same_there_and_back_and_another_in_the_next_step(tiny_llama: Path) -> None:
    """The loss is a function of A and B: its gradient is the difference quotient, which another draw would not give."""
    sweeper = make_sweeper(tiny_llama, dtype=torch.float64, micro_batch=2)
    adapter = random_adapter(sweeper.skeleton)
    ids, labels = labelled()
    objective, count = objective_of(labels, torch.device("cpu")), int((labels[:, 1:] != -100).sum())

    def loss(step: int = 0) -> float:
        attached = AttachedAdapter(sweeper, adapter, dropout=0.3, seed=5)
        with attached.attached():
            return attached.gradients(step, ids, objective, count)

    assert loss() == loss() != loss(1)
    for key in ((2, "mlp.up_proj.weight"), (7, "self_attn.q_proj.weight")):
        a, _ = adapter.pairs[key]
        a.grad = None
        loss()
        assert a.grad is not None
        direction, step = a.grad.clone(), 2e-3  # norms of the model compute in float32, so a smaller one is all noise
        at = a.clone()
        a.copy_(at + step * direction)
        above = loss()
        a.copy_(at - step * direction)
        below = loss()
        a.copy_(at)
        assert (above - below) / (2 * step) == pytest.approx(float(direction.square().sum()), rel=1e-3)


def test_an_adapter_that_is_kept_is_loaded_by_peft_and_read_again(tiny_llama: Path, tmp_path: Path) -> None:
    sweeper = make_sweeper(tiny_llama, dtype=torch.float32)
    adapter = random_adapter(sweeper.skeleton)
    write_adapter(tmp_path, sweeper.skeleton, adapter, str(tiny_llama), 0.05)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), tmp_path)
    ids = token_ids()
    with AttachedAdapter(sweeper, adapter).attached():
        hidden = sweeper.forward(ids)
        mine = sweeper.skeleton.head(hidden)
    torch.testing.assert_close(mine, loaded(ids).logits, atol=1e-5, rtol=1e-5)
    again = read_adapter(tmp_path, sweeper.skeleton)
    assert again.alpha == adapter.alpha
    assert all(x.equal(y) for x, y in zip(again.parameters, adapter.parameters, strict=True))


def test_a_new_adapter_is_as_peft_s_of_the_same_shape(tiny_llama: Path) -> None:
    adapter = new_adapter(make_sweeper(tiny_llama).skeleton, 8, 16.0, 0)
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_llama),
        LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    shapes = {name: p.shape for name, p in theirs.named_parameters() if p.requires_grad}
    skeleton = make_sweeper(tiny_llama).skeleton
    assert {
        name.replace(".weight", ".default.weight"): each.shape for name, each in peft_tensors(skeleton, adapter).items()
    } == shapes
    for a, b in adapter.pairs.values():
        bound = a.shape[1] ** -0.5
        assert not b.any() and 0.9 * bound < a.abs().max() <= bound


Damage = Callable[[dict[str, Any], dict[str, Tensor]], object]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "dora": (lambda config, tensors: config.update(use_dora=True), "has use_dora true"),
    "biases": (lambda config, tensors: config.update(bias="all"), 'has bias "all"'),
    "alphas": (lambda config, tensors: config.update(alpha_pattern={"q_proj": 3}), "has alpha_pattern"),
    "another beginning": (lambda config, tensors: config.update(init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "kasa": (lambda config, tensors: config.update(kasa_config={"beta": 1}), "has kasa_config"),
    "layers twice": (
        lambda config, tensors: config.update(layer_replication=[[0, 4], [2, 5]]),
        "has layer_replication",
    ),
    "no alpha": (lambda config, tensors: config.update(lora_alpha=torch.nan), "has lora_alpha NaN"),
    "another kind": (lambda config, tensors: config.update(peft_type="IA3"), "is a IA3 adapter"),
    "a module less": (lambda config, tensors: tensors.pop(next(iter(tensors))), "has none for layer"),
    "a module more": (
        lambda config, tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 48)}),
        "adapts lm_head",
    ),
    "NaN": (lambda config, tensors: next(iter(tensors.values())).fill_(torch.nan), "NaN"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_other_adapters_are_refused(what: str, tiny_llama: Path, tmp_path: Path) -> None:
    skeleton = make_sweeper(tiny_llama, dtype=torch.float32).skeleton
    write_adapter(tmp_path, skeleton, random_adapter(skeleton), "base", 0.0)
    config, tensors = (
        json.loads((tmp_path / "adapter_config.json").read_text()),
        load_file(tmp_path / "adapter_model.safetensors"),
    )
    damage, message = DAMAGES[what]
    damage(config, tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(StreampruneError, match=message):
        read_adapter(tmp_path, skeleton)


def test_an_adapter_whose_config_says_little_is_plain(tiny_llama: Path, tmp_path: Path) -> None:
    skeleton = make_sweeper(tiny_llama, dtype=torch.float32).skeleton
    write_adapter(tmp_path, skeleton, random_adapter(skeleton), "base", 0.0)
    config = {"peft_type": "LORA", "lora_alpha": 8, "r": 4, "init_lora_weights": "gaussian"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert read_adapter(tmp_path, skeleton).alpha == 8


def test_an_adapter_of_other_widths_is_refused_with_layer_and_shapes(tiny_llama: Path, tmp_path: Path) -> None:
    save_tiny(tmp_path / "wide", "llama", dtype=torch.float32, num_hidden_layers=8, intermediate_size=40)
    other = make_sweeper(tmp_path / "wide", dtype=torch.float32).skeleton
    write_adapter(tmp_path, other, random_adapter(other), "base", 0.0)
    skeleton = make_sweeper(tiny_llama, dtype=torch.float32).skeleton
    with pytest.raises(UsageError, match=r"is of other widths: layer 0, mlp\.gate_proj") as refused:
        read_adapter(tmp_path, skeleton)
    assert "wants B [37, 4] and A [4, 48], it has [40, 4] and [4, 48]" in str(refused.value)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(StreampruneError, match="has no adapter_model"):
        read_adapter(tmp_path, skeleton)
