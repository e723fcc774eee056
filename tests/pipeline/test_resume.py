"""A run that is killed behind any commit, or between two, goes on to the same bytes."""

import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch
from cli_runner import COMMAND
from fake_device import Immediate
from killed_runs import RUNS, Killed, config, kill_at_commits, weights
from marks import slow
from safetensors import SafetensorError

from streamprune import prune
from streamprune.errors import JournalError, OutputError, UsageError
from streamprune.output.writer import OutputWriter
from streamprune.paging import device as devices
from streamprune.pipeline.progress import Progress
from streamprune.storage.journal import JOURNAL, Journal, save_file


@pytest.mark.parametrize("what", RUNS[::2], ids=str)
def test_a_run_killed_at_a_commit_ends_with_the_same_bytes(what, tiny_llama, tmp_path, killing):
    kill_at_commits(what, tiny_llama, tmp_path, killing)


@pytest.mark.slow
@pytest.mark.parametrize("what", RUNS, ids=str)
def test_a_run_killed_at_any_commit_ends_with_the_same_bytes(what, tiny_llama, tmp_path, killing):
    kill_at_commits(what, tiny_llama, tmp_path, killing, every=True)


GS = ("moreau-gs", "units", {"steps": 3, "draws": 2, "eta_quantile": 0.3}, {})
GS_HALF = ("moreau-gs", "units", {"steps": 3}, {"state_dtype": "bfloat16"})
SMOOTH = ("smoothgrad", "units", {"draws": 3}, {})
GBLM = ("gblm", "weights", {}, {"state_dtype": "bfloat16"})
LAYERS = ("moreau", "layers", {"steps": 2}, {})


@pytest.fixture(params=["arena", slow("staged"), slow("scratch")])
def passing(request, tmp_path, monkeypatch):
    """Lets state pass a device that is not direct, as on a GPU: through an arena, one not registered, or scratch."""
    device = Immediate(registers=request.param == "arena")
    monkeypatch.setattr("streamprune.paging.device.paging_device", lambda *given, **options: device)
    if request.param == "scratch":
        monkeypatch.setattr("streamprune.planning.placement._state_places", lambda *given: ["scratch"])
    return {"scratch": tmp_path / "spill"} if request.param == "scratch" else {}


@pytest.mark.parametrize("what", [GS, slow(GS_HALF), slow(SMOOTH), GBLM, slow(LAYERS)], ids=str)
def test_a_run_whose_state_passes_a_device_ends_with_the_same_bytes(what, passing, tiny_llama, tmp_path, killing):
    method, granularity, settings, options = what
    kill_at_commits((method, granularity, settings, options | passing), tiny_llama, tmp_path, killing)


@pytest.mark.slow
@pytest.mark.parametrize(
    "passing,what",
    [
        ("arena", GS_HALF),
        ("arena", SMOOTH),
        ("staged", GBLM),
        ("staged", LAYERS),
        ("scratch", SMOOTH),
        ("scratch", GBLM),
    ],
    indirect=["passing"],
    ids=str,
)
def test_a_run_whose_state_passes_a_device_is_killed_anywhere(what, passing, tiny_llama, tmp_path, killing):
    method, granularity, settings, options = what
    kill_at_commits((method, granularity, settings, options | passing), tiny_llama, tmp_path, killing, every=True)


def test_a_journal_goes_on_with_state_that_passes_a_device_and_back(tiny_llama, tmp_path, killing, monkeypatch):
    what = ("moreau-gs", "units", {"steps": 4}, {})
    expected = weights(prune(config(tiny_llama, tmp_path / "whole", *what)).output)
    original = devices.paging_device
    for attempt in range(40):
        direct = attempt % 2
        monkeypatch.setattr(devices, "paging_device", original if direct else lambda *given, **options: Immediate())
        killing(5, "after")
        try:
            result = prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
            break
        except Killed:
            continue
    assert attempt > 3 and weights(result.output) == expected


def test_a_run_killed_again_and_again_gets_there(tiny_llama, tmp_path, killing):
    what = ("moreau-gs", "units", {"steps": 3}, {})
    expected = weights(prune(config(tiny_llama, tmp_path / "whole", *what)).output)
    for attempts in range(200):  # noqa: B007  how many it took is looked at
        killing(2, "after")
        try:
            result = prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
            break
        except Killed:
            continue
    assert attempts > 5 and weights(result.output) == expected


def test_a_run_killed_behind_layers_that_go_altogether_ends_with_the_same_bytes(tiny_llama, tmp_path, killing):
    """Nothing of the first layer is written; that it was passed counts."""
    what = ("random", "layers", {}, {"layers": (0, 3), "ratio": 0.34, "seed": 2})
    assert 0 not in prune(config(tiny_llama, tmp_path / "there", *what)).kept
    kill_at_commits(what, tiny_llama, tmp_path, killing, every=True)


def test_layers_that_are_through_are_not_computed_again(tiny_llama, tmp_path, killing):
    what = ("moreau", "units", {"steps": 4}, {})
    whole = prune(config(tiny_llama, tmp_path / "whole", *what)).facts["scoring"]["bytes_read"]
    killing(18, "after")  # far into the last sweeps
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    killing(-1, "after")
    again = prune(config(tiny_llama, tmp_path / "out", *what, resume=True)).facts["scoring"]["bytes_read"]
    assert again < whole / 2


@pytest.mark.parametrize(
    "what",
    [
        ("moreau", "units", {"steps": 3}, {}),
        ("gblm", "units", {}, {}),
        slow(("magnitude", "layers", {}, {"compensate": True, "compensate_tokens": 64})),
        slow(("sparsegpt", "weights", {}, {})),
    ],
)
def test_what_an_earlier_run_has_passed_is_not_to_come(what, tiny_llama, tmp_path, killing):
    count = killing(-1, "after")
    prune(config(tiny_llama, tmp_path / "whole", *what, resume=True))
    saves = next(count)
    for number in (1, saves // 3, 2 * saves // 3, saves - 2):
        killing(number, "after")
        with pytest.raises(Killed):
            prune(config(tiny_llama, tmp_path / f"{number}", *what, resume=True))
        killing(-1, "after")
        said = io.StringIO()
        prune(config(tiny_llama, tmp_path / f"{number}", *what, resume=True), Progress(said, as_json=True))
        stages = [json.loads(line) for line in said.getvalue().splitlines() if '"done"' in line]
        assert stages and all(stage["bytes"] == stage["total_bytes"] for stage in stages)


@pytest.mark.parametrize("repaired", [False, True])
def test_layers_that_are_written_are_not_written_again(repaired, tiny_llama, tmp_path, killing, monkeypatch):
    options = {"compensate": True, "compensate_tokens": 64} if repaired else {}
    what, put, layers = ("magnitude", "units", {}, options), OutputWriter.put_layer, []

    def counted(self, page, made):
        layers.append(page.layer)
        put(self, page, made)

    monkeypatch.setattr(OutputWriter, "put_layer", counted)
    count = killing(-1, "after")
    prune(config(tiny_llama, tmp_path / "whole", *what, resume=True))
    assert sorted(layers) == list(range(8))
    killing(next(count) - 3, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    before = set(layers[8:])
    assert len(before) > 3
    killing(-1, "after")
    prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    assert sorted(layers[8:]) == list(range(8))


def test_a_journal_of_another_run_is_refused_by_name(tiny_llama, tmp_path, killing):
    what = ("taylor", "units", {}, {})
    killing(2, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    killing(-1, "after")
    changes = {"seed": 1, "ratio": 0.3, "dtype": "float64", "kernels": "torch"}
    for change, name in (({name: value}, f"--{name}") for name, value in changes.items()):
        with pytest.raises(UsageError, match=rf"{name}.* has .*remove that directory"):
            prune(config(tiny_llama, tmp_path / "out", *what, resume=True, **change))
    # What changes no byte may change.
    budget = {"scratch": tmp_path / "scratch", "read_threads": 5}
    assert prune(config(tiny_llama, tmp_path / "out", *what, resume=True, **budget)).output.is_dir()


def test_a_micro_batch_of_ones_own_is_part_of_the_run(tiny_llama, tmp_path, killing):
    what = ("taylor", "units", {}, {})
    killing(2, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    killing(-1, "after")
    with pytest.raises(UsageError, match=r"--micro-batch 2, this run has 1"):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True, micro_batch=1))


def test_a_setting_whose_default_is_another_by_now_is_part_of_the_run(tiny_llama, tmp_path, killing, monkeypatch):
    what = ("taylor", "units", {}, {})
    killing(2, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    killing(-1, "after")
    monkeypatch.setattr("streamprune.pipeline.resume.resolve_settings", lambda *given, **more: {"order": "second"})
    with pytest.raises(UsageError, match=r"--set order=first, this run has order=second;"):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))


def test_a_text_of_another_evaluation_is_measured_anew(tiny_llama, tmp_path, killing):
    what, texts = ("magnitude", "units", {}, {}), []
    for number in range(2):
        texts.append(tmp_path / f"{number}.txt")
        texts[-1].write_text(" ".join(f"word {number} {n * (number + 3)}" for n in range(300)))
    killing(2, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True, evaluate=texts[0]))
    killing(-1, "after")
    resumed = prune(config(tiny_llama, tmp_path / "out", *what, resume=True, evaluate=texts[1])).facts["perplexity"]
    whole = prune(config(tiny_llama, tmp_path / "whole", *what, evaluate=texts[1])).facts["perplexity"]
    assert resumed == whole


@pytest.mark.parametrize("what", [("magnitude", "weights", {}, {}), ("taylor", "units", {}, {})])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_death_between_the_output_and_the_end_of_the_journal_does_no_harm(
    what, overwrite, tiny_llama, tmp_path, monkeypatch
):
    expected = weights(prune(config(tiny_llama, tmp_path / "whole", *what)).output)

    def die(directory):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("streamprune.pipeline.run.remove_journal", die)
        with pytest.raises(Killed):
            prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    assert weights(tmp_path / "out") == expected
    if overwrite:
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True, overwrite=True))
    else:
        assert list(tmp_path.glob(".*"))
        with pytest.raises(OutputError, match="exists"):
            prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    assert weights(tmp_path / "out") == expected and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    "what", [("wanda", "weights", {}, {}), ("magnitude", "layers", {}, {"compensate": True, "compensate_tokens": 64})]
)
def test_a_lost_partial_output_begins_anew(what, tiny_llama, tmp_path, killing):
    count = killing(-1, "after")
    expected = weights(prune(config(tiny_llama, tmp_path / "whole", *what, resume=True)).output)
    killing(next(count) - 2, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    killing(-1, "after")
    shutil.rmtree(tmp_path / ".out.resume" / "output")
    assert weights(prune(config(tiny_llama, tmp_path / "out", *what, resume=True)).output) == expected


@pytest.mark.parametrize("damage", ["gone", "short", "shard"])
def test_damage_to_what_is_kept_is_an_error(damage, tiny_llama, tmp_path, killing):
    what = ("gblm", "weights", {}, {})
    killing(10, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    killing(-1, "after")
    kept = tmp_path / ".out.resume"
    file = sorted(kept.glob("*.safetensors"))[0] if damage != "shard" else sorted((kept / "output").glob("*"))[0]
    file.unlink() if damage == "gone" else file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(OutputError, match=r"remove .*resume"):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))


def test_a_full_disk_is_named_and_the_run_goes_on_when_there_is_room(tiny_llama, tmp_path, monkeypatch):
    what, count = ("moreau", "units", {"steps": 3}, {}), itertools.count()
    expected = weights(prune(config(tiny_llama, tmp_path / "whole", *what)).output)
    original = save_file

    def full(tensors, file):
        if next(count) == 20:
            raise SafetensorError("I/O error: No space left on device")
        original(tensors, file)

    monkeypatch.setattr("streamprune.storage.journal.save_file", full)
    with pytest.raises(OutputError, match=r"resume: .*No space left.*go on"):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    assert weights(prune(config(tiny_llama, tmp_path / "out", *what, resume=True)).output) == expected


def test_a_changed_checkpoint_is_refused(tiny_llama, model, tmp_path, killing):
    what = ("taylor", "units", {}, {})
    killing(2, "after")
    with pytest.raises(Killed):
        prune(config(model, tmp_path / "out", *what, resume=True))
    killing(-1, "after")
    os.utime(model / "model.safetensors", (1, 1))
    with pytest.raises(UsageError, match="source"):
        prune(config(model, tmp_path / "out", *what, resume=True))


def test_a_changed_config_is_refused(tiny_llama, model, tmp_path, killing):
    what = ("taylor", "units", {}, {})
    killing(2, "after")
    with pytest.raises(Killed):
        prune(config(model, tmp_path / "out", *what, resume=True))
    killing(-1, "after")
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 0.5}))
    with pytest.raises(UsageError, match="source"):
        prune(config(model, tmp_path / "out", *what, resume=True))


def test_a_damaged_journal_is_an_error_and_not_another_result(tmp_path):
    journal = Journal(tmp_path / "journal", {"a": 1})
    journal.save()
    with pytest.raises(OutputError, match=r"in use by another run; wait"):
        Journal(tmp_path / "journal", {"a": 1})
    journal.release()
    (tmp_path / "journal" / JOURNAL).write_text("{")
    with pytest.raises(OutputError, match=r"damaged.*start again"):
        Journal(tmp_path / "journal", {"a": 1})


def test_nobody_is_told_to_go_on_from_a_damaged_journal(tiny_llama, tmp_path, killing):
    what = ("moreau-gs", "units", {"steps": 2}, {})
    killing(6, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    killing(-1, "after")
    for file in (tmp_path / ".out.resume").glob("*.safetensors"):
        os.truncate(file, 10)
    said = io.StringIO()
    with pytest.raises(JournalError, match=r"\.out\.resume.* is damaged .*; remove .*\.out\.resume and start again"):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True), Progress(said))
    assert "to go on from" not in said.getvalue()


def test_files_that_no_journal_names_are_removed_and_disk_use_stays_bounded(tmp_path):
    journal = Journal(tmp_path / "journal", {})
    store = journal.store("delta")
    journal.begin()
    for step in range(5):
        for layer in (3, 2, 1):
            store[layer, "q"] = torch.full((10,), float(step))
            journal.commit(layer, {"hidden": [torch.zeros(3), torch.ones(1)]}, 1.0)
    assert len(list((tmp_path / "journal").iterdir())) == 2 + 3 + 2  # journal, lock, three layers, what is carried
    journal.release()
    (tmp_path / "journal" / "999.safetensors").write_text("cut off")
    again = Journal(tmp_path / "journal", {})
    store = again.store("delta")
    assert len(list((tmp_path / "journal").iterdir())) == 7
    assert sorted(store) == [(1, "q"), (2, "q"), (3, "q")] and float(store[2, "q"][0]) == 4
    point = again.begin()
    assert (point.layer, point.loss) == (1, 1.0)
    assert torch.cat(list(point.carry["hidden"])).tolist() == [0, 0, 0, 1]


def test_what_is_put_without_a_commit_does_not_count(tmp_path):
    journal = Journal(tmp_path / "journal", {})
    store = journal.store("sum")
    store[1, "q"] = torch.ones(3)
    journal.save()
    store[1, "q"] = torch.zeros(3)
    del store[1, "q"]
    journal.release()
    again = Journal(tmp_path / "journal", {}).store("sum")
    assert torch.equal(again[1, "q"], torch.ones(3))


@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT, slow(signal.SIGTERM)])
def test_a_signal_leaves_a_journal_and_no_output(signal_number, tiny_llama, tmp_path):
    command = [
        *COMMAND,
        *("--model", tiny_llama, "--method", "moreau-gs", "--set", "steps=400", "--samples", "4", "--seq-len", "16"),
        *("--no-evaluate", "--resume", "--output", tmp_path / "out"),
    ]
    journal = tmp_path / ".out.resume" / JOURNAL
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as child:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (journal.is_file() and json.loads(journal.read_text())["point"]):
            time.sleep(0.01)
        child.send_signal(signal_number)
        message = child.communicate(timeout=60)[1]
    assert child.returncode != 0 and not (tmp_path / "out").exists() and journal.is_file()
    if signal_number != signal.SIGKILL:
        assert child.returncode == 1
        assert "to go on from: repeat the command" in message
