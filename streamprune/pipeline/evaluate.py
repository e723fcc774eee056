"""The perplexity of any model: dense or pruned, and larger than memory."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streamprune.config import as_options
from streamprune.values import AUTO, dtype_name, source

if TYPE_CHECKING:
    from streamprune.streaming.perplexity import Perplexity


def evaluate(
    model: str | os.PathLike[str],
    text: str | os.PathLike[str] | None = None,
    *,
    field: str = "text",
    seq_len: int = 128,
    samples: int | None = None,
    device: str | None = None,
    dtype: str = AUTO,
    bos: str = "auto",
    micro_batch: int | None = None,
    trust_remote_code: bool = False,
    progress: Any = None,
) -> Perplexity:
    """Streamed perplexity over non-overlapping segments, as `streamprune eval` prints it.

        print(evaluate("pruned", "novel.txt", seq_len=512).perplexity)

    Args:
        model: directory, dense or pruned, or hub id.
        text: as the calibration text of a run; by default the embedded held-out prose.
        field: of the text in records and tables.
        seq_len: tokens of a segment. samples: segments from the start of the text; None for all.
        device, dtype, bos, micro_batch, trust_remote_code: as of `PruneConfig`.
        progress: as of `prune`.

    Raises:
        StreampruneError: as `prune`, of the model and the text.
    """
    seq_len, samples, micro_batch = as_options(seq_len=seq_len, samples=samples, micro_batch=micro_batch)
    device, dtype, bos = as_options(device=device, dtype=dtype, bos=bos)
    # Only now, so that a command with a wrong number is answered at once.
    from streamprune.pipeline.batches import check_length, check_tokens
    from streamprune.pipeline.progress import Progress
    from streamprune.pipeline.source import Source
    from streamprune.streaming.perplexity import perplexity, sweeps_needed
    from streamprune.streaming.sweeper import default_micro_batch
    from streamprune.texts.corpus import open_corpus
    from streamprune.texts.documents import embedded

    progress = Progress.of(progress)
    opened = Source(
        source("--model", model),
        device=device,
        dtype=dtype,
        micro_batch=micro_batch or default_micro_batch(seq_len),
        decompress=True,
        trust_remote_code=trust_remote_code,
    )
    with opened.open(progress) as sweeper:
        for note in sweeper.skeleton.notes:
            progress.say(note)
        corpus = open_corpus(
            sweeper.skeleton.checkpoint.path,
            embedded("heldout") if text is None else source("--text", text),
            field=field,
            bos=bos,
            trust_remote_code=trust_remote_code,
            say=progress.say,
        )
        check_length(seq_len, sweeper.skeleton)
        segments = corpus.segments(seq_len, samples)
        check_tokens(segments, sweeper.skeleton)
        sweeps = sweeps_needed(sweeper, segments)
        with progress.stage("perplexity", sweeps * sweeper.pager.layer_bytes()):
            found = perplexity(sweeper, segments, micro_batch)
    return replace(found, text=corpus.describe(segments), dtype=dtype_name(sweeper.skeleton.dtype))
