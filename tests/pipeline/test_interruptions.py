"""Ctrl-C and memory that runs out end in one line, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from concurrent.futures import Future

import pytest
import torch
from cli_runner import COMMAND, SHORT, Outcome, environment, running_threads, snapshot
from marks import slow

from streamprune.streaming.binder import Binder


def check_interrupted(result: Outcome) -> None:
    """A clean line; the empty one before it ends the terminal's "^C"."""
    assert result.code == 1
    assert result.out == ""
    assert result.err.strip() == "streamprune: interrupted; no output was written"
    assert not running_threads()


@pytest.mark.parametrize("writes", [0, 3, 70])
def test_ctrl_c_while_writing_leaves_nothing(writes, streamprune, model, output, tmp_path, monkeypatch):
    from streamprune.storage.shards import ShardedWriter

    original, done, seen = ShardedWriter.write, [], []

    def write(self, name, tensor):
        if len(done) == writes:
            seen.extend(output.parent.iterdir())
            signal.raise_signal(signal.SIGINT)
        done.append(name)
        original(self, name, tensor)

    monkeypatch.setattr(ShardedWriter, "write", write)
    before = snapshot(tmp_path)
    check_interrupted(streamprune("--model", model, "--output", output, "--method", "random", "--quiet"))
    assert writes <= len(done) <= writes + 9  # the tensors of a layer are written together
    assert len(seen) >= 1, "there was a temporary directory to remove"
    assert snapshot(tmp_path) == before


def test_an_error_that_a_library_puts_in_the_place_of_ctrl_c_is_ctrl_c(streamprune, model, output, monkeypatch):
    from streamprune.storage.shards import ShardedWriter

    def write(self, name, tensor):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr(ShardedWriter, "write", write)
    monkeypatch.setattr("streamprune.output.writer.WRITERS", 1)
    monkeypatch.setattr("streamprune.output.writer.ThreadPoolExecutor", AtOnce)
    check_interrupted(streamprune("--model", model, "--output", output, "--method", "random", "--quiet"))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class AtOnce:
    """An executor that computes in the main thread, where signals come."""

    def __init__(self, *arguments, **options): ...

    def submit(self, function, *arguments):
        done = Future()
        done.set_result(function(*arguments))
        return done

    def shutdown(self, **options): ...


def test_ctrl_c_while_the_reader_is_waited_for_leaves_nothing(streamprune, model, output, tmp_path, monkeypatch):
    original, reads = os.preadv, []

    def preadv(descriptor, buffers, offset):
        if threading.current_thread() is not threading.main_thread():
            reads.append(offset)
            if len(reads) == 20:  # of the third layer, so that the main thread has taken the first
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.2)
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    before = snapshot(tmp_path)
    check_interrupted(streamprune("--model", model, "--output", output, "--quiet", *SHORT))
    assert len(reads) >= 20
    assert snapshot(tmp_path) == before


def test_ctrl_c_while_the_filling_thread_starts_leaves_no_thread(streamprune, model, output, monkeypatch):
    """A thread that is left waits for ever, and the process with it."""
    original = threading.Thread.start

    def start(self):
        if self.name != "streamprune-pager":
            return original(self)
        self.daemon = True  # so that a failure of this test cannot keep pytest from ending
        original(self)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(threading.Thread, "start", start)
    check_interrupted(streamprune("--model", model, "--output", output, "--quiet", *SHORT))


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_signal_in_the_middle_of_scoring_ends_a_real_process_cleanly(number, model, output, tmp_path):
    before = snapshot(tmp_path)
    options = ["--method", "moreau", "--set", "steps=20000", *SHORT]
    with subprocess.Popen(
        [*COMMAND, "--model", str(model), "--output", str(output), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        try:
            assert process.stderr is not None
            lines = []
            for line in process.stderr:  # the stage before scoring says when it is done
                lines.append(line)
                if line.startswith("perplexity before:"):
                    break
            time.sleep(0.5)
            process.send_signal(number)
            start = time.perf_counter()
            out, rest = process.communicate(timeout=20)
        finally:
            process.kill()
    assert lines[-1].startswith("perplexity before:"), "".join(lines)
    assert time.perf_counter() - start < 5
    assert process.returncode == 1
    assert out == ""
    assert rest.strip() == "streamprune: interrupted; no output was written"
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_memory_that_runs_out_is_one_line(error, refused, model, monkeypatch):
    def exhausted(*arguments, **options):
        raise error

    monkeypatch.setattr("streamprune.streaming.sweeper.Sweeper.forward", exhausted)
    refused(model, code=1, names=("out of memory in perplexity before",), remedy="lower --micro-batch")


def test_memory_that_runs_out_in_a_layer_names_it_with_what_was_wanted_and_is_free(refused, model, monkeypatch):
    original = Binder.bind

    def bind(self, page, *given, **options):
        if page.layer == 3 and given and given[0] is None and options:  # not when the dense model is evaluated
            raise torch.OutOfMemoryError(
                "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which "
                "512.00 MiB is free. 22.00 GiB allowed; Process 7 has 1.00 GiB memory in use."
            )
        return original(self, page, *given, **options)

    monkeypatch.setattr(Binder, "bind", bind)
    where = "out of memory in layer 3 of scoring moreau-gs: 2.00 GiB were asked for, 512.00 MiB are free;"
    refused(model, code=1, names=(where, "or raise --gpu-memory"), remedy="lower --micro-batch")


def test_an_output_whose_report_was_interrupted_is_said_to_be_whole(streamprune, model, output, monkeypatch):
    def interrupted(directory):
        raise KeyboardInterrupt

    monkeypatch.setattr("streamprune.reports.report.report", interrupted)
    options = ("--method", "random", "--no-evaluate", "--quiet", "--report")
    result = streamprune("--model", model, "--output", output, *options)
    assert result.code == 1 and result.err.strip().endswith(f"interrupted; {output} is whole, its report is not there")
    assert (output / "streamprune.json").is_file()
