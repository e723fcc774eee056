"""What users of transformers do with a checkpoint, done with outputs: stock and ragged ones of four families."""

import shutil
import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from marks import slow
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import save_tiny, token_ids
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from streamprune import PruneConfig, prune
from streamprune.output.ragged import RAGGED_FAMILIES

FAMILIES = ("llama", "qwen3", "gemma2", "phi3")
LAYOUTS = {"stock": {"stock": True}, "ragged": {"layers": (1, 3)}}
NEW = {"max_new_tokens": 6, "min_new_tokens": 6, "pad_token_id": 0}


@dataclass(frozen=True)
class Output:
    """An output, and its model in float32, which nobody changes."""

    path: Path
    model: torch.nn.Module

    def fresh(self, **options):
        return AutoModelForCausalLM.from_pretrained(self.path, dtype=torch.float32, **options).eval()


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Makes the output of a family and layout, once."""
    made = {}

    def make(family, layout):
        if (family, layout) not in made:
            path = tmp_path_factory.mktemp(f"{family}-{layout}")
            save_tiny(path / "in", family, dtype=torch.float32)
            options = {"ratio": 0.5, "evaluate": False, **LAYOUTS[layout]}
            result = prune(PruneConfig(str(path / "in"), path / "out", "magnitude", **options))
            assert result.layout == layout
            made[family, layout] = Output(result.output, AutoModelForCausalLM.from_pretrained(result.output).eval())
        return made[family, layout]

    return make


def quick_or_slow(family, layout):
    case = f"{family}-{layout}"
    return case if case in ("llama-stock", "qwen3-ragged") else slow(case)


@pytest.fixture(params=[quick_or_slow(family, layout) for family in FAMILIES for layout in LAYOUTS])
def output(request, outputs):
    return outputs(*request.param.split("-"))


def greedy(model, ids, **options):
    return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **NEW, **options)


def close(one, other):
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["dynamic", "static", "none", "beams", "assisted", "prompt lookup"])
@torch.no_grad()
def test_generating_repeats_what_whole_forwards_say(how, output):
    model, ids = output.model, token_ids(n=1 if how in ("assisted", "prompt lookup") else 3)
    ways = {
        "dynamic": {},
        "static": {"cache_implementation": "static"},
        "none": {"use_cache": False},
        "beams": {"num_beams": 3},
        "assisted": {"assistant_model": output.fresh()},
        "prompt lookup": {"prompt_lookup_num_tokens": 2},
    }
    tokens = greedy(model, ids, **ways[how])
    expected = ids
    if how == "beams":  # of the ends that beams may have, at least as likely as the greedy one
        likelihoods = []
        for sequence in (tokens, greedy(model, ids)):
            logs = model(sequence).logits[:, ids.shape[1] - 1 : -1].log_softmax(-1)
            likelihoods.append(logs.gather(-1, sequence[:, ids.shape[1] :, None]).sum(dim=(1, 2)))
        assert tokens.shape == (3, ids.shape[1] + 6) and float((likelihoods[0] - likelihoods[1]).sum()) > -1e-4
        return
    for _ in range(6):
        logits = model(expected).logits[:, -1:]
        logits[..., model.generation_config.eos_token_id] = -torch.inf  # it must not end yet
        expected = torch.cat([expected, logits.argmax(-1)], dim=1)
    assert torch.equal(tokens, expected)


def test_sampling_is_the_same_with_the_same_seed(output):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn.append(output.model.generate(token_ids(n=4), do_sample=True, **NEW))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_a_pipeline_writes_on(output):
    tokenizer = AutoTokenizer.from_pretrained(output.path)
    writer = pipeline("text-generation", model=str(output.path), dtype=torch.float32)
    text = tokenizer.decode(token_ids(n=1)[0])
    (made,) = writer(text, do_sample=False, max_new_tokens=4)
    ids = tokenizer(text, return_tensors="pt").input_ids
    tokens = output.model.generate(ids, do_sample=False, max_new_tokens=4)
    assert made["generated_text"] == text + tokenizer.decode(tokens[0, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def test_texts_of_different_lengths_are_padded_on_the_left(output):
    ids, padding = token_ids(n=2), 5
    batch = torch.zeros(2, ids.shape[1], dtype=torch.int64)
    batch[0], batch[1, padding:] = ids[0], ids[1, padding:]
    mask = torch.ones_like(batch)
    mask[1, :padding] = 0
    together = output.model.generate(batch, attention_mask=mask, do_sample=False, **NEW)
    for row, alone in enumerate((ids[:1], ids[1:, padding:])):
        assert torch.equal(together[row, ids.shape[1] :], greedy(output.model, alone)[0, alone.shape[1] :])


@torch.no_grad()
def test_attention_is_the_same_in_both_implementations(output):
    eager = output.fresh(attn_implementation="eager")
    if not eager._supports_sdpa:  # Gemma 2 caps its scores
        with pytest.raises(ValueError, match="scaled_dot_product_attention"):
            output.fresh(attn_implementation="sdpa")
        return
    close(eager(token_ids()).logits, output.fresh(attn_implementation="sdpa")(token_ids()).logits)


@torch.no_grad()
def test_layers_can_be_offloaded_to_disk(output, tmp_path):
    layers = len(output.model.model.layers)
    placed = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    placed |= {f"model.layers.{layer}": "disk" if layer % 2 else "cpu" for layer in range(layers)}
    model = output.fresh(device_map=placed, offload_folder=tmp_path)
    close(model(token_ids()).logits, output.model(token_ids()).logits)
    close(output.fresh(device_map="auto")(token_ids()).logits, output.model(token_ids()).logits)


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@torch.no_grad()
def test_what_is_saved_loads_again(shard_size, output, tmp_path):
    output.model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1 or shard_size == "20KB"
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(token_ids()).logits, output.model(token_ids()).logits)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
def test_an_adapter_is_trained_saved_loaded_and_merged(output, tmp_path):
    ids = token_ids(n=8)
    model = get_peft_model(output.fresh(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    arguments = TrainingArguments(
        tmp_path / "steps", max_steps=3, per_device_train_batch_size=4, learning_rate=0.02, report_to=[], use_cpu=True
    )
    rows = [{"input_ids": row, "labels": row} for row in ids]
    done = Trainer(model, arguments, train_dataset=rows).train()
    assert done.global_step == 3
    with torch.no_grad():
        trained = model.eval()(ids).logits
        assert float((trained - output.model(ids).logits).abs().max()) > 1e-3
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(output.fresh(), tmp_path / "adapter").eval()
        close(again(ids).logits, trained)
        merged = again.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        close(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, trained)


def test_a_trainer_lowers_the_loss_of_all_weights(output, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(output.path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.decode([0])
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    arguments = TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
    )
    rows = [{"input_ids": row.tolist()} for row in token_ids(n=1).expand(4, -1)]
    trainer = Trainer(output.fresh(), arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # of inductor's own
@pytest.mark.parametrize("backend,family", [("inductor", "llama"), ("aot_eager", "phi3")])
@torch.no_grad()
def test_it_compiles(backend, family, outputs):
    model = outputs(family, "ragged").fresh()
    model.model.layers = model.model.layers[:2]  # a whole and a pruned one: more take minutes
    expected = model(token_ids(), use_cache=False).logits
    torch.compiler.reset()
    close(torch.compile(model, backend=backend)(token_ids(), use_cache=False).logits, expected)


@torch.no_grad()
def test_it_loads_with_weights_of_eight_bits(output):
    quantisation = pytest.importorskip("torchao.quantization", reason="it slows every import of transformers")
    Int8WeightOnlyConfig = quantisation.Int8WeightOnlyConfig
    quantised = output.fresh(quantization_config=TorchAoConfig(Int8WeightOnlyConfig(version=2)), device_map="cpu")
    assert any("Int8" in type(parameter.data).__name__ for parameter in quantised.parameters())
    expected = output.model(token_ids()).logits
    error = (quantised(token_ids()).logits - expected).norm() / expected.norm()
    assert 0 < float(error) < 0.05


def test_what_is_pushed_to_a_hub_loads_from_there(output, tmp_path, monkeypatch):
    """The hub is a directory: what transformers would upload is copied there."""

    def commit(repo_id, operations, **options):
        for each in operations:
            source = Path(each.path_or_fileobj)
            (tmp_path / each.path_in_repo).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, tmp_path / each.path_in_repo)

    hub = SimpleNamespace(create_commit=commit, create_repo=lambda name, **options: SimpleNamespace(repo_id=name))
    for module in ("utils.hub", "modeling_utils"):
        monkeypatch.setattr(f"transformers.{module}.hf_api", lambda: hub)
    card = SimpleNamespace(save=lambda path: Path(path).write_text("# pruned\n"))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *given, **options: card)
    output.model.push_to_hub("somebody/pruned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(token_ids()).logits, output.model(token_ids()).logits)


def test_vllm_is_told_of_every_family(monkeypatch):
    """By the entry point that vLLM calls, with the class of its backend; the real one is in bench/vllm_outputs.py."""
    told = {}
    registry = SimpleNamespace(ModelRegistry=SimpleNamespace(register_model=told.__setitem__))
    monkeypatch.setitem(sys.modules, "vllm", registry)
    (entry,) = (each for each in entry_points(group="vllm.general_plugins") if each.name == "streamprune")
    entry.load()()
    assert told.keys() == {family.auto_map["AutoModelForCausalLM"] for family in RAGGED_FAMILIES.values()}
    assert set(told.values()) == {"vllm.model_executor.models.transformers:TransformersForCausalLM"}
