"""What run.py decides before and around a run: dtype, device, where models come from, memory for a method's state."""

import gc
import json
import re
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from cli_runner import cells, check_refusal, edit_tensors
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from streamprune import PruneConfig, evaluate, evaluate_tasks, prune
from streamprune.errors import CalibrationError, CheckpointError, UsageError
from streamprune.model.skeleton import Skeleton
from streamprune.paging.device import CudaDevice, compute_dtype, limit_memory
from streamprune.paging.pager import Pager
from streamprune.pipeline import run
from streamprune.storage.checkpoint import Checkpoint, resolve_model
from streamprune.streaming.perplexity import Perplexity


def test_the_compute_dtype_of_a_gpu_is_that_of_most_bytes(tmp_path):
    save_tiny(tmp_path, "llama", dtype=torch.float16)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(5)
    tensors["model.embeddings.position_ids"] = torch.arange(100_000)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with Checkpoint(tmp_path) as checkpoint:
        assert compute_dtype("auto", torch.device("cuda"), checkpoint) == torch.float16


@pytest.mark.parametrize("name,index", [("cuda", 0), ("cuda:1", 1)])
def test_a_gpu_is_limited_whether_its_number_is_said_or_not(name, index, monkeypatch):
    fractions = {}
    monkeypatch.setattr("torch.cuda.memory._lazy_init", lambda: None)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=80))
    take = {"name": "_cuda_setMemoryFraction", "value": lambda part, at: fractions.update({at: part})}
    monkeypatch.setattr(torch._C, **take, raising=False)  # not there in a build for CPUs
    limit_memory(torch.device(name), 20)
    assert fractions == {index: 0.25}
    for everything in (None, 100):
        limit_memory(torch.device(name), everything)
        assert fractions == {index: 1.0}


def test_a_hub_id_is_fetched_without_pickles_or_code(tmp_path, monkeypatch):
    asked = {}

    def fetch(model, **options):
        asked.update(model=model, **options)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert resolve_model("org/name") == tmp_path
    assert asked["model"] == "org/name"
    assert not any(pattern in asked["allow_patterns"] for pattern in ("*.bin", "*.py", "*.pt"))
    resolve_model("org/name", trust_remote_code=True)
    assert "*.py" in asked["allow_patterns"]


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), HTTPError("the connection was cut")])
def test_a_hub_id_that_cannot_be_fetched_is_one_error(error, monkeypatch):
    def fetch(model, **options):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    with pytest.raises(CheckpointError, match="org/name"):
        resolve_model("org/name")


def test_one_model_is_in_memory_at_a_time(tiny_llama, tmp_path, monkeypatch):
    from streamprune.streaming.perplexity import perplexity

    original, alive = perplexity, []

    def pagers():
        gc.collect()
        return sum(type(thing) is Pager for thing in gc.get_objects())

    def counted(sweeper, segments):
        alive.append(pagers() - others)
        return original(sweeper, segments)

    others = pagers()  # of other tests

    monkeypatch.setattr("streamprune.pipeline.run.perplexity", counted)
    prune(PruneConfig(model=str(tiny_llama), output=tmp_path / "out", method="magnitude"))
    assert alive == [1, 1]


def test_the_python_api_takes_strings_and_refuses_what_the_command_line_would(tiny_llama, tmp_path):
    options = {"model": str(tiny_llama), "output": str(tmp_path / "out")}
    text = tmp_path / "text.txt"
    text.write_text("A sentence of some words. " * 50)
    result = prune(PruneConfig(method="random", evaluate=str(text), **options))
    assert result.facts["perplexity"]["text"] == "text.txt"
    for wrong in ({"sampling": "frist"}, {"emit": "qwen", "stock": True}, {"seed": -1}, {"ratio": float("nan")}):
        with pytest.raises(UsageError):
            PruneConfig(**options, **wrong)


def test_a_llama_without_defaults_in_its_file_keeps_them_as_a_mistral(tmp_path):
    from transformers import AutoConfig

    save_tiny(tmp_path / "in", "llama", num_key_value_heads=6, num_attention_heads=6, max_position_embeddings=2048)
    file = tmp_path / "in" / "config.json"
    config = json.loads(file.read_text())
    for name in ("num_key_value_heads", "max_position_embeddings"):
        del config[name]
    file.write_text(json.dumps(config))
    options = {"method": "random", "ratio": 0.0, "stock": True, "emit": "mistral", "evaluate": False}
    prune(PruneConfig(model=str(tmp_path / "in"), output=tmp_path / "out", **options))
    written = AutoConfig.from_pretrained(tmp_path / "out")
    assert written.model_type == "mistral"
    assert (written.num_key_value_heads, written.max_position_embeddings, written.head_dim) == (6, 2048, 10)


def test_cuda_waits_are_on_the_streams_that_the_rules_name():
    """The rules themselves are proven in test_pager; this is the mapping to CUDA's streams, without a GPU."""

    class Stream:
        def __init__(self):
            self.waits = []

        def wait_event(self, event):
            self.waits.append(event)

        def record_event(self):
            return self

    device = CudaDevice.__new__(CudaDevice)
    device.compute, device.copies = Stream(), Stream()
    assert device.record_copied() is device.copies
    assert device.record_consumed() is device.compute
    device.compute_waits("copied")
    device.copy_waits("consumed")
    assert device.compute.waits == ["copied"] and device.copies.waits == ["consumed"]
    waited = []
    device.chunk_free(SimpleNamespace(synchronize=lambda: waited.append(True)))
    assert waited == [True]


def unmeasurable(path):
    """Make the model say one token with a certainty that has no perplexity for any other."""
    edit_tensors(path, lambda tensors: tensors["model.norm.weight"].mul_(1e5))


def test_a_model_without_a_perplexity_is_refused_before_the_work(streamprune, model, output):
    unmeasurable(model)
    result = streamprune("--model", model, "--output", output, "--method", "random", "--quiet")
    check_refusal(result, 1, ("the loss before pruning is", "no perplexity"), "pass --no-evaluate")


def test_an_output_without_a_perplexity_is_written_all_the_same(streamprune, model, output, monkeypatch):
    """What took hours is not thrown away for a figure."""
    measured = iter([Perplexity(10.0, 2.3, 1, 127), Perplexity(float("inf"), 707.3, 1, 127)])
    monkeypatch.setattr("streamprune.pipeline.run.perplexity", lambda sweeper, segments: next(measured))
    result = streamprune("--model", model, "--output", output, "--method", "random")
    assert result.code == 0 and "the loss after pruning is 707.3" in result.err + result.out
    written = (output / "streamprune.json").read_text()
    assert json.loads(written, parse_constant=pytest.fail)["perplexity"]["after"] is None
    assert streamprune("report", output).code == 0


def test_an_output_that_there_is_no_memory_to_measure_is_written_all_the_same(streamprune, model, output, monkeypatch):
    def measured(sweeper, segments):
        if sweeper.skeleton.checkpoint.path != model:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return Perplexity(10.0, 2.3, 1, 127)

    monkeypatch.setattr("streamprune.pipeline.run.perplexity", measured)
    result = streamprune("--model", model, "--output", output, "--method", "random")
    assert result.code == 0 and "out of memory while the result is measured: it is written" in result.err
    assert cells(result.out, "perplexity") == ["10.00", "-"]
    assert re.search(r"\| perplexity .*\| +10\.00 \| +- \|", (output / "README.md").read_text())
    AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True)
    for command in (["report", output], ["compare", output, output]):
        assert streamprune(*command).code == 0


@pytest.mark.parametrize(
    "given",
    [{"bos": "Never"}, {"dtype": "foo"}, {"seq_len": 1}, {"seq_len": "a"}, {"samples": 2.5}, {"micro_batch": 0}],
    ids=str,
)
def test_what_is_evaluated_takes_options_as_a_run_does(given, tiny_llama):
    with pytest.raises(UsageError, match=f"--{next(iter(given)).replace('_', '-')} "):
        evaluate(tiny_llama, **given)
    if not given.keys() & {"seq_len", "samples"}:
        with pytest.raises(UsageError, match=f"--{next(iter(given)).replace('_', '-')} "):
            evaluate_tasks(tiny_llama, "piqa", **given)


def test_a_text_is_evaluated_by_as_many_segments_at_once_as_is_said(tiny_llama, monkeypatch):
    original, counts = Skeleton.run_layer, set()

    def counted(self, index, weights, call, hidden):
        counts.add(len(hidden))
        return original(self, index, weights, call, hidden)

    monkeypatch.setattr(Skeleton, "run_layer", counted)
    evaluate(tiny_llama, dtype=torch.float32, samples=4, seq_len=32, micro_batch=2)
    assert counts == {2}


def test_what_a_method_without_a_text_does_not_use_is_said(streamprune, tiny_llama, tmp_path):
    options = ("--method", "magnitude", "--no-evaluate", "--calibration", "none.txt", "--samples", 3)
    result = streamprune("--model", tiny_llama, "--output", tmp_path / "out", *options)
    assert result.code == 0
    assert "magnitude is not calibrated: --calibration and --samples mean nothing to it" in result.err


def test_a_text_that_is_not_there_is_not_looked_for_on_the_hub(tiny_llama, monkeypatch):
    monkeypatch.setattr("streamprune.texts.data_sets.from_hub", lambda *given: pytest.fail("it was"))
    with pytest.raises(CalibrationError, match=r"novel\.pdf does not exist"):
        evaluate(tiny_llama, "novel.pdf", seq_len=32)


def test_beside_a_card_memory_is_what_lies_there_and_not_on_the_card(streamprune, tiny_llama):
    plan = ("plan", "--model", tiny_llama, "--assume", "l4", "--layers", "1:7", "--seq-len", 32)
    refused = streamprune(*plan, "--host-memory", "1MiB")
    assert refused.code == 1 and "of slots" not in refused.err and "of embeddings and head" not in refused.err


def test_the_result_is_measured_with_hidden_states_where_they_were_planned(tiny_llama, tmp_path, monkeypatch):
    seen, measure = [], run._perplexity

    def measured(sweeper, segments, when, progress):
        seen.append((when, sweeper.place, sweeper.scratch))
        return measure(sweeper, segments, when, progress)

    monkeypatch.setattr(run, "_perplexity", measured)
    monkeypatch.setattr("streamprune.planning.placement.places", lambda config, gpu: ["scratch"])
    options = {"samples": 4, "seq_len": 16, "layers": (1, 7), "scratch": tmp_path / "spill"}
    prune(PruneConfig(str(tiny_llama), tmp_path / "out", "random", **options))
    assert seen == [(when, "scratch", tmp_path / "spill") for when in ("before", "after")]
