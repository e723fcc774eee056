"""`streamprune verify` finds what is wrong with an output, says what to do, and runs no code unasked.

But for those of test_slim.py, the fresh process is a function call here.
"""

import io
import json
import subprocess
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cli_runner import check_refusal, edit_tensors
from tiny_models import save_tiny, tiny_model, token_ids

from streamprune.verification import _verify_child
from streamprune.verification.comparison import Check, complaint
from streamprune.verification.verify import verify


class CalledProcess:
    """In the place of `subprocess.Popen`: runs the child's main function when its end is waited for."""

    def __init__(self, command: list[str], *, stdout: Any, **options: Any) -> None:
        self.arguments, self.said, self.stdin = command[3:], Path(stdout.name), io.BytesIO()

    def wait(self) -> int:
        with pytest.MonkeyPatch.context() as patch, self.said.open("w") as said:
            patch.setattr(sys, "stdin", io.StringIO(self.stdin.getvalue().decode()))
            # As the child's: transformers may draw a bar there.
            with redirect_stdout(said), redirect_stderr(said):
                try:
                    _verify_child.examine(*self.arguments)
                except Exception:
                    traceback.print_exc()
                    return 1
        return 0

    def kill(self) -> None:
        pass

    def communicate(self) -> None:
        pass


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> None:
    called = SimpleNamespace(Popen=CalledProcess, PIPE=subprocess.PIPE)
    monkeypatch.setattr("streamprune.verification.fresh_process.subprocess", called)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)


@pytest.fixture
def pruned(streamprune: Any, model: Path, output: Path) -> Path:
    """The tiny Llama in one width."""
    options = ("--method", "random", "--no-evaluate", "--quiet", "--stock")
    assert streamprune("--model", model, "--output", output, *options).code == 0
    return output


def failed(directory: Path, **options: Any) -> dict[str, str]:
    """What fails, and its detail."""
    return {check.name: check.detail for check in verify(directory, **options) if not check.passed}


def edit(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_a_good_output_passes(streamprune: Any, pruned: Path) -> None:
    result = streamprune("verify", pruned)
    assert result.code == 0 and result.out.count(" ok ") == 5


def test_a_missing_tensor_is_named_and_not_reported(streamprune: Any, pruned: Path) -> None:
    edit_tensors(pruned, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    result = streamprune("verify", pruned)
    message = result.err.splitlines()[-1]
    assert result.code == 1 and "model.layers.3.mlp.up_proj.weight" in message
    assert "1 missing" in message and "prune again" in message and "report" not in message


def test_a_tensor_that_the_model_does_not_use_is_only_mentioned(pruned: Path) -> None:
    edit_tensors(pruned, lambda tensors: tensors.update({"v_head.weight": torch.full((1, 48), torch.inf)}))
    checks = verify(pruned)
    assert all(check.passed for check in checks)
    assert "v_head.weight" in checks[0].detail


def test_other_tokens_are_said_and_not_reported(streamprune: Any, pruned: Path) -> None:
    file = pruned / "tokenizer.json"
    fields = json.loads(file.read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary["e"], vocabulary["a"] = vocabulary["a"], vocabulary["e"]
    file.write_text(json.dumps(fields))
    result = streamprune("verify", pruned)
    message = result.err.splitlines()[-1]
    assert result.code == 1 and "tokens of a text: differ" in message
    assert "prune again" in message and "report" not in message


def test_special_tokens_that_differ_are_found(pruned: Path) -> None:
    file = pruned / "tokenizer.json"
    beginning = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [beginning, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
    }
    template["pair"] = [*template["single"], {"Sequence": {"id": "B", "type_id": 1}}]
    template["special_tokens"] = {"<s>": {"id": "<s>", "ids": [256], "tokens": ["<s>"]}}
    edit(file, post_processor=template)
    assert failed(pruned) == {"tokens of a text": "the special ones differ from the dense model's"}


def test_other_logits_are_to_be_reported(streamprune: Any, pruned: Path) -> None:
    edit_tensors(pruned, lambda tensors: tensors["model.layers.3.mlp.down_proj.weight"].mul_(2))
    result = streamprune("verify", pruned)
    message = result.err.splitlines()[-1]
    assert result.code == 1 and "logits of the masked dense model" in message and "report this" in message


def test_what_passed_has_no_complaint(pruned: Path) -> None:
    assert complaint(pruned, [Check("weights", True, "all matched")]) is None


@pytest.mark.parametrize("field", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_is_not_installed_is_replaced(field: str, pruned: Path) -> None:
    edit(pruned / "config.json", **{field: "flash_attention_2"})
    assert not failed(pruned)


def test_code_of_the_output_s_tokenizer_runs_only_where_it_is_trusted(
    streamprune: Any, model: Path, output: Path
) -> None:
    code = "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    (model / "tokenization_own.py").write_text(code)
    entry = {"AutoTokenizer": [None, "tokenization_own.Own"]}
    edit(model / "tokenizer_config.json", tokenizer_class="Own", auto_map=entry)
    options = ("--method", "random", "--no-evaluate", "--quiet", "--layers", "1:3", "--trust-remote-code")
    assert streamprune("--model", model, "--output", output, *options).code == 0
    assert streamprune("verify", output, "--trust-remote-code").code == 0
    check_refusal(streamprune("verify", output), 1, ("tokenization_own.py", "other code"), "--trust-remote-code")


@pytest.mark.parametrize("linked", [False, True])
def test_code_that_no_config_names_is_not_run_unasked(
    linked: bool, streamprune: Any, model: Path, output: Path, tmp_path: Path
) -> None:
    """transformers runs custom_generate/generate.py of every model whose code is trusted, as ours has to be."""
    options = ("--method", "random", "--no-evaluate", "--quiet", "--layers", "1:3")
    assert streamprune("--model", model, "--output", output, *options).code == 0
    (tmp_path / "elsewhere").mkdir()
    if linked:
        (output / "custom_generate").symlink_to(tmp_path / "elsewhere")
    else:
        (output / "custom_generate").mkdir()
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n\n\ndef generate(model, *args, **kwargs): ...\n"
    (output / "custom_generate" / "generate.py").write_text(code)
    check_refusal(streamprune("verify", output), 1, ("custom_generate", "other code"), "--trust-remote-code")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("auto", ["AutoConfig", "AutoModelForCausalLM"])
def test_other_code_than_ours_is_not_run_unasked(auto: str, streamprune: Any, model: Path, output: Path) -> None:
    options = ("--method", "random", "--no-evaluate", "--quiet", "--layers", "1:3")
    assert streamprune("--model", model, "--output", output, *options).code == 0
    (output / "elsewhere.py").write_text("raise SystemExit")
    entries = json.loads((output / "config.json").read_text())["auto_map"]
    edit(output / "config.json", auto_map=entries | {auto: "elsewhere.Own"})
    check_refusal(streamprune("verify", output), 1, ("config.json", "names other code"), "--trust-remote-code")


def test_a_model_that_does_not_load_is_said_in_a_line(streamprune: Any, pruned: Path) -> None:
    edit(pruned / "config.json", hidden_act="unknown_activation")
    check_refusal(streamprune("verify", pruned), 1, ("does not load in plain transformers",), "unknown_activation")


FITTED, BIAS = "model.layers.2.mlp.down_proj.weight", "model.layers.2.mlp.down_proj.bias"


@pytest.mark.parametrize(
    ("options", "tensor", "damage"),
    [
        (("--method", "random", "--compensate", "--compensate-tokens", "96"), FITTED, "is not there"),
        (("--method", "random", "--compensate", "--compensate-tokens", "96"), FITTED, "has shape"),
        (("--method", "flap", "--samples", "4", "--seq-len", "16"), BIAS, "is not there"),
    ],
)
def test_what_the_run_made_itself_and_is_gone_or_of_another_width_is_named(
    options: tuple[str, ...], tensor: str, damage: str, streamprune: Any, model: Path, output: Path
) -> None:
    arguments = ("--model", model, "--output", output, "--no-evaluate", "--quiet", "--layers", "1:3", "--ratio", "0.4")
    assert streamprune(*arguments, *options).code == 0

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        spoiled = tensors.pop(tensor)
        if damage == "has shape":
            tensors[tensor] = spoiled[:, :-1].contiguous()

    edit_tensors(output, spoil)
    check_refusal(streamprune("verify", output), 1, (tensor, damage), "prune again")


@pytest.mark.parametrize("fields", [{"vocab_size": 300}, {"hidden_size": 60}])
def test_a_source_of_other_sizes_is_another_model(
    fields: dict[str, int], streamprune: Any, pruned: Path, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "other", "llama", **fields)
    result = streamprune("verify", pruned, "--source", tmp_path / "other")
    check_refusal(result, 1, ("is not the model that was pruned",), "--source")


def test_beams_and_a_stop_of_the_model_s_own_are_not_compared(pruned: Path) -> None:
    (pruned / "generation_config.json").write_text(json.dumps({"num_beams": 4, "stop_strings": ["x"]}))
    assert not failed(pruned)


@pytest.mark.parametrize("options", [(), ("--compensate", "--compensate-tokens", "96")])
def test_a_norm_over_all_heads_is_compared_with_its_epsilon(
    options: tuple[str, ...], streamprune: Any, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "in", "olmo2", dtype=torch.float32, rms_norm_eps=1e-2)
    arguments = ("--model", tmp_path / "in", "--output", tmp_path / "out", "--layers", "1:3", "--ratio", "0.4")
    assert streamprune(*arguments, "--method", "random", "--no-evaluate", "--quiet", *options).code == 0
    assert not failed(tmp_path / "out")


def test_a_model_that_loads_and_does_not_run_is_said_to(
    streamprune: Any, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def generation(model: Any, ids: torch.Tensor) -> None:
        raise RuntimeError("no kernel for it")

    monkeypatch.setattr(_verify_child, "generation", generation)
    check_refusal(streamprune("verify", pruned), 1, ("does not run in plain transformers",), "no kernel for it")


# The generation that is compared.


def deviations(model: Any) -> tuple[bool, bool]:
    """Whether the cache, and padding, changes more than a thousandth of the logits."""
    with torch.no_grad():
        found = _verify_child.generation(model, token_ids(n=2, seq=24))
    return tuple(off > 1e-3 * scale for off, scale in (found["cache"], found["padding"]))  # type: ignore[return-value]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_generation_of_a_right_model_is_the_same_with_a_cache_and_padding(family: str) -> None:
    assert deviations(tiny_model(family, dtype=torch.float32)) == (False, False)


def test_a_wrong_cache_is_found() -> None:
    model: Any = tiny_model("llama", dtype=torch.float32)
    keep = model.model.layers[1].self_attn.k_proj.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return keep(hidden) * (1 if hidden.shape[1] > 1 else -1)  # one token at a time

    model.model.layers[1].self_attn.k_proj.forward = forward
    assert deviations(model)[0]


def test_padding_that_is_not_masked_is_found() -> None:
    model: Any = tiny_model("llama", dtype=torch.float32)
    keep = model.model.forward
    model.model.forward = lambda *args, **kwargs: keep(*args, **(kwargs | {"attention_mask": None}))
    assert deviations(model) == (False, True)


def test_the_fresh_process_ends_with_a_failed_comparison(
    monkeypatch: pytest.MonkeyPatch, streamprune: Any, pruned: Path, tmp_path: Path
) -> None:
    monkeypatch.undo()
    save_tiny(tmp_path / "smaller", "llama", num_hidden_layers=2)
    before = subprocess.run(["pgrep", "-fc", "_verify_child.py"], capture_output=True, check=False).stdout
    result = streamprune("verify", pruned, "--source", tmp_path / "smaller")
    check_refusal(result, 1, ("smaller", "is not the model that was pruned"), "--source")
    after = subprocess.run(["pgrep", "-fc", "_verify_child.py"], capture_output=True, check=False).stdout
    assert int(after) <= int(before)


@pytest.mark.parametrize("granularity", ["units", "weights"])
@pytest.mark.parametrize("family,fields", [("llama", {"intermediate_size": 20}), ("gpt2", {})])
def test_a_source_of_other_widths_or_of_another_family_is_refused(
    family: str, fields: dict[str, int], granularity: str, streamprune: Any, model: Path, output: Path, tmp_path: Path
) -> None:
    options = ("--granularity", granularity, "--method", "magnitude", "--no-evaluate", "--quiet")
    assert streamprune("--model", model, "--output", output, *options).code == 0
    save_tiny(tmp_path / "other", family, dtype=torch.float32, **{"num_hidden_layers": 8} | fields)
    result = streamprune("verify", output, "--source", tmp_path / "other")
    check_refusal(result, 1, ("other",), "prune again" if (family, granularity) == ("gpt2", "weights") else "--source")


def test_a_model_that_there_is_no_memory_for_is_refused_before_it_is_loaded(
    streamprune: Any, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("streamprune.verification.comparison.available_memory", lambda: 1000)
    monkeypatch.setattr(CalledProcess, "wait", lambda self: pytest.fail("it was loaded"))
    check_refusal(streamprune("verify", pruned), 1, (str(pruned), "in float32", "1 kB"), "on a machine that has them")


def test_a_process_that_is_killed_is_said_to_be(
    streamprune: Any, pruned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CalledProcess, "wait", lambda self: -9)
    check_refusal(streamprune("verify", pruned), 1, (str(pruned), "was killed"), "free some")
