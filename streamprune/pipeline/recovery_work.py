"""Work of a recovery, decided before it begins: data, adapter, teacher, and all that can be wrong with them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch
from torch import Tensor

from streamprune.errors import CheckpointError, StreampruneError, UsageError
from streamprune.figures import human, number_of
from streamprune.model.skeleton import Skeleton
from streamprune.output.form import OutputForm
from streamprune.output.ragged_form import unchanged_form
from streamprune.output.sparse24 import is_compressed
from streamprune.paging.device import compute_device, device_name, is_gpu
from streamprune.paging.hidden_states import Place
from streamprune.paging.host_memory import available_memory
from streamprune.pipeline import resume
from streamprune.pipeline.batches import EVALUATION_SEGMENTS, EVALUATION_SEQ_LEN, check_tokens
from streamprune.pipeline.progress import Progress
from streamprune.pipeline.source import Source
from streamprune.planning.placement import memory_limits
from streamprune.planning.training_memory import OF_ADAPTERS, TrainingSizes, place_training
from streamprune.recovery.course import Course, padded
from streamprune.recovery.distillation import TeacherLogits
from streamprune.recovery.lora import Adapter, new_adapter, peft_tensors, read_adapter
from streamprune.recovery.options import CUTOFF, RecoverConfig
from streamprune.schema import flag_of, options_of
from streamprune.storage.checkpoint import byte_view, read_config, read_json, resolve_model
from streamprune.storage.directory import OWN_FILE, check_apart, check_directory, check_space
from streamprune.streaming.costs import Shape
from streamprune.streaming.sweeper import Sweeper, default_micro_batch
from streamprune.texts.corpus import open_corpus
from streamprune.texts.documents import embedded
from streamprune.texts.instructions import Example, Examples, open_examples
from streamprune.texts.tokenizer import load_tokenizer

HELD_OUT_SHARE, MOST_HELD_OUT = 20, 2000  # one sequence of as many is held out, and no more than that
OF_LOGITS = 3  # of a micro-batch, in float32: themselves, their log-probabilities, and the gradient
LORA_PACKAGES = ("streamprune", "torch", "transformers", "peft")


@dataclass(frozen=True)
class RecoveryWork:
    """Work of a recovery.

    Attributes:
        own: the source's streamprune.json; empty of a model that is not streamprune's.
        form: of the output; None where the adapter is kept.
        adapter: to begin with, or to merge.
        data: what was read; None where nothing is trained.
        train, held_out: the sequences of it. course: the steps.
        segments: tokens [n, seq] of the perplexity, if it is measured.
        place: where hidden states stay. slots: layers that are in memory together while a streamed training runs.
    """

    own: dict[str, object]
    form: OutputForm
    adapter: Adapter
    data: Examples | None
    train: Sequence[Example]
    held_out: Sequence[Example]
    course: Course | None
    segments: Tensor | None
    place: Place
    slots: int


def check_packages(config: RecoverConfig) -> None:
    """Refuse to begin where PEFT is missing, which keeps and trains adapters.

    Raises:
        StreampruneError: with the remedy.
    """
    if config.merge is None and importlib.util.find_spec("peft") is None:
        raise StreampruneError("recover needs peft; pip install 'streamprune[recover]'")


def source_of(config: RecoverConfig, *, planned: bool = False) -> Source:
    """Return the model that is recovered; `planned`: for its shapes alone, no weight is read."""
    return Source(
        config.model,
        device=config.device,
        dtype=config.dtype,
        micro_batch=config.parts(default_micro_batch(config.cutoff or CUTOFF)),
        scope="matrices",
        trust_remote_code=config.trust_remote_code,
        planned=compute_device(config.device) if planned else None,
    )


def check_source(config: RecoverConfig) -> dict[str, object]:
    """Read the source's streamprune.json, and refuse what cannot be recovered as asked, by its small files alone.

    Raises:
        UsageError: merging would fill the zeros of sparse weights.
        OutputError: the output is or holds what is read.
    """
    path = resolve_model(config.model, trust_remote_code=config.trust_remote_code)
    read = (config.data, config.evaluate, config.init_adapter, config.merge, config.distill)
    check_apart(config.output, path, *read, config.scratch)
    own = read_json(path / OWN_FILE) if (path / OWN_FILE).is_file() else {}
    if is_compressed(read_config(path)):
        raise CheckpointError(f"{path} holds compressed 2:4 weights; prune again without --compress, and use --adapter")
    if "zeros" in own and not config.adapter:
        raise UsageError(f"{path} is sparse, and merging would fill its zeros; keep the adapter apart with --adapter")
    return own


def prepare_recovery(
    config: RecoverConfig, sweeper: Sweeper, own: dict[str, object], progress: Progress
) -> RecoveryWork:
    """Decide all of a recovery: what does not fit, is missing or is of another model is refused here.

    Raises:
        StreampruneError: with the remedy.
    """
    skeleton = sweeper.skeleton
    given = config.merge or config.init_adapter
    if given is not None:
        adapter = read_adapter(given, skeleton)
    else:
        assert config.rank is not None and config.alpha is not None, "they are settled"
        adapter = new_adapter(skeleton, config.rank, config.alpha, config.seed)
    form = unchanged_form(skeleton)
    adapter_bytes = sum(each.nbytes for each in adapter.parameters)
    check_space(config.output.parent, adapter_bytes if config.adapter else form.nbytes)
    segments = _segments(config, skeleton, progress)
    if config.data is None:
        return RecoveryWork(own, form, adapter, None, (), (), None, segments, sweeper.place, sweeper.pager.slots)
    data = _examples(config, skeleton, progress)
    train, held_out = _split(config, data)
    course = Course.of(
        len(train), config.batch, config.epochs, config.steps, config.learning_rate, config.warmup, config.seed
    )
    progress.say(f"{data.describe()}; {len(held_out):,} are held out")
    steps = f"{number_of(course.steps, 'step')} of {number_of(course.batch, 'sequence')}"
    progress.say(f"{steps}, LoRA of rank {len(adapter.parameters[0])}")
    longest = padded([max(data.found, key=lambda each: len(each.ids))], skeleton.positions)[0].shape[1]
    if config.streamed:
        measured = _measured(segments, held_out, longest)
        training = TrainingSizes((config.batch, longest), measured, adapter_bytes, merged=not config.adapter)
        _place(config, sweeper, training, progress)
    else:
        _check_memory(config, sweeper, longest, adapter_bytes)
    if config.distill is not None:
        _check_teacher(config, skeleton)
        scratch = scratch_of(config)
        check_directory(scratch, "--scratch")
        check_space(scratch, TeacherLogits.bytes_of(config.top_k, train), "what the teacher says")
    placed = sweeper.place, sweeper.pager.slots
    return RecoveryWork(own, form, adapter, data, train, held_out, course, segments, *placed)


def scratch_of(config: RecoverConfig) -> Path:
    """Return the directory of the teacher's logits."""
    return config.scratch or Path(tempfile.gettempdir())


def _segments(config: RecoverConfig, skeleton: Skeleton, progress: Progress) -> Tensor | None:
    """Take the tokens of the perplexity before and after, as a run of pruning does."""
    if config.evaluate is False:
        return None
    corpus = open_corpus(
        skeleton.checkpoint.path,
        embedded("heldout") if config.evaluate is None else config.evaluate,
        field=config.field or "text",
        bos=config.bos,
        trust_remote_code=config.trust_remote_code,
        say=progress.say,
    )
    segments = corpus.segments(min(EVALUATION_SEQ_LEN, skeleton.positions), None, EVALUATION_SEGMENTS)
    check_tokens(segments, skeleton)
    return segments


def _examples(config: RecoverConfig, skeleton: Skeleton, progress: Progress) -> Examples:
    assert config.data is not None
    data = open_examples(
        skeleton.checkpoint.path,
        config.data,
        field=config.field,
        cutoff=config.tokens(skeleton.positions),
        bos=config.bos,
        trust_remote_code=config.trust_remote_code,
        say=progress.say,
    )
    check_tokens(torch.cat([each.ids for each in data.found]), skeleton)
    return data


def _split(config: RecoverConfig, data: Examples) -> tuple[list[Example], list[Example]]:
    """Hold sequences out, chosen by the seed; the others are trained on."""
    n = len(data.found)
    count = min(MOST_HELD_OUT, n // HELD_OUT_SHARE) if config.validation is None else config.validation
    if count >= n:
        raise UsageError(f"--validation {count}: {data.where} has {n} sequences, and some must be left; lower it")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed)).tolist()
    held_out = set(order[:count])
    return [data.found[i] for i in range(n) if i not in held_out], [data.found[i] for i in sorted(held_out)]


def _measured(segments: Tensor | None, held_out: Sequence[Example], longest: int) -> dict[str, Shape]:
    """List the sequences of what is measured before and after, and tokens of each at the most."""
    found: dict[str, Shape] = {}
    if segments is not None:
        found["the perplexity"] = len(segments), segments.shape[1]
    if held_out:
        found["the held-out loss"] = len(held_out), longest
    return found


def _place(config: RecoverConfig, sweeper: Sweeper, given: TrainingSizes, progress: Progress) -> None:
    """Refuse a streamed training that does not fit; place its hidden states."""
    process = psutil.Process().memory_info().rss
    resident = 0 if is_gpu(sweeper.skeleton.device) else sweeper.skeleton.resident_bytes
    memory = available_memory() + process
    progress.say(place_training(sweeper, config, given, baseline=process - resident, memory=memory))


def _check_memory(config: RecoverConfig, sweeper: Sweeper, longest: int, adapter_bytes: int) -> None:
    """Refuse a training in memory that does not fit."""
    skeleton, gpu = sweeper.skeleton, is_gpu(sweeper.skeleton.device)
    weights = skeleton.parameters * skeleton.dtype.itemsize
    logits = sweeper.micro_batch * longest * skeleton.config.vocab_size * 4
    needed = weights + OF_LOGITS * logits + OF_ADAPTERS * adapter_bytes
    process = psutil.Process().memory_info().rss
    loaded = skeleton.resident_bytes if skeleton.loaded and not gpu else 0  # they are among the weights
    _, rooms = memory_limits(config, sweeper, process - loaded, available_memory() + process)
    if needed > (room := max(0, rooms[not gpu])):
        beside = "" if gpu else f" beside the process's {human(process - loaded)}"
        raise StreampruneError(
            f"a training in memory takes more than {human(needed)}{beside}, there are {human(room)}; pass --streamed, "
            "which needs two layers, or lower --micro-batch"
        )


def _check_teacher(config: RecoverConfig, skeleton: Skeleton) -> None:
    """Refuse a teacher whose tokens are others, or who cannot read sequences as long."""
    assert config.distill is not None
    with replace(source_of(config, planned=True), model=config.distill).open() as planned:
        teacher = planned.skeleton
        sizes = teacher.config.vocab_size, skeleton.config.vocab_size
        vocabularies = [
            load_tokenizer(each.checkpoint.path, trust_remote_code=config.trust_remote_code).get_vocab()
            for each in (teacher, skeleton)
        ]
        if sizes[0] != sizes[1] or vocabularies[0] != vocabularies[1]:
            what = f"has {sizes[0]:,} tokens, the model {sizes[1]:,}" if sizes[0] != sizes[1] else "is another one"
            raise UsageError(
                f"--distill {config.distill}: its vocabulary {what}; use a teacher of the same vocabulary, such as the "
                "dense model"
            )
        if config.top_k > sizes[0]:
            raise UsageError(f"--top-k {config.top_k}: the vocabulary has {sizes[0]:,} tokens; lower it")
        if config.tokens(skeleton.positions) > teacher.positions:
            raise UsageError(f"--distill {config.distill} takes at most {teacher.positions} positions; lower --cutoff")


def recovery_fingerprint(config: RecoverConfig, work: RecoveryWork, skeleton: Skeleton) -> dict[str, str | None]:
    """Gather what decides the bytes that come out: options, versions, sequences, the adapter, the models' headers."""
    options = {
        flag_of(name): str(getattr(config, name))
        for name, said in options_of(config).items()
        if said.changes_bytes and not said.resolved
    }
    versions = {name: importlib.metadata.version(name) for name in LORA_PACKAGES}
    found = {"sequences": hash_examples([*work.train, *work.held_out])}
    adapter = hashlib.sha256()
    for name, tensor in peft_tensors(skeleton, work.adapter).items():
        adapter.update(name.encode() + byte_view(tensor))
    found |= {"first adapter": adapter.hexdigest(), "source": resume.hash_source(skeleton.checkpoint)}
    if config.distill is not None:
        with replace(source_of(config, planned=True), model=config.distill).open() as teacher:
            found["teacher"] = resume.hash_source(teacher.skeleton.checkpoint)
    return {**options, **versions, **found, "compute device": device_name(skeleton.device)}


def hash_examples(examples: Sequence[Example]) -> str:
    """Hash the tokens and labels of sequences by SHA-256."""
    digest = hashlib.sha256()
    for each in examples:
        digest.update(byte_view(each.ids.contiguous()))
        digest.update(byte_view(each.labels.contiguous()))
    return digest.hexdigest()
