"""How well reading hides behind computing: a forward sweep against its reading alone and its computing alone.

    python bench/overlap.py --model DIR [--device cuda] [--cold] [--reader direct] [--tokens 128 ...] [--json FILE]

A sweep that overlaps perfectly takes the longer of the two, plus one layer (the first read has nothing to hide behind).
With --cold the page cache forgets the checkpoint before every sweep and every reading.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import torch

from streamprune.figures import table
from streamprune.paging.pager import Page, Pager, Turn
from streamprune.pipeline.source import Source
from streamprune.storage.reader import ReaderKind

SEQ_LEN = 128


class StillPager:
    """Hands out every layer with the weights of the first one, which stay where they are."""

    def __init__(self, pager: Pager) -> None:
        with pager.pages([0]) as pages:
            self.page = next(pages)

    @contextmanager
    def pages(self, order: Sequence[int], then: Turn = "back") -> Iterator[Iterator[Page]]:
        """As `Pager.pages`, without reading."""
        yield (Page(layer, self.page.tensors) for layer in order)


def read_alone(pager: Pager, layers: int) -> None:
    """A sweep that computes nothing."""
    with pager.pages(range(layers)) as pages:
        for _ in pages:
            pass


def median_seconds(run: Callable[[], object], device: str, repeat: int, forget: Sequence[Path] = ()) -> float:
    """Wall time, the device's work included; the page cache forgets some files before."""
    taken = []
    for _ in range(repeat):
        for file in forget:
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


@click.command()
@click.option("--model", required=True, help="A checkpoint; random ones are made by bench/end_to_end.py.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--cold", is_flag=True, help="Read from the disk, not from the page cache.")
@click.option("--reader", type=click.Choice(["buffered", "direct"]), default="buffered", show_default=True)
@click.option("--tokens", type=int, multiple=True, default=(128, 1280, 12800), show_default=True)
@click.option("--repeat", type=int, default=5, show_default=True)
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Also write the figures here.")
def main(
    model: str,
    device: str,
    cold: bool,
    reader: ReaderKind,
    tokens: tuple[int, ...],
    repeat: int,
    json_file: Path | None,
) -> None:
    """Measure, print the table, and write JSON."""
    rows = [["tokens", "sweep, s", "reading alone", "computing alone", "sweep / longer one", "and one layer"]]
    figures = []
    with Source(model, device=device, micro_batch=16, reader=reader).open() as sweeper, torch.no_grad():
        pager, layers = sweeper.pager, sweeper.n_layers
        forget = sweeper.skeleton.checkpoint.files if cold else []
        for count in tokens:
            shape = (max(1, count // SEQ_LEN), min(count, SEQ_LEN))
            ids = torch.randint(0, sweeper.skeleton.config.vocab_size, shape)
            sweeper.forward(ids)
            sweep = median_seconds(lambda ids=ids: sweeper.forward(ids), device, repeat, forget)
            reading = median_seconds(lambda: read_alone(pager, layers), device, repeat, forget)
            sweeper.pager = StillPager(pager)
            computing = median_seconds(lambda ids=ids: sweeper.forward(ids), device, repeat)
            sweeper.pager = pager
            longer = max(reading, computing)
            bound = longer + (reading + computing) / layers
            figures.append({"tokens": count, "sweep": sweep, "reading": reading, "computing": computing})
            cells = [f"{sweep:.2f}", f"{reading:.2f}", f"{computing:.2f}", f"{sweep / longer:.2f}"]
            rows.append([str(count), *cells, f"{sweep / bound:.2f}"])
    print(table(rows, markdown=True))
    if json_file:
        json_file.write_text(
            json.dumps({"device": device, "cold": cold, "reader": reader, "figures": figures}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
