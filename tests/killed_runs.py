"""Runs that are killed at their journal's commits."""

import itertools

import pytest
from cli_runner import snapshot

from streamprune import PruneConfig, prune
from streamprune.storage.journal import Journal

RUNS = [
    ("taylor", "units", {}, {}),
    ("moreau-gs", "units", {"steps": 3, "draws": 2, "eta_quantile": 0.3}, {}),
    ("smoothgrad", "units", {"draws": 3}, {}),
    ("smoothgrad", "units", {"draws": 3, "mean": "score"}, {}),
    ("gblm", "units", {}, {}),
    ("flap", "units", {}, {}),
    ("magnitude", "units", {}, {}),
    ("taylor", "units", {}, {"compensate": True, "compensate_tokens": 64}),
    ("taylor", "units", {}, {"compensate": True, "compensate_tokens": 4096, "micro_batch": None}),
    ("taylor", "units", {}, {"compensate": True, "compensate_tokens": 64, "compensate_target": "own"}),
    ("magnitude", "layers", {}, {"compensate": True, "compensate_tokens": 64}),
    ("random", "layers", {}, {}),
    ("layer-ppl", "layers", {}, {}),
    ("block-influence", "layers", {}, {}),
    ("bernoulli", "units", {"steps": 5, "per_pass": 2, "batch": 2, "variant": "logits"}, {}),
    ("bernoulli", "units", {"steps": 4, "per_pass": 2, "repaired": "yes"}, {}),
    ("bernoulli", "layers", {"steps": 3, "batch": 2}, {}),
    ("moreau", "layers", {"steps": 2}, {}),
    ("magnitude", "weights", {}, {}),
    ("wanda", "weights", {}, {}),
    ("gblm", "weights", {}, {}),
    ("sparsegpt", "weights", {}, {}),
    ("moreau", "weights", {"steps": 2}, {}),
    ("thinet", "units", {"refit": "yes"}, {}),
]


class Killed(BaseException):
    """As if the process ended there."""


def config(tiny_llama, output, method, granularity, settings, options, **more):
    options = {"max_shard_size": 60_000, "layers": (2, 6), "evaluate": False, "micro_batch": 2} | options
    return PruneConfig(str(tiny_llama), output, method, settings, granularity, samples=5, seq_len=16, **options | more)


def weights(directory):
    """Everything in the output that says nothing of times."""
    return {
        name: value for name, value in snapshot(directory).items() if not name.endswith((".md", "streamprune.json"))
    }


@pytest.fixture
def killing(monkeypatch):
    """Kills the run at its n-th save: before it counts, or right after."""
    original = Journal.save

    def at(number, when):
        count = itertools.count()

        def save(self):
            mine = next(count)
            if mine == number and when == "before":
                raise Killed
            original(self)
            if mine == number and when == "after":
                raise Killed

        monkeypatch.setattr(Journal, "save", save)
        return count

    return at


def kill_at_commits(what, tiny_llama, tmp_path, killing, *, every=False):
    """Killed behind a commit, or before it counts, the run goes on to the same bytes.

    The commit in the middle, or `every` one where there are few, else every fifth: odd, so that both times are met.
    """
    expected = weights(prune(config(tiny_llama, tmp_path / "whole", *what)).output)
    count = killing(-1, "after")
    assert weights(prune(config(tiny_llama, tmp_path / "journalled", *what, resume=True)).output) == expected
    saves = next(count)
    assert saves >= (1 if what[0] == "random" else 2)
    for number in range(0, saves, 1 if saves < 12 else 5) if every else [saves // 2]:
        when = "before" if number % 2 else "after"
        output = tmp_path / f"killed-{number}"
        killing(number, when)
        with pytest.raises(Killed):
            prune(config(tiny_llama, output, *what, resume=True))
        assert not output.exists()
        killing(-1, "after")
        assert weights(prune(config(tiny_llama, output, *what, resume=True)).output) == expected
    assert not list(tmp_path.glob(".*"))  # neither journals nor partial outputs
