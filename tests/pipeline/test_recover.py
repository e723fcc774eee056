"""`streamprune recover` as a user runs it: what comes out, what is refused, and runs that are cut short."""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runner import Streamprune, check_refusal, edit_tensors, snapshot
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny, token_ids
from trainings import FAST, IN_MEMORY, STREAMED, interrupted
from transformers import AutoModelForCausalLM, AutoTokenizer

import streamprune as package
from streamprune.pipeline import recovery_work
from streamprune.pipeline.source import Source
from streamprune.storage.directory import OWN_FILE
from streamprune.streaming.perplexity import Perplexity
from streamprune.streaming.sweeper import Sweeper

# transformers 5.23 renames this; peft has the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("The harbour was quiet in the morning, and the boats lay still. " * 20)
    return file


@pytest.fixture
def ragged(streamprune: Streamprune, tiny_llama: Path, tmp_path: Path) -> Path:
    options = ("--layers", "2:6", "--method", "magnitude", "--ratio", "0.4", "--no-evaluate", "--quiet")
    assert streamprune("--model", tiny_llama, "--output", tmp_path / "ragged", *options).code == 0
    return tmp_path / "ragged"


@pytest.mark.parametrize("way", [IN_MEMORY, STREAMED])
def test_a_recovered_checkpoint_keeps_its_layout_and_predicts_the_text_better(
    way: tuple[str, ...], streamprune: Streamprune, ragged: Path, text: Path, output: Path
) -> None:
    before = snapshot(ragged)
    options = ("--cutoff", 32, "--batch", 8, "--learning-rate", 0.01, "--quiet", "--evaluate", text)
    done = streamprune("recover", "--model", ragged, "--data", text, "--output", output, *options, *way)
    assert done.code == 0, done.err
    assert snapshot(ragged) == before
    facts, source = (json.loads((each / OWN_FILE).read_text()) for each in (output, ragged))
    recovery = facts.pop("recovery")
    assert facts == source  # what pruning did
    for name in ("loss", "perplexity"):
        assert recovery[name]["after"] < 0.8 * recovery[name]["before"]
        assert f"{recovery[name]['after']:.2f}" in done.out
    assert recovery["perplexity"]["after"] == pytest.approx(
        package.evaluate(output, text, seq_len=64, samples=recovery["perplexity"]["segments"][0]).perplexity
    )
    names = {path.name for path in output.iterdir()}
    assert names == {path.name for path in ragged.iterdir()} - {"streamprune.scores"} | {"recovery.jsonl"}
    assert (output / "config.json").read_bytes() == (ragged / "config.json").read_bytes()
    card = (output / "README.md").read_text()
    assert card.startswith((ragged / "README.md").read_text()) and "## Recovery" in card
    steps = [json.loads(line) for line in (output / "recovery.jsonl").read_text().splitlines()]
    assert steps[-1]["loss"] < steps[0]["loss"] and f"{len(steps):,} steps of 8" in card
    assert AutoModelForCausalLM.from_pretrained(output).config.per_layer_config
    check_refusal(streamprune("verify", output), 1, ("was trained after pruning",))


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gpt2"])
def test_what_is_merged_is_peft_s_merge_and_what_is_kept_merges_to_it(
    family: str, streamprune: Streamprune, data: Path, output: Path, tmp_path: Path
) -> None:
    save_tiny(tmp_path / family, family, dtype=torch.float32, tied=True)
    options = ("--model", tmp_path / family, "--data", data, *FAST, "--field", "output", "--streamed")
    assert streamprune("recover", *options, "--output", tmp_path / "adapter", "--adapter").code == 0
    assert streamprune("recover", *options, "--output", output).code == 0
    again = ("--model", tmp_path / family, "--merge", tmp_path / "adapter", "--quiet", "--no-evaluate")
    assert streamprune("recover", *again, "--output", tmp_path / "again").code == 0
    merged = load_file(output / "model.safetensors")
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (output / "model.safetensors").read_bytes()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / family)
    adapted = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = token_ids()
    logits = adapted(ids).logits
    for name, expected in adapted.merge_and_unload().state_dict().items():
        if name in merged:
            torch.testing.assert_close(merged[name], expected, atol=1e-7, rtol=1e-6)
    mine = AutoModelForCausalLM.from_pretrained(output)(ids).logits
    torch.testing.assert_close(mine, logits, atol=1e-4, rtol=1e-4)


def test_the_adapter_directory_loads_by_itself(
    streamprune: Streamprune, ragged: Path, data: Path, output: Path
) -> None:
    from peft import AutoPeftModelForCausalLM

    options = ("--model", ragged, "--data", data, *FAST, "--field", "output", "--adapter")
    assert streamprune("recover", *options, "--output", output).code == 0
    model = AutoPeftModelForCausalLM.from_pretrained(output)
    assert any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)
    card = (output / "README.md").read_text()
    assert "library_name: peft" in card and "AutoPeftModelForCausalLM" in card
    check_refusal(streamprune("eval", "--model", output), 1, ("holds a PEFT adapter",))


def test_training_goes_on_from_an_adapter(streamprune: Streamprune, model: Path, data: Path, output: Path) -> None:
    first = output.with_name("first")
    options = ("--model", model, "--data", data, *FAST, "--field", "output", "--adapter")
    assert streamprune("recover", *options, "--like", "bernoulli", "--output", first).code == 0
    assert json.loads((first / "adapter_config.json").read_text())["r"] == 16
    assert streamprune("recover", *options, "--init-adapter", first, "--output", output).code == 0
    config = json.loads((output / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (16, 10)
    ends, begins = (
        [json.loads(line)["loss"] for line in (each / "recovery.jsonl").read_text().splitlines()][at]
        for each, at in ((first, 0), (output, 0))
    )
    assert begins < ends - 1


def test_a_model_whose_weights_transformers_does_not_find_is_trained_streamed_alone(
    streamprune: Streamprune, model: Path, data: Path, output: Path
) -> None:
    """Tensors of a wrapped model: transformers would draw them at random."""

    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        named = {f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(named)

    edit_tensors(model, wrap)
    options = ("recover", "--model", model, "--data", data, *FAST, "--field", "output", "--steps", 1)
    check_refusal(streamprune(*options, "--output", output), 1, (str(model), "transformers finds no"), "--streamed")
    assert streamprune(*options, "--output", output, "--streamed").code == 0


def test_a_card_in_another_encoding_does_not_end_a_training(
    streamprune: Streamprune, ragged: Path, data: Path, output: Path
) -> None:
    (ragged / "README.md").write_bytes((ragged / "README.md").read_bytes() + "café".encode("latin-1"))
    options = ("recover", "--model", ragged, "--data", data, *FAST, "--field", "output", "--steps", 1)
    assert streamprune(*options, "--output", output).code == 0


def test_models_are_opened_one_at_a_time_and_their_hidden_states_stay_where_they_fit(
    streamprune: Streamprune, model: Path, data: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, places, open_source = [], [], Source.open

    @contextmanager
    def watched(self: Source, *given: Any) -> Iterator[Sweeper]:
        with open_source(self, *given) as sweeper:
            assert self.planned is not None or not opened
            opened.append(sweeper)
            yield sweeper
            opened.remove(sweeper)
            if self.planned is None:
                places.append((sweeper.place, sweeper.scratch))

    def place(sweeper: Sweeper, *given: Any, **more: Any) -> str:
        sweeper.place, sweeper.scratch = "scratch", tmp_path / "scratch"
        return "planned"

    monkeypatch.setattr(Source, "open", watched)
    monkeypatch.setattr(recovery_work, "place_training", place)
    options = (*FAST, "--field", "output", "--steps", 2, "--streamed", "--distill", model, "--adapter")
    run = ("recover", "--model", model, "--data", data, "--output", output, *options, "--scratch", tmp_path / "scratch")
    assert streamprune(*run).code == 0
    assert len(places) == 5 and set(places) == {("scratch", tmp_path / "scratch")}


def test_a_failure_leaves_nothing_at_the_output(
    streamprune: Streamprune, model: Path, data: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(monkeypatch, 2)
    done = streamprune("recover", "--model", model, "--data", data, *FAST, "--field", "output", "--output", output)
    assert done.code == 1
    assert not list(output.parent.iterdir())


def test_a_result_that_there_is_no_memory_to_measure_is_written_all_the_same(
    streamprune: Streamprune, model: Path, data: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(sweeper: Any, segments: Any) -> Any:
        if sweeper.skeleton.checkpoint.path != model:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return Perplexity(10.0, 2.3, 1, 127)

    monkeypatch.setattr("streamprune.pipeline.recover.perplexity", measured)
    options = ("--field", "output", *FAST[:6], "--steps", 1)
    result = streamprune("recover", "--model", model, "--data", data, "--output", output, *options)
    assert result.code == 0 and "out of memory while the result is measured: it is written" in result.err
    recovery = json.loads((output / "streamprune.json").read_text())["recovery"]
    assert "perplexity" not in recovery and recovery["seconds"] > 0
    assert "perplexity" not in (output / "README.md").read_text()
    AutoModelForCausalLM.from_pretrained(output)


@pytest.mark.parametrize("way", [IN_MEMORY, STREAMED])
@pytest.mark.parametrize("steps", [1, 4])
def test_a_training_that_diverges_is_refused_and_leaves_nothing(
    steps: int, way: tuple[str, ...], streamprune: Streamprune, model: Path, data: Path, output: Path
) -> None:
    options = (*FAST, "--field", "output", "--learning-rate", 1e30, "--steps", steps, *way)
    done = streamprune("recover", "--model", model, "--data", data, "--output", output, *options)
    check_refusal(done, 1, ("after the training: the loss is nan" if steps == 1 else "step 2: the loss is ", "lower"))
    assert not list(output.parent.iterdir())


def test_a_learning_rate_beyond_float32_is_refused(streamprune: Streamprune, model: Path, data: Path) -> None:
    done = streamprune("recover", "--model", model, "--data", data, "--output", "o", "--learning-rate", 1e39)
    check_refusal(done, 2, ("--learning-rate 1e+39",), remedy="must be at least 0 and below")


def test_an_adapter_that_overflows_when_it_is_merged_is_refused(
    streamprune: Streamprune, model: Path, data: Path, output: Path, tmp_path: Path
) -> None:
    options = (*FAST, "--field", "output", "--steps", 1, "--learning-rate", 1e10, "--adapter")
    assert streamprune("recover", "--model", model, "--data", data, "--output", tmp_path / "large", *options).code == 0
    file = tmp_path / "large" / "adapter_model.safetensors"
    save_file({name: tensor * 1e20 for name, tensor in load_file(file).items()}, file)
    merge = ("--merge", tmp_path / "large", "--quiet", "--no-evaluate")
    done = streamprune("recover", "--model", model, "--output", output, *merge)
    check_refusal(done, 1, ("layer 0, self_attn.q_proj", "overflows"))
    assert not list(output.parent.iterdir())


MISUSES: dict[str, tuple[tuple[object, ...], int, tuple[str, ...]]] = {
    "no data": ((), 2, ("--data", "--merge")),
    "no such data": (("--data", "nowhere.jsonl"), 1, ("nowhere.jsonl", "does not exist")),
    "another field": (("--data", "DATA", "--field", "body"), 1, ("'body'", "instruction, output", "--field")),
    "a long cutoff": (("--data", "DATA", "--cutoff", 100), 2, ("--cutoff 100", "64")),
    "all held out": (("--data", "DATA", "--field", "output", "--validation", 99), 2, ("--validation 99",)),
    "no adapter": (("--merge", "DATA"), 1, ("adapter_config.json",)),
    "merge and train": (("--merge", "DATA", "--epochs", 3), 2, ("--merge", "--epochs")),
    "merge and data": (("--merge", "DATA", "--data", "DATA"), 2, ("--merge", "--data")),
    "merge and hold out": (("--merge", "DATA", "--validation", 3), 2, ("--merge", "--validation")),
    "merge and a seed": (("--merge", "DATA", "--seed", 3), 2, ("--merge", "--seed")),
    "odd batches": (("--data", "DATA", "--batch", 9, "--micro-batch", 2), 2, ("--batch 9", "--micro-batch 2")),
    "top-k alone": (("--data", "DATA", "--top-k", 3), 2, ("--top-k", "--distill")),
    "a rank beside an adapter": (
        ("--data", "DATA", "--init-adapter", "x", "--rank", 3),
        2,
        ("--init-adapter", "--rank"),
    ),
    "a paper's rank beside an adapter": (
        ("--data", "DATA", "--init-adapter", "x", "--like", "bernoulli"),
        2,
        ("--init-adapter", "--like"),
    ),
    "another vocabulary": (("--data", "DATA", "--field", "output", "--distill", "OTHER"), 2, ("270", "260", "teacher")),
    "gpu memory": (
        ("--data", "DATA", "--field", "output", "--streamed", "--gpu-memory", "1GB", "--device", "cpu"),
        2,
        ("--gpu-memory",),
    ),
    "a small budget": (
        ("--data", "DATA", "--field", "output", "--streamed", "--host-memory", "1MB"),
        1,
        ("--host-memory", "--batch"),
    ),
    "gpu memory in memory": (
        ("--data", "DATA", "--field", "output", "--gpu-memory", "1GB", "--device", "cpu"),
        2,
        ("--gpu-memory",),
    ),
    "scratch alone": (("--data", "DATA", "--scratch", "x"), 2, ("--scratch", "--streamed", "--distill")),
}


@pytest.mark.parametrize("what", MISUSES)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(
    what: str, streamprune: Streamprune, model: Path, data: Path, output: Path, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "other", "llama", dtype=torch.float32, vocab_size=270)
    options, code, names = MISUSES[what]
    places = {"DATA": data, "OTHER": tmp_path / "other"}
    given = [places.get(str(each), each) for each in options]
    before = snapshot(tmp_path)
    fast = [each for each in ("--cutoff", 32) if "--cutoff" not in given and "--merge" not in given]
    result = streamprune("recover", "--model", model, "--output", output, "--quiet", *fast, *given)
    assert snapshot(tmp_path) == before
    check_refusal(result, code, names)


def test_what_it_is_measured_on_has_the_field_of_the_data(
    streamprune: Streamprune, model: Path, data: Path, output: Path
) -> None:
    options = ("--data", data, *FAST, "--field", "output", "--steps", 1, "--streamed", "--evaluate", data)
    evaluated = [each for each in options if each != "--no-evaluate"]
    done = streamprune("recover", "--model", model, "--output", output, *evaluated)
    assert done.code == 0, done.err
    assert "perplexity" in json.loads((output / OWN_FILE).read_text())["recovery"]


def test_a_training_in_memory_has_room_beside_its_process(
    streamprune: Streamprune, model: Path, data: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = 500_000_000
    taken = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=process))
    monkeypatch.setattr(recovery_work.psutil, "Process", lambda: taken)
    options = ("recover", "--model", model, "--data", data, "--output", output, *FAST, "--field", "output")

    def needed(*more: object) -> float:
        refused = streamprune(*options, "--steps", 1, *more, "--host-memory", process + 1000)
        check_refusal(refused, 1, ("beside the process's 500 MB", "--streamed"))
        return float(re.search(r"more than ([\d.]+) MB", refused.err)[1]) * 1e6

    assert needed() > 1.2 * needed("--micro-batch", 1)  # logits are among it
    # Of what is left a twentieth is margin, and half of the rest what tensors leave between them.
    short = streamprune(*options, "--steps", 1, "--host-memory", int(process + 2 * needed()))
    check_refusal(short, 1, ("a training in memory takes more than",))
    assert streamprune(*options, "--steps", 1, "--host-memory", int(process + 2.2 * needed())).code == 0


def test_an_output_that_would_replace_the_model_is_refused(streamprune: Streamprune, ragged: Path, data: Path) -> None:
    before = snapshot(ragged)
    result = streamprune("recover", "--model", ragged, "--data", data, *FAST, "--output", ragged, "--overwrite")
    check_refusal(result, 1, ("the model itself",))
    assert snapshot(ragged) == before


def test_a_teacher_with_another_tokenizer_is_refused_though_its_vocabulary_is_as_large(
    streamprune: Streamprune, model: Path, data: Path, output: Path, tmp_path: Path
) -> None:
    shutil.copytree(model, tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other")
    tokenizer.add_tokens(["harbour"])
    tokenizer.save_pretrained(tmp_path / "other")
    options = ("--data", data, *FAST, "--field", "output", "--distill", tmp_path / "other")
    result = streamprune("recover", "--model", model, "--output", output, *options)
    check_refusal(result, 2, ("its vocabulary is another one", "dense model"))


def test_sparse_weights_are_not_filled_but_take_an_adapter(
    streamprune: Streamprune, model: Path, data: Path, output: Path, tmp_path: Path
) -> None:
    prune = ("--method", "magnitude", "--granularity", "2:4", "--no-evaluate", "--quiet")
    edit_tensors(model, lambda tensors: None)
    save_tiny(tmp_path / "even", "llama", dtype=torch.float32, intermediate_size=40)
    assert streamprune("--model", tmp_path / "even", "--output", tmp_path / "sparse", *prune).code == 0
    options = ("--model", tmp_path / "sparse", "--data", data, *FAST, "--field", "output", "--steps", 2)
    check_refusal(streamprune("recover", *options, "--output", output), 2, ("is sparse", "--adapter"), "keep")
    assert streamprune("recover", *options, "--output", output, "--adapter").code == 0


def test_recover_from_python_returns_what_it_wrote(tiny_llama: Path, text: Path, output: Path) -> None:
    config = package.RecoverConfig(
        model=tiny_llama, data=text, output=output, cutoff=32, steps=1, batch=4, evaluate=False
    )
    result = package.recover(config)
    assert result.output == output and result.layout == "same"
    assert result.facts == json.loads((output / OWN_FILE).read_text())
    assert (config.rank, config.alpha) == (8, 16.0)


def test_steps_hold_whatever_the_epochs_are(tmp_path):
    given = {"model": "model", "output": tmp_path / "out", "data": "data.jsonl"}
    assert package.RecoverConfig(**given, epochs=0, steps=5).steps == 5
    for epochs in (0, 1e308):
        with pytest.raises(package.UsageError, match="--epochs"):
            package.RecoverConfig(**given, epochs=epochs)
