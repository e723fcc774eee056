"""Threads, queues and executors in virtual time: real code runs in them, and a clock says how long it would have taken.

Each thread has a clock of its own, which only `World.spend` and `World.until` advance. One runs at a time, always the
one whose clock is earliest, so that a run is the same each time. What passes from thread to thread (an item of a queue,
a future's result, word of a condition) carries its time along: whoever waits for it is not earlier afterwards.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

Ready = Callable[[], float | None]  # the time at which what is waited for has happened, None if it has not


class _Actor:
    """Thread of the world: its clock, and what it waits for."""

    def __init__(self, time: float) -> None:
        self.time, self.ready, self.go = time, _at_once, threading.Semaphore(0)


def _at_once() -> float:
    return 0.0


class World:
    """Scheduler of threads in virtual time.

    Attributes:
        inside: makes the context that a new thread runs in.
    """

    def __init__(self) -> None:
        self._main = self._current = _Actor(0.0)
        self._actors, self._closed = [self._current], False
        self.inside: Callable[[], AbstractContextManager[object]] = nullcontext

    @property
    def now(self) -> float:
        """Time of the running thread, in seconds."""
        return self._current.time

    @property
    def in_main(self) -> bool:
        """Tell whether the thread runs that made the world."""
        return self._current is self._main

    def spend(self, seconds: float) -> None:
        """Let the running thread take some time."""
        self._current.time += seconds

    def until(self, time: float) -> None:
        """Let the running thread wait for a time that is known."""
        self._current.time = max(self._current.time, time)

    def turn(self) -> None:
        """Let threads that are earlier go first: before something is taken that they might take."""
        self.wait(_at_once)

    def wait(self, ready: Ready) -> None:
        """Let the running thread wait until `ready` gives a time."""
        if self._closed:
            raise SystemExit
        me = self._current
        me.ready = ready
        self._go_on(me)
        me.ready = _at_once

    def start(self, run: Callable[[], object]) -> None:
        """Start a thread at the time of the one that runs."""
        actor = _Actor(self.now)

        def work() -> None:
            actor.go.acquire()
            if self._closed:
                return
            try:
                with self.inside():
                    run()
            except SystemExit:
                return  # the world was closed
            self._actors.remove(actor)
            self._go_on(None)

        self._actors.append(actor)
        threading.Thread(target=work, daemon=True).start()

    def close(self) -> None:
        """End all threads that still wait."""
        self._closed = True
        for actor in self._actors:
            actor.go.release()

    def _go_on(self, me: _Actor | None) -> None:
        """Let the earliest thread run that can, and come back when that is `me`."""
        chosen, first = None, 0.0
        for actor in self._actors:
            at = actor.ready()
            if at is not None:
                at = max(at, actor.time)
                if chosen is None or at < first or (at == first and actor is me):
                    chosen, first = actor, at
        assert chosen is not None, "all threads wait for each other"
        chosen.time, self._current = first, chosen
        if chosen is not me:
            chosen.go.release()
            if me is not None:
                me.go.acquire()
                if self._closed:
                    raise SystemExit


class Thread:
    """`threading.Thread`, as far as paging uses it."""

    def __init__(self, world: World, target: Callable[..., object], args: tuple[Any, ...] = (), **named: Any) -> None:
        self._world, self._run, self._ended, self.ident = world, lambda: target(*args), [], None

    def start(self) -> None:
        def run() -> None:
            self._run()
            self._ended.append(self._world.now)

        self.ident = id(self)
        self._world.start(run)

    def join(self) -> None:
        self._world.wait(lambda: self._ended[0] if self._ended else None)


class Queue:
    """`queue.Queue` without a limit."""

    def __init__(self, world: World) -> None:
        self._world, self._items = world, deque[tuple[float, Any]]()

    def put(self, item: Any) -> None:
        self._world.turn()
        self._items.append((self._world.now, item))

    def get(self) -> Any:
        self._world.wait(lambda: self._items[0][0] if self._items else None)
        return self._items.popleft()[1]


class Condition:
    """`threading.Condition`. One thread runs at a time, so there is no lock; a thread that is ahead of others lets them
    look first at what it is about to change.
    """

    def __init__(self, world: World) -> None:
        self._world, self._told = world, 0.0

    def __enter__(self) -> Condition:
        self._world.turn()
        return self

    def __exit__(self, *exc: object) -> None: ...

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        if not predicate():
            self._world.wait(lambda: self._told if predicate() else None)

    def notify(self) -> None:
        self._told = self._world.now

    notify_all = notify


class Future:
    """`concurrent.futures.Future` of an `Executor`."""

    def __init__(self, world: World) -> None:
        self._world, self._done = world, list[float]()
        self._value: Any = None
        self._error: BaseException | None = None

    def work(self, run: Callable[[], Any]) -> None:
        """Run, and keep the result."""
        try:
            self._value = run()
        except SystemExit:
            raise
        except BaseException as error:
            self._error = error
        self._done.append(self._world.now)

    def done(self) -> bool:
        return bool(self._done)

    def result(self) -> Any:
        self._world.wait(lambda: self._done[0] if self._done else None)
        if self._error is not None:
            raise self._error
        return self._value


class Executor:
    """`ThreadPoolExecutor`; its threads start when there is work for them."""

    def __init__(self, world: World, max_workers: int = 1, thread_name_prefix: str = "") -> None:
        self._world, self._most, self._threads, self._idle = world, max_workers, list[Thread](), 0
        self._tasks, self._shut = deque[tuple[float, Future, Callable[[], Any]]](), list[float]()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()

    def submit(self, run: Callable[..., Any], *args: Any, **named: Any) -> Future:
        assert not self._shut, "work after the end"
        future = Future(self._world)
        self._tasks.append((self._world.now, future, lambda: run(*args, **named)))
        if len(self._tasks) > self._idle and len(self._threads) < self._most:
            thread = Thread(self._world, self._work)
            self._threads.append(thread)
            thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._shut.append(self._world.now)
        if cancel_futures:
            self._tasks.clear()
        for thread in self._threads if wait else ():
            thread.join()

    def _work(self) -> None:
        while True:
            self._idle += 1
            self._world.wait(self._something)
            self._idle -= 1
            if not self._tasks:
                return
            _, future, run = self._tasks.popleft()
            future.work(run)

    def _something(self) -> float | None:
        if self._tasks:
            return self._tasks[0][0]
        return self._shut[0] if self._shut else None


class Engine:
    """What does one thing at a time: a direction of the link, a disk.

    Attributes:
        busy: seconds that it has worked.
    """

    def __init__(self) -> None:
        self.busy, self._taken = 0.0, list[tuple[float, float]]()  # when it works, in order, with gaps between

    def take(self, ready: float, seconds: float) -> float:
        """Do work of some seconds from `ready` on, in the first gap that it fits into; return when it is through."""
        self.busy += seconds
        start, place = ready, 0
        while place < len(self._taken) and start + seconds > self._taken[place][0]:
            start, place = max(start, self._taken[place][1]), place + 1
        if place and self._taken[place - 1][1] == start:
            self._taken[place - 1] = self._taken[place - 1][0], start + seconds
        else:
            self._taken.insert(place, (start, start + seconds))
            del self._taken[:-64]  # those long past
        return start + seconds


@contextmanager
def replaced(modules: str, **things: tuple[object, object]) -> Iterator[None]:
    """Put other things in the place of names, wherever a module whose name begins with `modules` has the old thing."""
    import sys

    before = []
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith(modules):
            for name, (old, new) in things.items():
                if getattr(module, name, None) is old:
                    before.append((module, name, old))
                    setattr(module, name, new)
    try:
        yield
    finally:
        for module, name, old in before:
            setattr(module, name, old)


def virtual_threads(world: World) -> dict[str, tuple[object, object]]:
    """List what stands for the names by which paging makes threads, for `replaced`."""
    import concurrent.futures
    import functools
    import queue

    def of(kind: Any) -> Any:
        return functools.partial(kind, world)

    return {
        "ThreadPoolExecutor": (concurrent.futures.ThreadPoolExecutor, of(Executor)),
        "queue": (queue, SimpleNamespace(Queue=of(Queue), SimpleQueue=of(Queue))),
        "threading": (threading, SimpleNamespace(Thread=of(Thread), Condition=of(Condition), Lock=nullcontext)),
    }
