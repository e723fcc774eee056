"""Ragged outputs under other heads and adapters: classifiers, PEFT's prefixes, and what PEFT adapts by default."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from ragged_models import (
    BASE,
    FAMILIES,
    GROUPS,
    HEAD_DIM,
    Cut,
    dense_model,
    load,
    mask_dense,
    random_cuts,
    tokens,
    write_checkpoint,
)
from transformers import (
    AutoConfig,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    DynamicCache,
    PreTrainedModel,
)

from streamprune.output.ragged import register

# transformers 5.23 renames this method; peft has the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
PREFIX = 3
HEADS = {
    AutoModelForSequenceClassification: {"score.weight"},
    AutoModelForTokenClassification: {"score.weight", "score.bias"},
    AutoModelForQuestionAnswering: {"qa_outputs.weight", "qa_outputs.bias"},
}


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def make(root: Path, model_type: str, cuts: list[Cut] | None = None) -> tuple[Path, PreTrainedModel]:
    """A ragged checkpoint and the masked dense model."""
    cuts, model = cuts or random_cuts(model_type), dense_model(model_type)
    write_checkpoint(root / model_type, model, model_type, cuts)
    return root / model_type, mask_dense(model, model_type, cuts)


def with_head(auto: Any, path: Path, **options: Any) -> PreTrainedModel:
    """The model under a new head; nothing but the head is missing, nothing but the other head left over."""
    model, info = auto.from_pretrained(path, output_loading_info=True, dtype=torch.float32, **options)
    assert set(info["missing_keys"]) == HEADS[auto]
    assert set(info["unexpected_keys"]) <= {"lm_head.weight"} and not info["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_new_heads_are_given_the_hidden_states_of_the_masked_dense_model(model_type: str, tmp_path: Path) -> None:
    path, masked = make(tmp_path, model_type)
    hidden = masked.model(tokens()).last_hidden_state
    sequence: Any = with_head(AutoModelForSequenceClassification, path, num_labels=3)
    token: Any = with_head(AutoModelForTokenClassification, path, num_labels=5)
    answer: Any = with_head(AutoModelForQuestionAnswering, path)
    close = {"atol": 5e-5, "rtol": 1e-4}
    torch.testing.assert_close(sequence(tokens()).logits, sequence.score(hidden)[:, -1], **close)
    torch.testing.assert_close(token(tokens()).logits, token.score(hidden), **close)
    spans = answer(tokens())
    logits = torch.stack([spans.start_logits, spans.end_logits], dim=-1)
    torch.testing.assert_close(logits, answer.qa_outputs(hidden), **close)
    assert sequence.score.weight.shape == (3, BASE["hidden_size"]) and token.score.weight.shape[0] == 5


@pytest.mark.parametrize("auto", [AutoModelForSequenceClassification, AutoModelForTokenClassification])
def test_losses_are_those_of_the_family_s_own_classifier(auto: Any, tmp_path: Path) -> None:
    path, masked = make(tmp_path, "llama")
    config = AutoConfig.from_pretrained(path)
    for fields in (config, masked.config):
        fields.num_labels, fields.classifier_dropout = 3, 0.0
    dense = auto.from_config(masked.config)
    dense.model.load_state_dict(masked.model.state_dict())
    ragged: Any = with_head(auto, path, config=config)
    ragged.score.load_state_dict(dense.score.state_dict())
    labels = tokens() % 3 if auto is AutoModelForTokenClassification else torch.tensor([0, 2])
    losses = []
    for model in (ragged.train(), dense.train()):
        loss = model(tokens(), labels=labels).loss
        loss.backward()
        losses.append((loss, model.score.weight.grad, model.model.embed_tokens.weight.grad))
    for actual, expected in zip(*losses, strict=True):
        torch.testing.assert_close(actual, expected, atol=5e-5, rtol=1e-4)


def test_a_saved_classifier_loads_again(tmp_path: Path) -> None:
    path, _ = make(tmp_path, "qwen2")
    model: Any = with_head(AutoModelForSequenceClassification, path, num_labels=3)
    model.save_pretrained(tmp_path / "saved")
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(again.score.weight, model.score.weight)


def prefix_cache(adapted: Any, cuts: list[Cut]) -> DynamicCache:
    """The trained prefix as the masked dense model takes it: each layer's heads where the kept groups were."""
    trained = adapted.prompt_encoder["default"].embedding.weight.detach()
    layers = trained.view(PREFIX, len(cuts), 2, GROUPS, HEAD_DIM).permute(1, 2, 3, 0, 4)  # [layer, kv, head, …]
    cache = DynamicCache()
    for layer_idx, cut in enumerate(cuts):
        wide = torch.zeros(2, 1, GROUPS, PREFIX, HEAD_DIM)
        wide[:, 0, list(cut.groups)] = layers[layer_idx][:, : len(cut.groups)]
        cache.update(*wide.expand(2, len(tokens()), -1, -1, -1), layer_idx)
    return cache


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_trained_prefix_does_what_it_does_in_the_kept_heads_of_the_dense_model(
    model_type: str, tmp_path: Path
) -> None:
    cuts = random_cuts(model_type)
    if model_type.startswith("gemma"):
        cuts[0] = Cut((1, 2))  # PEFT itself gives a Gemma's layers their widths, and knows none without attention
    path, masked = make(tmp_path, model_type, cuts)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX)
    torch.manual_seed(0)
    adapted: Any = get_peft_model(load(path), config).eval()
    with torch.no_grad():
        actual = adapted(tokens()).logits
        expected = masked(tokens(), past_key_values=prefix_cache(adapted, cuts)).logits
        assert (expected - masked(tokens()).logits).abs().max() > 0.01
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-3)
        written = adapted.generate(input_ids=tokens(), max_new_tokens=5, do_sample=False, pad_token_id=0)
        whole = masked(written, past_key_values=prefix_cache(adapted, cuts)).logits
    assert torch.equal(whole[:, tokens().shape[1] - 1 : -1].argmax(-1), written[:, tokens().shape[1] :])


def test_a_prefix_is_trained(tmp_path: Path) -> None:
    path, _ = make(tmp_path, "llama")
    adapted: Any = get_peft_model(load(path), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PREFIX))
    adapted(tokens(), labels=tokens()).loss.backward()
    gradient = adapted.prompt_encoder["default"].embedding.weight.grad
    layers = gradient.view(PREFIX, len(random_cuts("llama")), -1).abs().sum(dim=(0, 2))
    assert [bool(layer > 0) for layer in layers] == [bool(cut.groups) for cut in random_cuts("llama")]


def adapted_modules(model: PreTrainedModel) -> set[str]:
    """The kinds of modules that LoRA adapts unless it is told."""
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
    return {name.split(".")[-2] for name, _ in adapted.named_modules() if name.endswith(".lora_A")}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_lora_adapts_by_default_what_it_adapts_in_the_dense_model(model_type: str, tmp_path: Path) -> None:
    path, masked = make(tmp_path, model_type)
    try:
        expected = adapted_modules(masked)
    except ValueError:  # PEFT has no default for the family
        expected = {"qkv_proj"} if model_type == "phi3" else {"q_proj", "v_proj"}
    assert adapted_modules(load(path)) == expected


FRESH_PROCESS = """
import sys
sys.modules["streamprune"] = None  # an import of it fails
import torch
import transformers

for path in sys.argv[1:]:
    for task in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        auto = getattr(transformers, f"AutoModelFor{task}")
        model = auto.from_pretrained(path, trust_remote_code=True)
        assert type(model).__name__.endswith(task), type(model)
        model.save_pretrained(f"{path}-{task}")
        auto.from_pretrained(f"{path}-{task}", trust_remote_code=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    from peft import LoraConfig, get_peft_model  # after the model is there
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM"))
"""


@pytest.mark.slow
def test_heads_and_adapters_need_no_streamprune_where_remote_code_is_trusted(tmp_path: Path) -> None:
    paths = [str(make(tmp_path, model_type)[0]) for model_type in ("llama", "gemma3_text")]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    environment |= {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH_PROCESS, *paths]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
