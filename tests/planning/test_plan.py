"""`streamprune plan` says what the run then does, from headers alone, also for a card that is not there."""

import json
import math
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tiny_models import make_sweeper, save_tiny

from streamprune import PruneConfig, prune
from streamprune.errors import CalibrationError
from streamprune.figures import peak_rss
from streamprune.paging.pager import Pager
from streamprune.pipeline import run
from streamprune.pipeline.run import foretell
from streamprune.planning import placement, rates
from streamprune.planning.placement import CACHE_SHARE
from streamprune.storage.checkpoint import Checkpoint
from streamprune.storage.reader import DISK_BLOCK

RUNS = [
    ("taylor", "units", {}),
    ("moreau-gs", "units", {"settings": {"steps": 3}}),
    ("gblm", "units", {}),
    ("wanda", "weights", {}),
    ("block-influence", "layers", {}),
    ("magnitude", "units", {}),
]


def config(tiny_llama, output, method="taylor", granularity="units", **more):
    more = {"samples": 4, "seq_len": 32, "layers": (1, 7), "evaluate": False, "granularity": granularity} | more
    return PruneConfig(str(tiny_llama), output, method, **more)


@pytest.mark.parametrize("slots", ["two", "all"])
@pytest.mark.parametrize("method,granularity,more", RUNS)
def test_bytes_read_are_those_of_the_plan(method, granularity, more, slots, tiny_llama, tmp_path):
    budget = {"host_memory": 1 << 40} if slots == "all" else {}
    options = config(tiny_llama, tmp_path / "out", method, granularity, **more, **budget)
    planned = foretell(options).placement
    facts = prune(options).facts
    stage = next(stage for stage in planned.stages if stage.name.startswith("scoring"))
    assert facts["scoring"]["bytes_read"] == stage.read == facts["memory"]["planned_read"][stage.name]
    assert (facts["memory"]["slots"], facts["memory"]["hidden_states"]) == (planned.held.slots, planned.place)


def test_what_is_counted_is_what_tensors_take(tiny_llama, tmp_path):
    """By hand, from the config: every purpose of a gradient sweep."""
    placement = foretell(config(tiny_llama, tmp_path / "out", micro_batch=2)).placement
    device = placement.stages[0].device
    fields = json.loads((tiny_llama / "config.json").read_text())
    hidden, inner, vocabulary = fields["hidden_size"], fields["intermediate_size"], fields["vocab_size"]
    queries = fields["num_attention_heads"] * fields["head_dim"]
    keys = fields["num_key_value_heads"] * fields["head_dim"]
    matrices = [(queries, hidden), (keys, hidden), (keys, hidden), (hidden, queries)]
    matrices += [(inner, hidden), (inner, hidden), (hidden, inner)]
    sizes, tokens, batch = [rows * columns for rows, columns in matrices], 4 * 32, 2 * 32
    layer = sum(sizes) + 2 * hidden
    assert 2 * layer * 4 <= device["slots"] <= 2 * (layer * 4 + 9 * DISK_BLOCK)  # tensors lie in blocks as in the file
    assert device["embeddings and head"] == 4 * (2 * vocabulary * hidden + hidden)
    assert device["hidden states"] == (8 - 1 + 1 + 1) * tokens * hidden * 4  # inputs, the last output, its gradient
    assert device["logits"] == 4 * tokens * vocabulary * 4  # they, their softmax, and the gradients of both
    assert device["activations"] == sum(map(sum, matrices)) * batch * 4
    assert device["gradients, and what is made of them"] == 4 * (2 * max(sizes) + sum(sizes))
    assert device["bound layer"] == 0  # stored as it computes
    assert placement.host_bytes > sum(device.values())


def test_nothing_but_headers_is_read(tiny_llama, tmp_path, monkeypatch):
    def read_into(self, *arguments, **options):
        raise AssertionError("a plan reads no weights")

    monkeypatch.setattr(Checkpoint, "read_into", read_into)
    assert "two layers at a time" in foretell(config(tiny_llama, tmp_path / "out")).text


@pytest.mark.parametrize("reader", ["buffered", "direct"])
def test_the_page_cache_has_a_share_of_what_the_run_leaves(reader, tiny_llama, tmp_path, monkeypatch):
    seen, original, available = set(), Pager.pages, 1 << 40

    def pages(self, *arguments):
        seen.add(self.page_cache)
        return original(self, *arguments)

    monkeypatch.setattr(Pager, "pages", pages)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    planned = prune(config(tiny_llama, tmp_path / "out", reader=reader)).facts["memory"]["planned_host"]
    assert len(seen) == 1
    if reader == "direct":
        assert seen == {0}
    else:
        assert 0 <= seen.pop() / CACHE_SHARE - (available - planned) <= peak_rss()


def test_a_card_that_is_not_there_is_planned_for(streamprune, tiny_llama):
    common = ("plan", "--model", tiny_llama, "--no-evaluate", "--assume", "rtx4090", "--layers", "1:7")
    result = streamprune(*common)
    assert result.code == 0, result.err
    lines = [re.split(r"\s{2,}", line) for line in result.out.splitlines()]
    header, row = (line for line in lines if line[0] in ("stage", "scoring moreau-gs"))
    assert header == ["stage", "GPU", "memory", "scratch", "read", "link", "written", "TFLOP", "seconds"]
    assert row[-1] == "0"
    assert "8 of 8 layers are kept" in result.out and "rtx4090 at 40%" in result.out
    refused = streamprune(*common, "--gpu-memory", "1MiB")
    assert refused.code == 1 and "of GPU memory (--gpu-memory), 1MiB are there" in refused.err


def test_gpu_memory_without_a_gpu_is_refused(streamprune, tiny_llama, output):
    arguments = ("--model", tiny_llama, "--output", output, "--device", "cpu", "--gpu-memory", "1GiB")
    result = streamprune(*arguments)
    assert result.code == 2 and "--gpu-memory: the run computes on a CPU; leave it out" in result.err


def test_measured_rates_are_kept_and_a_damaged_file_is_measured_anew(streamprune, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "MEASURE_SECONDS", 0.01)
    arguments = ("plan", "--model", tiny_llama, "--measure", "--no-evaluate", "--layers", "1:7")
    kept = tmp_path / "streamprune" / "rates.json"
    outputs = []
    for damage in ("", "", "{", "[]", {"speed": 1}, {"read": "fast"}, {"forward": 0.0}):
        if isinstance(damage, dict):
            rows = json.loads(kept.read_text()).items()
            kept.write_text(json.dumps({key: (row if "speed" not in damage else {}) | damage for key, row in rows}))
        elif damage:
            kept.write_text(damage)
        result = streamprune(*arguments)
        assert result.code == 0, result.err
        outputs.append(next(iter(json.loads(kept.read_text()).values())))
    assert outputs[0] == outputs[1] and outputs[1] not in outputs[2:]
    assert all(outputs[0][name] > 0 for name in ("read", "forward", "backward"))
    # A run with the same layers, threads and lengths then says when it expects to end.
    run = ("--model", tiny_llama, "--output", tmp_path / "out", "--no-evaluate", "--layers", "1:7", "--json-progress")
    events = [json.loads(line) for line in streamprune(*run).err.splitlines()]
    assert all(event["predicted_seconds"] > 0 for event in events if event["event"] == "stage")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--measure", "--assume", "l4"], "exclude each other"),
        (["--assume", "l4", "--device", "cpu"], "--device cpu is no l4; leave it or --assume l4 out"),
        (["--read-threads", "1"], "--read-threads 1: must be 2 to 8"),
        (["--reader", "mmap"], "--reader mmap: choose buffered or direct"),
        (["--host-memory", "0"], "--host-memory 0: must be at least 1"),
        (["--seq-len", "65"], "--seq-len 65: the model takes at most 64 positions"),
        (["--layers", "4:4"], "--layers 4:4 is empty"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(arguments, message, streamprune, tiny_llama):
    result = streamprune("plan", "--model", tiny_llama, *arguments)
    assert result.code == 2 and message in result.err


def test_a_card_that_is_assumed_need_not_be_here(streamprune, tiny_llama):
    plan = ("plan", "--model", tiny_llama, "--no-evaluate", "--assume", "l4", "--layers", "1:7")
    result = streamprune(*plan, "--device", "cuda")
    assert result.code == 0 and " on the GPU and " in result.out


def test_a_card_has_as_much_for_a_plan_as_a_run_takes_of_it(streamprune, tiny_llama, monkeypatch):
    """A run without a budget takes nine tenths of what is free."""
    plan = ("plan", "--model", tiny_llama, "--no-evaluate", "--layers", "1:7", "--host-memory", "64GiB")
    monkeypatch.setattr(run, "GPU_SHARE", 1e-6)
    refused = streamprune(*plan, "--assume", "l4")
    needed = re.search(r"needs at least (\d+)MiB of GPU memory .*\(scoring moreau-gs: ", refused.err)
    assert refused.code == 1 and needed
    for part, code in ((0.9, 1), (1.0, 0)):
        monkeypatch.setattr(run, "GPU_SHARE", part * int(needed[1]) / (24 << 10))
        assert streamprune(*plan, "--assume", "l4").code == code
    monkeypatch.undo()
    assert run.GPU_SHARE == 0.9
    assert streamprune(*plan, "--assume", "l4", "--gpu-memory", f"{needed[1]}MiB").code == 0


def test_a_scratch_that_is_a_file_or_full_is_refused_before_any_sweep(tiny_llama, tmp_path, monkeypatch):
    from streamprune.errors import OutputError

    (tmp_path / "file").write_text("")
    monkeypatch.setattr("streamprune.planning.placement.places", lambda config, gpu: ["scratch"])
    with pytest.raises(OutputError, match="file"):
        prune(config(tiny_llama, tmp_path / "out", scratch=tmp_path / "file"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000}))
    with pytest.raises(OutputError, match=r"1,000,000 bytes free"):
        prune(config(tiny_llama, tmp_path / "out", scratch=tmp_path / "new", samples=60, seq_len=64))


def test_a_plan_that_measures_counts_the_texts_too(tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "measured", lambda *arguments: rates.assumed("l4"))
    plain, measuring = (
        foretell(config(tiny_llama, tmp_path / "out"), measure=measure).placement.host_bytes
        for measure in (False, True)
    )
    assert abs(plain - measuring) < 40_000_000


@pytest.mark.parametrize("cache", ["file/cache", "a home that is not known"])
def test_rates_that_cannot_be_kept_are_of_use_all_the_same(cache, streamprune, tiny_llama, tmp_path, monkeypatch):
    monkeypatch.setattr(rates, "MEASURE_SECONDS", 0.01)
    (tmp_path / "file").write_text("a file")
    monkeypatch.chdir(tmp_path)
    if cache == "file/cache":
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / cache))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr("os.path.expanduser", lambda path: path)
        monkeypatch.setattr(Path, "home", lambda: pytest.fail("it raises where there is none"))
    result = streamprune("plan", "--model", tiny_llama, "--measure", "--no-evaluate", "--layers", "1:7")
    assert result.code == 0 and "measured here" in result.out


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("thin", [(0, 3), (5, 8)], ids=str)
def test_layers_that_go_are_planned_as_the_lightest(thin, contiguous, tiny_llama, tmp_path):
    """Where widths differ, nothing that goes leaves more to write."""
    prune(config(tiny_llama, tmp_path / "ragged", "magnitude", ratio=0.5, **{"layers": thin}))
    whole = {"layers": (0, 8), "ratio": 3 / 8, "contiguous": contiguous}
    options = config(tmp_path / "ragged", tmp_path / "out", "layer-ppl", "layers", **whole)
    planned = foretell(options)
    (lightest,) = re.findall(r"at least ([\d,]+) parameters", planned.text)
    with Checkpoint(tmp_path / "ragged") as checkpoint:
        sizes = Counter()
        for name, entry in checkpoint.tensors.items():
            if ".layers." in name:
                sizes[int(name.split(".")[2])] += math.prod(entry.shape)
    assert int(lightest.replace(",", "")) == sum(sorted(sizes.values())[:3])
    parameters = prune(options).facts["parameters"]
    assert parameters["before"] - parameters["after"] >= int(lightest.replace(",", ""))


def test_what_is_read_is_planned_with_the_page_cache_that_is_left(tiny_llama, tmp_path, monkeypatch):
    """What is kept in memory takes room from the page cache."""
    process = psutil.Process().memory_info().rss
    for spare in range(0, 400_000, 40_000):
        there = 60_000_000 + spare
        monkeypatch.setattr("streamprune.pipeline.run.available_memory", lambda there=there: there)
        seen = []
        original = placement._with_reading

        def spied(sweeper, found, slots, cache, original=original, seen=seen):
            seen.append((slots, cache))
            return original(sweeper, found, slots, cache)

        monkeypatch.setattr(placement, "_with_reading", spied)
        budget = process + 50_000_000 + spare
        found = foretell(config(tiny_llama, tmp_path / "out", host_memory=budget)).placement
        monkeypatch.setattr(placement, "_with_reading", original)
        assert (found.held.slots, found.page_cache) in seen


def test_the_package_s_own_text_is_counted_by_its_tokens(tiny_llama, tmp_path, monkeypatch):
    """A tokenizer of bytes makes five times as many of it as others do."""
    given = []
    settle = run._settle
    monkeypatch.setattr(run, "_settle", lambda *args, **more: given.append(args[3]) or settle(*args, **more))
    options = config(tiny_llama, tmp_path / "out", compensate=True)
    foretell(options)
    shape = prune(options).facts["compensation"]["tokens"]
    assert [list(work.repair) for work in given] == [shape, shape] and shape[0] * shape[1] > 20_000
    with pytest.raises(CalibrationError, match="24,113 tokens"):
        foretell(config(tiny_llama, tmp_path / "out", samples=100_000))


def test_a_small_vocabulary_does_not_send_all_tokens_through_the_head_at_once(tmp_path):
    """Of 2 x 504 floats that the norm makes of a token, beside 260 logits."""
    save_tiny(tmp_path / "in", "llama", hidden_size=504, vocab_size=260)
    skeleton = make_sweeper(tmp_path / "in").skeleton
    assert skeleton.head_tokens == (64 << 20) // (4 * 1008)
