"""A device whose streams run as late as they may: what proves that waits are enough, and that each is needed."""

import itertools
import threading
from functools import partial
from types import SimpleNamespace

import torch


class LatePool:
    """A pool of one thread that works as late as it may: when somebody waits, and then all that it was given before."""

    def __init__(self, *given, **options):
        self.queue, self.results = [], []

    def submit(self, work):
        self.queue.append(work)
        return SimpleNamespace(result=partial(self._result, len(self.queue) - 1))

    def _result(self, number):
        while len(self.results) <= number:
            self.results.append(self.queue[len(self.results)]())
        return self.results[number]

    def shutdown(self, cancel_futures): ...


class FakeDevice:
    """Streams of queued work that runs only when somebody waits for it, then in the order least expected.

    An event is a (stream, length of its queue); finishing it runs that stream up to there, and what the queued waits
    ask of other streams first. `without` names a wait that the device forgets. `late` is the stream that runs last: of
    the copy streams, in the order in which they were made, "copy", "copy 1" and so on. `registers`: not, if it refuses
    to register host memory.
    """

    direct, read_threads = False, 2

    def __init__(self, without=None, late="copy", registers=True):
        self.without, self.late, self.registers = without, late, registers
        self.stream, self.numbers = "copy", itertools.count(1)
        self.queues, self.done = {"compute": [], "copy": []}, {"compute": 0, "copy": 0}
        self.lock = threading.RLock()

    def another(self):
        """The same device, with a copy stream of its own."""
        other = type(self).__new__(type(self))
        other.__dict__ = {**self.__dict__, "stream": f"copy {next(self.numbers)}"}
        self.queues[other.stream], self.done[other.stream] = [], 0
        return other

    def buffer(self, nbytes):
        return torch.full((nbytes,), 0xFF, dtype=torch.uint8)

    chunk = buffer

    def arena(self, nbytes):
        return self.buffer(nbytes), self.registers

    def release(self, arena): ...

    def queue(self, stream, work):
        with self.lock:
            self.queues[stream].append(work)
            return stream, len(self.queues[stream])

    def event(self, stream):
        with self.lock:
            return stream, len(self.queues[stream])

    def finish(self, event):
        stream, length = event
        with self.lock:
            while self.done[stream] < length:
                work = self.queues[stream][self.done[stream]]
                self.done[stream] += 1
                work()

    def finish_all(self):
        for stream in sorted(self.queues, key=lambda stream: stream == self.late):
            self.finish(self.event(stream))

    def copy(self, target, source):
        return self.queue(self.stream, lambda: target.copy_(source))

    def record_copied(self):
        return self.event(self.stream)

    def record_consumed(self):
        return self.event("compute")

    def compute_waits(self, copied):
        if self.without != "copied":
            self.queue("compute", lambda: self.finish(copied))

    def copy_waits(self, consumed):
        if self.without != "consumed" or consumed[0] != "compute":
            self.queue(self.stream, lambda: self.finish(consumed))

    def chunk_free(self, event):
        if self.without != "chunk":
            self.finish(event)


class Immediate(FakeDevice):
    """A device that computes at once, and copies when compute waits for it."""

    def compute_waits(self, copied):
        self.finish(copied)
