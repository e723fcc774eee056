"""Trainings that are cut short go on to the same bytes, and lose nothing to a disk or to another command."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_runner import Streamprune, check_refusal
from killed_runs import Killed, config
from safetensors import SafetensorError
from trainings import FAST, IN_MEMORY, STREAMED, interrupted

from streamprune import prune
from streamprune.errors import OutputError
from streamprune.pipeline import recover
from streamprune.recovery import in_memory
from streamprune.storage.journal import JOURNAL

# transformers 5.23 renames this; peft has the old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.mark.parametrize("way", [IN_MEMORY, STREAMED, ("--streamed", "--distill", "model")])
def test_a_run_that_was_cut_short_goes_on_to_the_same_bytes(
    way: tuple[str, ...],
    streamprune: Streamprune,
    model: Path,
    data: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(in_memory, "SAVED_EVERY", 2)
    way = tuple(str(model) if each == "model" else each for each in way)
    options = ("recover", "--model", model, "--data", data, *FAST, "--field", "output", "--steps", 6, "--resume", *way)
    assert streamprune(*options, "--output", tmp_path / "whole").code == 0
    with monkeypatch.context() as context:
        interrupted(context, 5)
        stopped = streamprune(*options, "--output", output)
    assert stopped.code == 1 and "interrupted" in stopped.err and not output.exists()
    journal = output.with_name(f".{output.name}.resume")
    other = streamprune(*options, "--output", output, "--seed", 3)
    assert other.code == 2 and "--seed" in other.err
    assert streamprune(*options, "--output", output).code == 0
    for name in ("model.safetensors", "recovery.jsonl"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not journal.exists()


@pytest.mark.parametrize("way", [IN_MEMORY, STREAMED])
def test_a_full_disk_is_named_and_what_was_saved_stays(
    way: tuple[str, ...],
    streamprune: Streamprune,
    model: Path,
    data: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        if way:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")  # as torch has it

    monkeypatch.setattr(in_memory, "SAVED_EVERY", 1)
    options = ("recover", "--model", model, "--data", data, *FAST, "--field", "output", "--steps", 2, "--resume", *way)
    with monkeypatch.context() as context:
        context.setattr("streamprune.storage.journal.save_file" if way else "torch.save", full)
        stopped = streamprune(*options, "--output", output)
    assert stopped.code == 1 and ".pruned.resume" in stopped.err and "make room, and repeat the command" in stopped.err
    assert streamprune(*options, "--output", output).code == 0


@pytest.mark.parametrize("way", [IN_MEMORY, STREAMED])
def test_an_output_that_is_to_be_replaced_does_not_end_the_training_that_does(
    way: tuple[str, ...],
    streamprune: Streamprune,
    model: Path,
    data: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("recover", "--model", model, "--data", data, *FAST, "--field", "output", "--steps", 2, "--resume", *way)
    assert streamprune(*options, "--output", output).code == 0
    with monkeypatch.context() as context:
        interrupted(context, 1)
        assert streamprune(*options, "--output", output, "--overwrite").code == 1
    check_refusal(streamprune(*options, "--output", output), 1, (str(output), "exists"), "--overwrite")
    assert output.with_name(f".{output.name}.resume").is_dir()
    assert streamprune(*options, "--output", output, "--overwrite").code == 0


@pytest.mark.parametrize("way", [IN_MEMORY, STREAMED])
def test_a_run_that_has_all_steps_does_not_ask_its_teacher_again(
    way: tuple[str, ...],
    streamprune: Streamprune,
    model: Path,
    data: Path,
    output: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = (*FAST, "--field", "output", "--steps", 2, "--resume", "--distill", model, *way)
    run = ("recover", "--model", model, "--data", data, "--output", output, *options)

    def stop(*anything: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(recover, "_write", stop)
        assert streamprune(*run).code == 1
    monkeypatch.setattr(recover, "keep_logits", stop)
    assert streamprune(*run).code == 0
    assert len((output / "recovery.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt", "adapter_model.safetensors"])
def test_a_journal_whose_files_were_cut_off_is_refused(
    name: str, streamprune: Streamprune, model: Path, data: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_memory, "SAVED_EVERY", 2)
    options = ("recover", "--model", model, "--data", data, *FAST, "--field", "output", "--steps", 4, "--resume")
    with monkeypatch.context() as context:
        interrupted(context, 3)
        assert streamprune(*options, "--output", output).code == 1
    trainer = output.with_name(f".{output.name}.resume") / "trainer"
    file = trainer / "checkpoint-2" / name
    file.write_bytes(file.read_bytes()[:-200])
    refused = streamprune(*options, "--output", output)
    assert refused.code == 1 and f"{trainer} is damaged" in refused.err and refused.err.count("\n") == 1
    shutil.rmtree(trainer)
    assert streamprune(*options, "--output", output).code == 0


def test_what_a_removed_journal_has_left_is_not_gone_on_from(
    streamprune: Streamprune, model: Path, data: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_memory, "SAVED_EVERY", 2)
    options = ("recover", "--model", model, "--data", data, *FAST, "--field", "output", "--steps", 4, "--resume")
    journal = output.with_name(f".{output.name}.resume")
    with monkeypatch.context() as context:
        interrupted(context, 3)
        assert streamprune(*options, "--output", output).code == 1
    (journal / "journal.json").unlink()
    assert list((journal / "trainer").iterdir())
    other = (*options, "--seed", 3)
    assert streamprune(*other, "--output", output).code == 0
    assert streamprune(*other, "--output", tmp_path / "whole").code == 0
    assert (output / "recovery.jsonl").read_bytes() == (tmp_path / "whole" / "recovery.jsonl").read_bytes()


Change = Callable[[Path], object]


def test_an_output_that_is_to_be_replaced_does_not_end_the_run_that_does(
    tiny_llama: Path, tmp_path: Path, killing: Any
) -> None:
    """Who forgets --overwrite when the command is repeated is told so, and loses nothing."""
    what, output = ("taylor", "units", {}, {}), tmp_path / "out"
    prune(config(tiny_llama, output, *what))
    killing(1, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, output, *what, resume=True, overwrite=True))
    killing(-1, "after")
    journal = tmp_path / ".out.resume" / JOURNAL
    with pytest.raises(OutputError, match="exists"):
        prune(config(tiny_llama, output, *what, resume=True))
    assert journal.is_file()
    prune(config(tiny_llama, output, *what, resume=True, overwrite=True))
    assert not journal.exists()
