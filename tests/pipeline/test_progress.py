"""What a run says while it works: figures by a clock of the test's own, and what comes out of the command line."""

from __future__ import annotations

import io
import json
import signal

import pytest
from cli_runner import SHORT
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from streamprune.pipeline.progress import Progress

GB = 10**9
STAGE_FIELDS = {"event", "stage", "total_bytes", "predicted_seconds"}
FIGURES = {"event", "stage", "layer", "bytes", "total_bytes", "bytes_read", "bytes_per_second", "waiting_share"} | {
    "eta_seconds",
    "elapsed_seconds",
    "peak_rss",
}


class Clock:
    """Seconds that pass when the test says so."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Run:
    """A Progress on a clock and a stream of its own."""

    def __init__(self, stream: io.StringIO | None = None, **options: bool) -> None:
        self.clock, self.stream = Clock(), stream or io.StringIO()
        self.progress = Progress(self.stream, clock=self.clock, **options)

    def layer(self, seconds: float, nbytes: int = GB, **facts: float) -> None:
        self.clock.now += seconds
        self.progress.advance(nbytes, **facts)

    @property
    def lines(self) -> list[str]:
        return self.stream.getvalue().splitlines()

    def events(self, kind: str) -> list[dict]:
        return [event for event in map(json.loads, self.lines) if event["event"] == kind]


def etas(predicted: float | None, seconds: float, layers: int = 4) -> list[float]:
    """The ETA after each of `layers` layers that take `seconds` each, by a plan of `predicted` for all of them."""
    run = Run(as_json=True)
    with run.progress.stage("scoring", layers * GB, predicted):
        for _ in range(layers):
            run.layer(seconds)
    return [event["eta_seconds"] for event in run.events("progress")]


# Figures.


def test_rate_and_waiting_share_are_over_the_stage_so_far():
    run = Run(as_json=True)
    with run.progress.stage("scoring", 4 * GB):
        run.layer(2.0, layer=7, waited=1.0)
        run.layer(6.0, layer=8, waited=1.0)
        run.clock.now += 2.0
    first, second = run.events("progress")
    assert (first["layer"], first["bytes"], first["elapsed_seconds"]) == (7, GB, 2.0)
    assert (first["bytes_per_second"], first["waiting_share"]) == (GB / 2, 0.5)
    assert (second["layer"], second["bytes"], second["bytes_per_second"]) == (8, 2 * GB, GB / 4)
    assert second["waiting_share"] == 0.25
    (done,) = run.events("done")
    assert (done["elapsed_seconds"], done["bytes_per_second"], done["waiting_share"]) == (10.0, GB / 5, 0.2)


def test_layers_that_were_in_memory_count_as_done_and_not_as_read():
    run = Run(as_json=True)
    with run.progress.stage("scoring", 2 * GB):
        run.layer(2.0, read=0)
        run.layer(2.0, read=GB)
    first, second = run.events("progress")
    assert (first["bytes"], first["bytes_read"], first["bytes_per_second"]) == (GB, 0, 0.0)
    assert (second["bytes"], second["bytes_read"], second["bytes_per_second"]) == (2 * GB, GB, GB / 4)
    assert first["eta_seconds"] == 2.0, "of what is to be done, read or not"


def test_each_stage_begins_anew_and_what_is_read_outside_of_one_is_not_counted():
    run = Run(as_json=True)
    for name in ("scoring", "writing"):
        with run.progress.stage(name, GB):
            run.layer(2.0, layer=3, waited=1.0)
        run.layer(50.0, waited=50.0)
    for done in run.events("done"):
        assert (done["bytes"], done["elapsed_seconds"], done["waiting_share"]) == (GB, 2.0, 0.5)


def test_without_a_plan_the_eta_is_what_is_left_over_the_measured_rate():
    assert etas(None, 3.0) == [9.0, 6.0, 3.0, 0.0]
    run = Run(as_json=True)
    with run.progress.stage("scoring", 4 * GB):
        run.layer(2.0, nbytes=0)
    assert run.events("progress")[0]["eta_seconds"] is None, "nothing is known yet"


def test_steps_of_a_method_are_told_with_an_eta_by_what_the_last_ones_took():
    run = Run(as_json=True)
    with run.progress.stage("scoring", GB):
        for step in range(1, 101):
            # An earlier run has made 20 of them, which are only told of.
            run.clock.now += 0.0 if step <= 20 else 3.0
            run.progress.note(step, 100, loss=4.5)
    told = run.events("step")
    assert [each["step"] for each in told] == list(range(1, 101))
    assert (told[0]["steps"], told[0]["loss"], told[0]["eta_seconds"]) == (100, 4.5, None), "nothing is known yet"
    assert [told[step - 1]["eta_seconds"] for step in (20, 22, 90, 100)] == [None, 234.0, 30.0, 0.0]


@pytest.mark.parametrize("shared", [16, 100])
def test_steps_that_shared_a_pass_are_told_at_once(shared):
    """At the first of a burst up to one pass too much is left, at its last one the truth."""
    run = Run(as_json=True)
    with run.progress.stage("scoring", GB):
        for step in range(1, 801):
            run.clock.now += 10.0 * shared if step % shared == 1 else 0.0
            run.progress.note(step, 800)
    told = [each["eta_seconds"] for each in run.events("step")]
    assert told[2 * shared - 1] is None
    for step in range(2 * shared + 1, 801):
        through = -(-step // shared) * shared
        assert 0 <= told[step - 1] - 10.0 * (800 - through) < 10.0 * shared


def test_people_are_told_of_a_step_now_and_then():
    run = Run()
    with run.progress.stage("scoring", GB):
        for step in range(1, 5):
            run.clock.now += 10.0
            run.progress.note(step, 40, loss=4.5, kept=1e6)
    assert run.lines[:2] == [
        "scoring: step 1 of 40, loss 4.5, kept 1e+06",
        "scoring: step 3 of 40, loss 4.5, kept 1e+06, ETA 6:10",
    ]


def test_a_plan_that_is_right_is_the_eta_at_any_time():
    assert etas(12.0, 3.0) == [9.0, 6.0, 3.0, 0.0]


@pytest.mark.parametrize(
    ("seconds", "expected"), [(6.0, [11.25, 9.0, 5.25, 0.0]), (1.5, [7.875, 4.5, 1.875, 0.0])], ids=["half", "double"]
)
def test_a_plan_that_is_wrong_is_corrected_by_what_is_measured(seconds, expected):
    """By hand: halfway 6 of the plan's 12 s are left; measured twice as long, they become 1.5 times as many, 9 s."""
    now = etas(12.0, seconds)
    assert now == expected
    errors = [abs(eta / (seconds * left) - 1) for eta, left in zip(now, (3, 2, 1), strict=False)]
    assert errors == sorted(errors, reverse=True), "nearer to the truth with every layer"


def test_the_eta_is_the_plan_at_the_start_and_never_negative():
    run = Run(as_json=True)
    with run.progress.stage("scoring", 4 * GB, 12.0):
        run.layer(1.0, nbytes=0)
        for _ in range(5):  # one more than was announced
            run.layer(50.0)
    first, *later = [event["eta_seconds"] for event in run.events("progress")]
    assert first == 12.0
    assert all(eta >= 0 for eta in later)
    assert later[-1] == 0.0


# Lines, events and bars.


def test_events_come_at_most_once_a_second_and_the_last_one_always():
    run = Run(as_json=True)
    with run.progress.stage("scoring", 25 * GB):
        for _ in range(25):
            run.layer(0.125)
    assert [event["elapsed_seconds"] for event in run.events("progress")] == [1.0, 2.0, 3.0, 3.125]


def test_lines_come_at_most_every_15_seconds():
    run = Run()
    with run.progress.stage("scoring taylor", 1000 * GB):
        for _ in range(93):
            run.layer(0.5, layer=3)
    assert [line.split(",")[0] for line in run.lines[:-1]] == [f"scoring taylor: {share}%" for share in (3, 6, 9)]


def test_a_line_says_where_the_stage_stands_and_the_last_what_it_took(monkeypatch):
    monkeypatch.setattr(
        "streamprune.paging.device.peaks", lambda: {"peak_rss": 2_300_000_000, "peak_gpu": 4_100_000_000}
    )
    run = Run()
    with run.progress.stage("scoring moreau-gs", 100 * GB):
        run.layer(35.0, nbytes=42 * GB, layer=17, waited=4.2)
        run.layer(5.0, nbytes=58 * GB, waited=1.8)
    assert run.lines == [
        "scoring moreau-gs: 42%, layer 17, 1.2 GB/s, waiting for reads 12%, ETA 0:48, peak memory 2.3 GB (GPU 4.1 GB)",
        "scoring moreau-gs: 40.0 s, 100 GB read, 2.5 GB/s, waiting for reads 15%, peak memory 2.3 GB (GPU 4.1 GB)",
    ]


@pytest.mark.parametrize(("left", "text"), [(5, "0:05"), (200, "3:20"), (754, "12:34"), (3723, "1:02:03")])
def test_the_eta_is_said_in_minutes(left, text):
    run = Run()
    with run.progress.stage("scoring", 2 * GB):
        run.layer(left) if left >= 15 else run.layer(15.0, nbytes=2 * GB * 15 // (15 + left))
    assert f"ETA {text}," in run.lines[0]


def test_a_stage_that_reads_nothing_says_no_rate():
    run = Run()
    with run.progress.stage("scoring random", 0):
        run.clock.now += 1.0
    (line,) = run.lines
    assert line.startswith("scoring random: 1.0 s, 0 B read, peak memory ")


def test_a_terminal_gets_a_bar_and_the_closing_line():
    run = Run(Terminal())
    with run.progress.stage("scoring taylor", 4 * GB):
        for layer in range(4):
            run.layer(30.0, layer=layer, waited=3.0)
            run.progress._stage.bar.refresh()  # which tqdm does by its own clock
    bars = [part for part in run.stream.getvalue().split("\r") if "|" in part]
    assert "scoring taylor:  25%|##" in bars[1]
    assert "layer 0, 33.3 MB/s, waiting for reads 10%, ETA 1:30, peak memory " in bars[1]
    assert "scoring taylor: 100%|####" in bars[-1]
    assert run.stream.getvalue().endswith(run.lines[-1] + "\n")
    assert "scoring taylor: 120.0 s, 4 GB read, 33.3 MB/s" in run.lines[-1]


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_is_printed_when_quiet(stream, as_json):
    run = Run(stream(), quiet=True, as_json=as_json)
    run.progress.say("hello")
    with run.progress.stage("scoring", 2 * GB, 10.0):
        run.layer(100.0)
        run.layer(100.0)
    assert run.stream.getvalue() == ""


def test_a_terminal_gets_json_and_no_bar_when_asked_to():
    run = Run(Terminal(), as_json=True)
    run.progress.say("two\nlines")
    with run.progress.stage("scoring", GB, 10.0):
        run.layer(5.0)
    assert [json.loads(line)["event"] for line in run.lines] == ["message", "stage", "progress", "done"]
    assert json.loads(run.lines[0])["text"] == "two\nlines"


# The command line.


def parse(err: str) -> list[dict]:
    return [json.loads(line) for line in err.splitlines()]


def test_json_progress_of_a_prune_has_every_stage_with_all_fields(streamprune, tiny_llama, output):
    result = streamprune("--model", tiny_llama, "--output", output, "--method", "taylor", *SHORT, "--json-progress")
    assert result.code == 0
    assert f"wrote {output} (ragged)" in result.out
    events = parse(result.err)
    assert any("137,520 parameters" in event["text"] for event in events if event["event"] == "message")
    stages = ["perplexity before", "scoring taylor", "writing", "perplexity after"]
    for kind, fields in (("stage", STAGE_FIELDS), ("progress", FIGURES), ("done", FIGURES)):
        of_kind = [event for event in events if event["event"] == kind]
        assert list(dict.fromkeys(event["stage"] for event in of_kind)) == stages  # a slow machine says more of each
        assert all(event.keys() - {"peak_gpu"} == fields for event in of_kind)
    for event in events:
        if event["event"] in ("progress", "done"):
            assert (event["eta_seconds"] == 0.0 or event["event"] == "progress") and event["elapsed_seconds"] > 0
            assert event["bytes_per_second"] > 0 and 0 <= event["waiting_share"] <= 1


def test_json_progress_of_eval(streamprune, tiny_llama):
    result = streamprune("eval", "--model", tiny_llama, "--seq-len", "16", "--samples", "4", "--json-progress")
    assert result.code == 0
    assert result.out.startswith("perplexity ")
    assert [event["event"] for event in parse(result.err)] == ["stage", "progress", "done"]


METHODS_AND_PATTERNS = [
    ("taylor",),
    ("taylor", "--granularity", "weights"),
    ("moreau-gs", "--set", "steps=3"),
    ("gblm",),
    ("magnitude",),
    ("random",),
    ("wanda", "--granularity", "weights"),
    ("wanda", "--layers", "2:5"),
    ("sparsegpt", "--granularity", "weights", "--layers", "2:5"),
    ("flap",),
    ("layer-ppl", "--granularity", "layers", "--layers", "1:6"),
    ("block-influence", "--granularity", "layers", "--layers", "1:6"),
]
REPAIRS = [
    ("block-influence", "--granularity", "layers", "--layers", "1:6", "--compensate", "--compensate-tokens", "64"),
    ("taylor", "--compensate", "--compensate-tokens", "64"),
]


@pytest.mark.parametrize(
    "options",
    [*METHODS_AND_PATTERNS, *REPAIRS],
    ids=" ".join,
)
def test_every_stage_passes_the_bytes_that_it_announces(options, streamprune, tiny_llama, output):
    result = streamprune(
        "--model", tiny_llama, "--output", output, "--method", *options, *SHORT, "--json-progress", "--no-evaluate"
    )
    assert result.code == 0, result.err
    done = [event for event in parse(result.err) if event["event"] == "done"]
    assert done[0]["stage"] == f"scoring {options[0]}"
    for event in done:
        assert event["bytes"] == event["total_bytes"], event["stage"]


def test_layers_left_out_in_several_passes_take_the_bytes_that_are_announced(
    streamprune, tiny_llama, output, monkeypatch
):
    monkeypatch.setattr("streamprune.streaming.statistics.STREAM_BYTES", 2 * 2 * 16 * 48 * 4)  # two layers at a time
    options = ("--method", "layer-ppl", "--granularity", "layers", "--layers", "1:6", "--no-evaluate")
    result = streamprune("--model", tiny_llama, "--output", output, *options, *SHORT, "--json-progress")
    scoring = next(event for event in parse(result.err) if event["event"] == "done")
    assert scoring["bytes"] == scoring["total_bytes"]


def test_an_evaluation_passes_the_bytes_that_it_announces(streamprune, tiny_llama, monkeypatch):
    monkeypatch.setattr("streamprune.streaming.perplexity.HIDDEN_BYTES", 3 * 16 * 48 * 4)  # three segments at a time
    result = streamprune("eval", "--model", tiny_llama, "--seq-len", "16", "--samples", "7", "--json-progress")
    *_, done = parse(result.err)
    assert done["bytes"] == done["total_bytes"] > 0


@pytest.mark.parametrize("command", [("--output", "x"), ("eval",)])
def test_quiet_and_json_progress_exclude_each_other(command, streamprune, tiny_llama):
    result = streamprune(*command, "--model", tiny_llama, "--quiet", "--json-progress")
    (event,) = parse(result.err)
    assert result.code == 2
    assert result.out == ""
    assert event["event"] == "error"
    assert all(word in event["message"] for word in ("--quiet", "--json-progress", "leave"))


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (("--ratio", "7"), 2, "ratio"),
        (("--rato", "0.2"), 2, "No such option"),
        (("--calibration", "/nowhere/x.txt"), 1, "/nowhere/x.txt"),
    ],
    ids=["usage", "click", "run"],
)
def test_an_error_is_the_last_event_and_keeps_its_exit_code(options, code, words, streamprune, tiny_llama, output):
    result = streamprune("--model", tiny_llama, "--output", output, *options, "--json-progress")
    assert result.code == code
    assert result.out == ""
    last = parse(result.err)[-1]
    assert last.keys() == {"event", "message"}
    assert last["event"] == "error" and words in last["message"]


def test_debug_puts_the_traceback_into_the_event(streamprune, tiny_llama, output):
    result = streamprune("--model", tiny_llama, "--output", output, "--ratio", "7", "--json-progress", "--debug")
    (event,) = parse(result.err)
    assert event["traceback"].startswith("Traceback (most recent call last)")


def test_ctrl_c_in_a_stage_ends_in_an_error_event(streamprune, tiny_llama, output, monkeypatch):
    monkeypatch.setattr(
        "streamprune.streaming.sweeper.Sweeper.backward",
        lambda *arguments, **options: signal.raise_signal(signal.SIGINT),
    )
    result = streamprune("--model", tiny_llama, "--output", output, "--method", "taylor", *SHORT, "--json-progress")
    assert result.code == 1
    events = parse(result.err)
    assert events[-1] == {"event": "error", "message": "interrupted; no output was written"}
    assert "scoring taylor" not in [event["stage"] for event in events if event["event"] == "done"]


def test_json_progress_turns_the_hubs_own_bars_off(streamprune, tiny_llama):
    try:
        enable_progress_bars()
        streamprune("eval", "--model", tiny_llama, "--seq-len", "16", "--samples", "1", "--json-progress")
        assert are_progress_bars_disabled()
    finally:
        enable_progress_bars()
