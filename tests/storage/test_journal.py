"""What a journal takes in, when it goes, and what it outlives."""

import shutil
import weakref

import pytest
from killed_runs import RUNS, Killed, config, kill_at_commits, weights
from marks import slow
from tiny_models import make_sweeper, token_ids

from streamprune import prune
from streamprune.errors import OutputError, StreampruneError
from streamprune.paging import hidden_states
from streamprune.paging.hidden_states import Activations
from streamprune.storage.journal import JOURNAL, Journal
from streamprune.streaming import statistics
from streamprune.streaming.walk import walk


def test_layer_ppl_in_several_passes_killed_at_any_commit(tiny_llama, tmp_path, killing, monkeypatch):
    monkeypatch.setattr(statistics, "STREAM_BYTES", 2 * 5 * 16 * 48 * 4)  # two of four layers at once
    kill_at_commits(("layer-ppl", "layers", {}, {}), tiny_llama, tmp_path, killing)


def with_tokens(run, count):
    return (*run[:3], run[3] | {"compensate_tokens": count})


# Five sequences each: of 16 tokens, or of 64 where a repair is.
IN_PIECES = [RUNS[1], with_tokens(RUNS[7], 320), with_tokens(RUNS[10], 320), RUNS[12], RUNS[16]]


@pytest.mark.parametrize("what", IN_PIECES, ids=str)
@pytest.mark.parametrize("place", [slow("memory"), "scratch"])
def test_hidden_states_go_into_the_journal_in_pieces(what, place, tiny_llama, tmp_path, killing, monkeypatch):
    expected = weights(prune(config(tiny_llama, tmp_path / "whole", *what)).output)
    sequence, written = 16 * 48 * 4, {}
    monkeypatch.setattr(hidden_states, "PIECE_BYTES", 2 * sequence)
    if place == "scratch":
        original = Activations.__init__
        monkeypatch.setattr(
            Activations,
            "__init__",
            lambda self, device, where, *rest: original(self, device, "scratch", rest[0], tmp_path / "scratch"),
        )
    write = Journal._write

    def recorded(self, name, tensors):
        written[name] = max(tensor.nbytes for tensor in tensors.values())
        write(self, name, tensors)

    monkeypatch.setattr(Journal, "_write", recorded)
    killing(4, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    killing(-1, "after")
    assert weights(prune(config(tiny_llama, tmp_path / "out", *what, resume=True)).output) == expected
    pieces = {name: size for name, size in written.items() if name.startswith(("carry/", "goal/"))}
    assert max(pieces.values()) <= (4 if what[3] else 2) * sequence  # two sequences of 16 tokens, or one of 64
    assert any(name.startswith("carry/") and name.endswith("/2") for name in pieces)
    assert any(name.startswith("goal/") and name.endswith("/2") for name in pieces) == (what[0] == "magnitude")


def test_the_input_that_a_sweep_goes_on_from_goes_with_its_layer(tiny_llama):
    sweeper, ids, gone = make_sweeper(tiny_llama), token_ids(), []
    given = [walk(sweeper, ids, lambda each: each.run(), stop=2)]
    alive = weakref.ref(given[0])

    def visit(each):
        gone.append(alive() is None)
        return each.run()

    walk(sweeper, ids, visit, start=(2, given))
    assert gone == [False] + [True] * 5


def test_a_journal_under_way_outlives_a_command_without_overwrite(tiny_llama, tmp_path, killing):
    what = ("taylor", "units", {}, {})
    output, journal = tmp_path / "out", tmp_path / ".out.resume"
    expected = weights(prune(config(tiny_llama, output, *what)).output)
    killing(3, "after")
    with pytest.raises(Killed):
        prune(config(tiny_llama, output, *what, resume=True, overwrite=True))
    with pytest.raises(OutputError, match="--overwrite"):
        prune(config(tiny_llama, output, *what, resume=True))
    assert (journal / JOURNAL).is_file() and (journal / "output").is_dir()
    killing(-1, "after")
    assert weights(prune(config(tiny_llama, output, *what, resume=True, overwrite=True)).output) == expected
    assert not journal.exists()


def test_a_refused_run_leaves_no_journal(tiny_llama, tmp_path):
    with pytest.raises(StreampruneError, match="needs at least"):
        prune(config(tiny_llama, tmp_path / "out", *RUNS[0], resume=True, host_memory=1000))
    assert not list(tmp_path.iterdir())


def test_scores_outlive_a_lost_output_and_the_next_death(tiny_llama, tmp_path, killing, monkeypatch):
    what = ("taylor", "units", {}, {"compensate": True, "compensate_tokens": 64})
    expected = weights(prune(config(tiny_llama, tmp_path / "whole", *what)).output)
    count = killing(-1, "after")
    prune(config(tiny_llama, tmp_path / "counted", *what, resume=True))
    killing(next(count) - 3, "after")  # in the repair or the writing
    with pytest.raises(Killed):
        prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    shutil.rmtree(tmp_path / ".out.resume" / "output")
    original = Journal.forget

    def forget(self):
        original(self)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "forget", forget)
        killing(-1, "after")
        with pytest.raises(Killed):
            prune(config(tiny_llama, tmp_path / "out", *what, resume=True))
    assert weights(prune(config(tiny_llama, tmp_path / "out", *what, resume=True)).output) == expected


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("streamprune.storage.journal.fcntl.flock", flock)
    with pytest.raises(OutputError, match=r"\.out\.resume .*Function not implemented.*leave --resume out"):
        Journal(tmp_path / ".out.resume", {})
