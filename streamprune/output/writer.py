"""Writing of the output's tensors: the source's are hashed, cut and written several at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from streamprune.output.form import OutputForm
from streamprune.paging.device import at_once
from streamprune.paging.pager import Page, Pager
from streamprune.storage.checkpoint import byte_view, check_finite
from streamprune.storage.shards import ShardedWriter

WRITERS = 4  # tensors of a layer that are cut and written at the same time


class OutputWriter:
    """Writer of the pruned tensors, in any order, that hashes the source's on the way. A context manager.

    Args:
        digests: SHA-256 of each source tensor that an earlier run has put there, or left out; filled in as tensors are
            put.

    Raises:
        CheckpointError: NaN or infinite weights in the source.
        OutputError: the disk is full.
    """

    def __init__(
        self, form: OutputForm, directory: Path, max_shard_size: int, digests: dict[str, str] | None = None
    ) -> None:
        self.form, self.skeleton, self._slicer = form, form.skeleton, form.slicer
        self._digests: dict[str, str] = {} if digests is None else digests
        written = [spec.name for name in self._digests for spec in form.specs_of(name)]
        self._writer = ShardedWriter(directory, form.specs, max_shard_size, written if self._digests else None)

    def __enter__(self) -> OutputWriter:
        return self

    def __exit__(self, *exc: Any) -> None:
        self._writer.__exit__(*exc)

    def sync(self) -> None:
        """Wait until what has been put is on the disk."""
        self._writer.sync()

    def put(self, name: str, source: Tensor, made: Tensor | None = None) -> None:
        """Write what remains of a source tensor, or what was `made` of it."""
        source = source.cpu().contiguous()
        self._digests[name] = hashlib.sha256(byte_view(source)).hexdigest()
        target = self._slicer.name(name)
        if target is not None:
            whole = self._slicer.cut(name, source) if made is None else made
            for part, tensor in self.form.store(name, target, whole).items():
                self._writer.write(part, tensor)

    def put_layer(self, page: Page, made: Mapping[str, Tensor]) -> None:
        """Write what remains of a layer; `made` has replaced tensors and new ones, by names inside the layer."""
        prefix = self.skeleton.layer_prefix(page.layer)

        def put(name: str) -> None:
            tensor = page.tensors[name]
            check_finite(self.skeleton.checkpoint.path, f"layer {page.layer}, {name}", tensor, at_once(tensor))
            self.put(prefix + name, tensor, made.get(name))

        # Hashing, cutting and writing all let other threads run, and take turns at being the slowest.
        writers = ThreadPoolExecutor(WRITERS, thread_name_prefix="streamprune-writer")
        try:
            for written in [writers.submit(put, name) for name in page.tensors]:
                written.result()
        finally:
            writers.shutdown(cancel_futures=True)
        for name in made.keys() - page.tensors.keys():
            target = self._slicer.name(prefix + name)
            assert target is not None, "nothing is made for layers that go"
            self._writer.write(target, made[name])

    def untouched(self) -> list[int]:
        """List the source layers of which nothing has been put yet."""
        return [
            layer
            for layer, entries in enumerate(self.skeleton.entries)
            if not any(entry.name in self._digests for entry in entries.values())
        ]

    def finish(
        self,
        pager: Pager,
        make: Callable[[Page], Mapping[str, Tensor]] = lambda page: {},
        done: Callable[[], None] = lambda: None,
    ) -> str:
        """Write all that has not been put yet, one source layer in memory at a time.

        Args:
            make: makes the replaced and new tensors of a layer, for `put_layer`.
            done: called after every layer.

        Returns:
            The SHA-256 of the source's tensors: of the lines "name sha256(bytes)", sorted.
        """
        checkpoint = self.skeleton.checkpoint
        with pager.pages(self.untouched()) as pages:
            for page in pages:
                self.put_layer(page, make(page))
                done()
        for name in checkpoint.tensors:
            if name not in self._digests:
                tensor = checkpoint.read(name)
                check_finite(checkpoint.path, name, tensor)
                self.put(name, tensor)
        digests = self._digests
        return hashlib.sha256("\n".join(f"{name} {digests[name]}" for name in sorted(digests)).encode()).hexdigest()
