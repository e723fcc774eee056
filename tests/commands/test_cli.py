"""The command line: help, the small commands, and what a run says while it works."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import torch
from cli_runner import COMMAND, REMEDY, SHORT, Outcome, cells, check_refusal, environment
from tiny_models import save_tiny
from transformers import AutoModelForCausalLM

from streamprune.cli import cli as root_command
from streamprune.methods.table import METHODS, resolve_settings

# Help and the small commands.


def commands() -> list[tuple[str, click.Command]]:
    return [("streamprune", root_command), *root_command.commands.items()]


@pytest.mark.parametrize(("name", "command"), commands(), ids=[name for name, _ in commands()])
def test_every_command_and_option_has_help(name, command, streamprune):
    assert command.help
    undocumented = [p.name for p in command.params if isinstance(p, click.Option) and not p.help and not p.hidden]
    assert not undocumented
    result = streamprune(*([] if name == "streamprune" else [name]), "--help")
    assert result.code == 0
    assert result.err == ""
    for parameter in command.params:
        for option in parameter.opts if isinstance(parameter, click.Option) else ():
            assert option in result.out


def test_help_of_the_group_lists_every_command(streamprune):
    for result in (streamprune("--help"), streamprune("-h"), streamprune()):
        assert result.code == 0
        assert {"eval", "verify", "methods", "demo"} <= set(re.findall(r"^  (\w+)", result.out, re.MULTILINE))


def test_version_is_that_of_the_package(streamprune):
    import importlib.metadata

    result = streamprune("--version")
    assert result.code == 0
    assert importlib.metadata.version("streamprune") in result.out


def test_methods_lists_each_with_its_settings_and_paper(streamprune):
    result = streamprune("methods")
    assert result.code == 0
    for name, method in METHODS.items():
        row, *settings = (line for line in result.out.splitlines() if line.startswith(f"{name} "))
        assert method.paper in row
        for need in method.needs_for(method.targets[0], resolve_settings(name, {}, method.targets[0])):
            assert need.label in row and row.count(need.label) <= 2  # in its summary too
        assert row.split()[1:4] == ["yes" if t in method.targets else "-" for t in ("units", "weights", "layers")]
        assert [line.split()[1] for line in settings] == list(method.settings)
        for line, setting in zip(settings, method.settings.values(), strict=True):
            assert setting.meaning in line and all(choice in line for choice in setting.choices)


@pytest.mark.parametrize("position", ["first", "last"])
def test_debug_shows_the_traceback_and_still_ends_with_the_line(position, streamprune, model, output):
    (model / "config.json").unlink()
    arguments = ["--model", model, "--output", output]
    arguments.insert(0 if position == "first" else 4, "--debug")
    result = streamprune(*arguments)
    assert result.code == 1
    assert "Traceback (most recent call last)" in result.err
    assert "CheckpointError" in result.err
    assert result.err.splitlines()[-1].startswith("streamprune: ")


# `eval` and `verify`.


def printed_perplexity(result: Outcome) -> float:
    assert result.code == 0, result.err
    match = re.match(r"perplexity ([\d.]+) \(loss ([\d.]+) nats, (\d+) x (\d+) tokens, in float32\)", result.out)
    assert match
    return float(match[1])


def test_eval_of_dense_and_pruned_gives_the_numbers_of_the_run(streamprune, tiny_llama, output):
    options = ("--method", "taylor", *SHORT, "--quiet")
    assert streamprune("--model", tiny_llama, "--output", output, *options).code == 0
    facts = json.loads((output / "streamprune.json").read_text())["perplexity"]
    segments, length = facts["segments"]
    for model, when in ((tiny_llama, "before"), (output, "after")):
        result = streamprune("eval", "--model", model, "--seq-len", length, "--samples", segments, "--quiet")
        assert printed_perplexity(result) == pytest.approx(facts[when], rel=1e-5)
        assert result.err == ""


def test_eval_equals_transformers_on_a_given_text(streamprune, tiny_llama, tmp_path):
    text = "Rain fell on the roof of the long house, and nobody went out before noon. " * 4
    (tmp_path / "text.txt").write_text(text)
    ids = torch.tensor(tokenizer_ids(tiny_llama, text)[: 9 * 32]).view(9, 32)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        logits = model(ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).exp().item()
    result = streamprune("eval", "--model", tiny_llama, "--text", tmp_path / "text.txt", "--seq-len", 32, "--quiet")
    assert printed_perplexity(result) == pytest.approx(expected, rel=1e-5)
    assert "9 x 32" in result.out


def tokenizer_ids(path: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)(text, verbose=False)["input_ids"]


@pytest.mark.parametrize(
    ("options", "code", "names"),
    [
        (("--text", "/nowhere/x.txt"), 1, ("/nowhere/x.txt", "does not exist")),
        (("--samples", "100000", "--seq-len", "16"), 1, ("100000 segments",)),
        (("--samples", "0"), 2, ("--samples",)),
        (("--seq-len", "1"), 2, ("--seq-len",)),
        (("--micro-batch", "0"), 2, ("--micro-batch",)),
        (("--device", "warp"), 2, ("--device warp",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_eval_refuses_bad_input_in_one_line(options, code, names, streamprune, tiny_llama):
    result = streamprune("eval", "--model", tiny_llama, "--quiet", *options)
    check_refusal(result, code, names, rf"{REMEDY}|at least")


def test_eval_of_longer_segments_than_the_model_has_positions_is_refused(streamprune, tmp_path):
    save_tiny(tmp_path / "gpt2", "gpt2", dtype=torch.float32)
    result = streamprune("eval", "--model", tmp_path / "gpt2", "--seq-len", "65", "--quiet")
    check_refusal(result, 2, ("--seq-len 65", "64"), ".")


def test_verify_of_what_streamprune_did_not_write_is_refused(streamprune, tiny_llama):
    check_refusal(streamprune("verify", tiny_llama), 1, (str(tiny_llama), "streamprune.json"))


def test_verify_without_its_source_is_refused(streamprune, model, earlier):
    shutil.rmtree(model)
    check_refusal(streamprune("verify", earlier), 1, (str(model),), "--source")


# What a run says while it works.


def test_quiet_prints_no_progress(streamprune, tiny_llama, output):
    result = streamprune("--model", tiny_llama, "--output", output, "--method", "taylor", *SHORT, "--quiet")
    assert result.code == 0
    assert result.err == ""


STAGES = ("perplexity before:", "scoring taylor:", "writing:", "perplexity after:")


def check_plain_progress(err: str) -> None:
    """A line per stage with the bytes read and the peak memory, and no control characters."""
    assert "\r" not in err
    assert "\x1b" not in err
    lines = err.splitlines()
    stages = [line for line in lines if line.startswith(STAGES)]
    assert [stage.split(":")[0] + ":" for stage in stages] == list(STAGES)
    assert all("read" in stage and "peak memory" in stage for stage in stages)
    assert any("137,520 parameters" in line for line in lines)
    assert any("layers 4:6 lose 19 of 37 channels" in line for line in lines)
    assert any("--stock" in line for line in lines), "says what loading ragged layers takes"


def test_progress_goes_to_the_present_stderr_as_plain_lines(streamprune, tiny_llama, output):
    result = streamprune("--model", tiny_llama, "--output", output, "--method", "taylor", *SHORT)
    assert result.code == 0
    check_plain_progress(result.err)


def test_a_real_process_without_a_terminal_prints_plain_lines(tiny_llama, output):
    options = ["--method", "taylor", *SHORT]
    done = subprocess.run(
        [*COMMAND, "--model", str(tiny_llama), "--output", str(output), *options],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check_plain_progress(done.stderr)
    assert cells(done.stdout, "parameters") == ["137520", "132048"]
    assert f"wrote {output} (ragged)" in done.stdout
