"""Journal of a run: after every layer of every sweep, what it takes to go on from there.

A directory beside the output holds what methods keep between sweeps, the scores so far, the hidden states or
gradient that the sweep carries, and journal.json, which names the files that count. Files are written under new names,
synced, and named by a journal that takes its place in one rename; what no journal names is removed. A run that goes on
calls its sweeps in the same order: those that are through return at once, the one that was cut short begins behind the
last layer that it finished.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from streamprune.errors import JournalError, OutputError, UsageError
from streamprune.storage.directory import sync_path

JOURNAL, LOCK = "journal.json", "lock"
END = -1  # the layer of a sweep that is through
Key = tuple[int, str]


class Scores(Protocol):
    """Interface of scores that can be saved layer by layer."""

    def layer_state(self, layer: int) -> dict[str, Tensor]:
        """Return the tensors that hold a layer's scores, by name."""

    def load_layer(self, layer: int, state: dict[str, Tensor]) -> None:
        """Take back what `layer_state` gave."""


@dataclass(frozen=True)
class Point:
    """Place at which a sweep goes on.

    Attributes:
        layer: the last one that is finished; END if the whole sweep is.
        carry: what it handed on, by name: pieces of hidden states on the CPU, some sequences after others. They are
            read as they are asked for, and are gone with the next commit.
        loss: loss of a sweep's forward half, where the sweep has one and is the last that was begun.
    """

    layer: int
    carry: Mapping[str, Iterator[Tensor]]
    loss: float | None


class Journal:
    """Journal of one run, in a directory that no other run can use meanwhile.

    Args:
        directory: made if need be.
        fingerprint: everything that decides the bytes that come out, by name.

    Attributes:
        facts: figures of the run that are saved with every commit.
        before_commit: called before a commit counts: to sync or bring what lies elsewhere.

    Raises:
        UsageError: the journal there is of another run; names what differs.
        OutputError: the directory cannot be written, or another run uses it.
        JournalError: the journal is damaged.
    """

    def __init__(self, directory: Path, fingerprint: dict[str, Any]) -> None:
        self.directory = directory
        self.facts: dict[str, Any] = {}
        self.before_commit: list[Callable[[], None]] = []
        self._sweep, self._number = -1, 0
        self._files: dict[str, str] = {}  # what is saved: the file that holds it
        self._point: tuple[int, int, float | None] | None = None  # sweep, layer, loss
        self._scores: Scores | None = None
        # As it comes back from a file, so that the two can be compared: tuples become lists there.
        fingerprint = json.loads(json.dumps(fingerprint))
        with self._told():
            directory.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (directory / JOURNAL).is_file():
                self._load(fingerprint)
        except BlockingIOError:
            os.close(self._lock)
            raise OutputError(
                f"{directory} is in use by another run; wait for it, or choose another --output"
            ) from None
        except OSError as error:  # some network filesystems have no locks
            os.close(self._lock)
            reason = f"{directory} cannot be kept to one run ({error.strerror})"
            raise OutputError(f"{reason}; choose an --output on another disk, or leave --resume out") from error
        except BaseException:
            os.close(self._lock)
            raise
        self._fingerprint = fingerprint
        self._remove_unnamed()

    def _load(self, fingerprint: dict[str, Any]) -> None:
        file = self.directory / JOURNAL
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            theirs, self.facts, self._files = saved["fingerprint"], saved["facts"], saved["files"]
            self._number, point = saved["number"], saved["point"]
            self._point = None if point is None else tuple(point)
            names = sorted(theirs.keys() | fingerprint.keys())
            lost = [each for each in self._files.values() if not (self.directory / each).is_file()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise JournalError(f"{file} is damaged; remove {self.directory} and start again") from error
        if lost:
            raise JournalError(f"{file} names {lost[0]}, which is gone; remove {self.directory} and start again")
        for name in names:
            before, now = theirs.get(name), fingerprint.get(name)
            if before != now:
                raise UsageError(
                    f"{self.directory} was begun with {name} {before}, this run has {now}; "
                    "give what it was begun with, or remove that directory"
                )

    def forget(self) -> None:
        """Begin anew where the output that was being written is gone; from the scores, if all of them are there."""
        scored = self.facts.get("scored")
        self.facts = {name: value for name, value in self.facts.items() if scored and name != "digests"}
        self._files = {name: file for name, file in self._files.items() if scored and name.startswith("scores/")}
        self._point = None
        self.save()

    def release(self) -> None:
        """Let another run use the directory."""
        os.close(self._lock)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turn errors of the disk inside the block into an OutputError that names the directory."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise OutputError(
                f"{self.directory}: {reason}; make room, and repeat the command to go on from what was saved"
            ) from error

    def watch(self, scores: Scores) -> None:
        """Save these scores from now on, having brought back what was saved of them."""
        self._scores = scores
        for name in self._files:
            kind, _, layer = name.partition("/")
            if kind == "scores":
                scores.load_layer(int(layer), self._read(name))

    def store(self, name: str) -> MutableMapping[Key, Tensor]:
        """Open a store of tensors by (layer, tensor), called `name`, that survives the run."""
        return _Store(self, name)

    def begin(self) -> Point | None:
        """Begin the next sweep: return where it goes on, None if that is its start."""
        # Sweeps have no names: a run that goes on calls them in the same order, so their number says which it is.
        self._sweep += 1
        if self._point is None or self._sweep > self._point[0]:
            return None
        sweep, layer, loss = self._point
        if self._sweep < sweep:
            return Point(END, {}, None)
        return Point(layer, self._carried(), loss)

    def _carried(self) -> dict[str, Iterator[Tensor]]:
        files: dict[str, dict[int, str]] = {}
        for each in self._files:
            kind, _, rest = each.partition("/")
            if kind == "carry":
                name, _, index = rest.partition("/")
                files.setdefault(name, {})[int(index)] = each
        return {name: self._pieces([each[index] for index in sorted(each)]) for name, each in files.items()}

    def _pieces(self, names: Sequence[str]) -> Iterator[Tensor]:
        for name in names:
            yield self._read(name)["tensor"]

    def commit(
        self, layer: int, carry: Mapping[str, Iterable[Tensor]] | None = None, loss: float | None = None
    ) -> None:
        """Record that a layer of the current sweep is finished, with all that was put for it; END: the whole sweep.

        `carry`: what the sweep hands on, by name, in pieces: one of them at a time is in memory.
        """
        self._save_scores(layer)
        for each in [name for name in self._files if name.startswith("carry/")]:
            del self._files[each]
        for name, pieces in (carry or {}).items():
            for index, piece in enumerate(pieces):
                self._write(f"carry/{name}/{index}", {"tensor": piece})
        self._point = (self._sweep, layer, loss)
        self.save()

    def finish_scores(self, layers: Sequence[int]) -> None:
        """Record that all scores are there, so that the method is not asked again. Later sweeps are counted anew."""
        for layer in layers:
            self._save_scores(layer)
        self.facts["scored"] = True
        self._sweep, self._point = -1, None
        self.save()

    def _save_scores(self, layer: int) -> None:
        state = self._scores.layer_state(layer) if self._scores is not None and layer != END else {}
        if state:
            self._write(f"scores/{layer}", state)

    def save(self) -> None:
        """Make what was written so far count, by a journal.json that names it."""
        for prepare in self.before_commit:
            prepare()
        value = {
            "fingerprint": self._fingerprint,
            "facts": self.facts,
            "files": self._files,
            "number": self._number,
            "point": self._point,
        }
        # A rename replaces the old journal in one step; files that only the old one named are removed after it.
        file, new = self.directory / JOURNAL, self.directory / f"{JOURNAL}.new"
        with self._told():
            with new.open("w", encoding="utf-8") as stream:
                json.dump(value, stream)
                stream.flush()
                os.fsync(stream.fileno())
            new.rename(file)
            sync_path(self.directory)
        self._remove_unnamed()

    def _write(self, name: str, tensors: dict[str, Tensor]) -> None:
        """Write tensors to a file of a new name; the file that it supersedes goes with the next commit."""
        self._number += 1
        file = self.directory / f"{self._number}.safetensors"
        with self._told():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
            sync_path(file)
        self._files[name] = file.name

    def _read(self, name: str) -> dict[str, Tensor]:
        file = self.directory / self._files[name]
        try:
            return load_file(file)
        except (OSError, SafetensorError) as error:
            raise JournalError(f"{file} is damaged ({error}); remove {self.directory} and start again") from error

    def _remove_unnamed(self) -> None:
        named = set(self._files.values())
        for file in self.directory.glob("*.safetensors"):
            if file.name not in named:
                # On a network disk a file that a tensor is still mapped to is renamed instead, and cannot go yet.
                with suppress(OSError):
                    file.unlink()


class _Store(MutableMapping[Key, Tensor]):
    """Mapping of (layer, tensor) to tensors in the journal's files; they count from the next commit on."""

    def __init__(self, journal: Journal, name: str) -> None:
        self._journal, self._name = journal, name

    def _file(self, key: Key) -> str:
        return f"{self._name}/{key[0]}/{key[1]}"

    def __getitem__(self, key: Key) -> Tensor:
        if self._file(key) not in self._journal._files:
            raise KeyError(key)
        return self._journal._read(self._file(key))["tensor"]

    def __setitem__(self, key: Key, value: Tensor) -> None:
        self._journal._write(self._file(key), {"tensor": value.cpu()})

    def __delitem__(self, key: Key) -> None:
        del self._journal._files[self._file(key)]

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and self._file(key) in self._journal._files

    def __iter__(self) -> Iterator[Key]:
        for name in list(self._journal._files):
            store, _, rest = name.partition("/")
            layer, _, tensor = rest.partition("/")
            if store == self._name:
                yield int(layer), tensor

    def __len__(self) -> int:
        return sum(1 for _ in self)


def in_use(directory: Path) -> bool:
    """Tell whether a run that is alive uses the journal in `directory`."""
    try:
        with (directory / LOCK).open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def remove_journal(directory: Path) -> None:
    """Remove a journal whose output is whole. journal.json goes first: without it the rest counts for nothing."""
    (directory / JOURNAL).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
