"""Part of a run that scores and writes: units or layers by their scores, or weights as they are scored."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from streamprune.config import PruneConfig
from streamprune.methods.sinks import LayerScores, UnitScores, WeightPruner
from streamprune.methods.table import METHODS
from streamprune.model.units import KeptUnits, TensorRef
from streamprune.output.companions import Companions
from streamprune.output.form import OutputForm
from streamprune.output.slicing import mean_biases
from streamprune.output.writer import OutputWriter
from streamprune.paging.device import peaks
from streamprune.paging.pager import Page
from streamprune.paging.state import STATE_SLOTS, StateStream
from streamprune.pipeline.progress import Progress
from streamprune.planning.decision import Plan, goal
from streamprune.planning.footprint import state_blocks
from streamprune.recovery.least_squares import compensate, passes, repair_micro_batch
from streamprune.storage.journal import Journal
from streamprune.storage.scores import write_scores
from streamprune.storage.tensor_store import MakeStore, make_store
from streamprune.streaming.costs import Sizes, Task
from streamprune.streaming.statistics import Statistics
from streamprune.streaming.sweeper import Sweeper

STEPS_FILE = "policy.jsonl"


@dataclass(frozen=True)
class Done:
    """Result of a job: what it has written.

    Attributes:
        form: the output's form, with the units that stay.
        zeros: how many of the pruned weights are zero, and of how many.
        source_hash: SHA-256 of the source's tensors.
    """

    form: OutputForm
    zeros: tuple[int, int]
    source_hash: str


@dataclass
class Job:
    """Job: a planned run on an open model.

    Attributes:
        ids: calibration tokens [n, seq] of the method, if it needs any.
        repair_ids: tokens [n, seq] of the least squares after units or layers are gone.
        costs: what scoring took: seconds, bytes_read, and peak_rss so far; on a GPU also peak_gpu.
        companions: what comes along beside the tensors.
        journal: the journal of a run that can be resumed.
        state_slots: layers whose state a GPU may hold.
        state_scratch: directory of what the method keeps between sweeps, where it is not in memory or the journal.
        predicted: seconds of the stages, where rates of this machine are known.
        steps: figures of a method's steps, by name, which become STEPS_FILE of the output.
    """

    config: PruneConfig
    plan: Plan
    sweeper: Sweeper
    progress: Progress
    ids: Tensor | None
    repair_ids: Tensor | None
    companions: Companions
    costs: dict[str, float] = field(default_factory=dict)
    journal: Journal | None = None
    state_scratch: Path | None = None
    state_slots: int = STATE_SLOTS
    predicted: Mapping[str, float] = field(default_factory=dict)
    steps: list[dict[str, float]] = field(default_factory=list)

    def score(self) -> UnitScores | LayerScores:
        """Score units or layers by the method, or take the scores from the journal if all of them are there."""
        layers, backend = self.config.target == "layers", self.sweeper.backend
        scores = (
            LayerScores(self.plan.layers, backend)
            if layers
            else UnitScores(self.sweeper.skeleton.all_units(self.plan.layers), backend)
        )
        if self.journal is not None:
            self.journal.watch(scores)
            if self.journal.facts.get("scored"):
                self.costs |= self.journal.facts["costs"]
                self.steps = self.journal.facts["steps"]
                return scores
        statistics = self._statistics()
        with self._scoring():
            METHODS[self.config.method].score(statistics, self.plan.settings, scores)
        self.sweeper.close()  # hidden states go before the repair and the writing take memory
        if self.journal is not None:
            self.journal.facts["costs"], self.journal.facts["steps"] = self.costs, self.steps
            self.journal.finish_scores(self.plan.layers)
        return scores

    def cut(self, scores: UnitScores | LayerScores, directory: Path) -> Done:
        """Choose what stays, repair it if asked to, and write it."""
        skeleton, plan = self.sweeper.skeleton, self.plan
        kept = plan.choice.keep(scores.values)
        form = plan.form.keep(kept)

        def biases(page: Page) -> dict[str, Tensor]:
            if not form.biases:
                return {}
            assert isinstance(scores, UnitScores), "only units have biases in their place"
            return mean_biases(skeleton, form.kept, scores.means, page)

        digests = {} if self.journal is None else self.journal.facts.setdefault("digests", {})
        shard_size = self.config.max_shard_size
        with OutputWriter(form, directory, shard_size, digests) as writer:
            save = self._saves(writer)
            if self.repair_ids is not None:
                self._repair(kept, writer)
            with self._stage("writing", [writer.untouched()]):
                source_hash = writer.finish(self.sweeper.pager, biases, save)
        self._write_scores(scores, directory)
        return self._finish(form, directory, source_hash)

    def _write_scores(self, scores: UnitScores | LayerScores, directory: Path) -> None:
        facts = {"method": self.config.method, "granularity": self.config.target}
        facts["model"] = self.sweeper.skeleton.checkpoint.outline
        if learner := self.plan.settings.get("learner"):  # which says what its scores are
            facts["learner"] = learner
        write_scores(directory, scores.by_key(), facts)

    def prune_weights(self, directory: Path) -> Done:
        """Prune each matrix as soon as it is scored, and write it at once."""
        skeleton, plan = self.sweeper.skeleton, self.plan
        assert plan.sparsity is not None, "the plan has a pattern wherever weights go"
        journal = self.journal
        statistics = self._statistics()
        saved = journal.facts if journal is not None else {}
        counts: dict[str, list[int]] = saved.setdefault("zeros", {})  # by matrix: zeros, and of how many
        digests = saved.setdefault("digests", {})
        shard_size = self.config.max_shard_size
        with OutputWriter(plan.form, directory, shard_size, digests) as writer:
            if journal is not None:
                # Tensors are on the disk before a commit says that they need not be written again.
                journal.before_commit.append(writer.sync)

            def write(ref: TensorRef, stored: Tensor, pruned: Tensor) -> None:
                name = skeleton.layer_prefix(ref.layer) + ref.tensor
                writer.put(name, stored, pruned)
                counts[name] = [pruned.numel() - int(pruned.count_nonzero()), pruned.numel()]

            with self._scoring():
                pruner = WeightPruner(plan.sparsity, write, self.sweeper.backend)
                METHODS[self.config.method].score(statistics, self.plan.settings, pruner)
            self.sweeper.close()
            with self._stage("writing", [writer.untouched()]):
                source_hash = writer.finish(self.sweeper.pager)
        zeros, total = (sum(each) for each in zip(*counts.values(), strict=True))
        return self._finish(plan.form, directory, source_hash, zeros=(zeros, total))

    def _finish(self, form: OutputForm, directory: Path, source_hash: str, *, zeros: tuple[int, int] = (0, 0)) -> Done:
        """Write what lies beside the tensors, and return the result."""
        config = form.config(zeros[0] / form.skeleton.parameters)
        self.companions.write(config, directory, files=form.files())
        if self.steps:
            lines = "".join(json.dumps(step) + "\n" for step in self.steps)
            (directory / STEPS_FILE).write_text(lines, encoding="utf-8")
        return Done(form, zeros, source_hash)

    def _saves(self, writer: OutputWriter) -> Callable[[], None]:
        """Return a function that makes all that was written so far count, where the run can be resumed."""
        if self.journal is None:
            return lambda: None
        self.journal.before_commit.append(writer.sync)
        return self.journal.save

    def _statistics(self) -> Statistics:
        config = self.config
        return Statistics(
            self.sweeper,
            self.ids,
            self.plan.layers,
            config.seed,
            self.journal,
            self._stores(),
            goal=goal(config, self.sweeper.skeleton, self.plan),
            note=self._note,
        )

    def _note(self, step: int, **figures: float) -> None:
        """Report figures of a step, from 0 on, and keep them for the output, where it is counted from 1."""
        self.steps.append({"step": step + 1, **figures})
        self.progress.note(step + 1, self.plan.settings["steps"], **figures)

    def _stores(self) -> MakeStore:
        """Choose where the method's state stays: in the journal, on scratch, in memory, or passing with the layers."""
        dtype = self.plan.state_dtype
        elsewhere = partial(make_store, journal=self.journal, dtype=dtype)
        device, journal, kept = self.sweeper.pager.device, self.journal, {state.name for state in self.plan.state}
        if not kept or (device.direct and (journal is not None or self.state_scratch is None)):
            return elsewhere
        stream = StateStream(
            state_blocks(self.plan, self.sweeper),
            device.another(),
            device.another(),
            dtype=getattr(torch, dtype),
            scratch=self.state_scratch,
            saved=None if journal is None else {name: journal.store(name) for name in kept},
            say_staged=self.sweeper.say_staged,
        )
        self.sweeper.state, stream.slots = stream, self.state_slots
        if journal is not None:
            journal.before_commit.append(stream.save)
        return lambda name: stream.store(name) if name in kept else elsewhere(name)

    def _repair(self, kept: KeptUnits, writer: OutputWriter) -> None:
        assert self.repair_ids is not None and self.plan.repair is not None
        config, seq_len = self.config, None if self.ids is None else self.ids.shape[1]
        with self._stage("repairing", passes(self.sweeper, kept)):
            compensate(
                self.sweeper,
                self.repair_ids,
                kept,
                ridge=config.compensate_ridge,
                goal=self.plan.repair,
                micro_batch=repair_micro_batch(self.sweeper.micro_batch, seq_len, self.repair_ids.shape[1]),
                write=writer.put_layer,
                journal=self.journal,
            )

    def _stage(self, name: str, orders: Iterable[Sequence[int]]) -> AbstractContextManager[None]:
        """Open a stage of the progress that passes the layers in these orders."""
        total = sum(self.sweeper.pager.bytes_of(layer) for order in orders for layer in order)
        return self.progress.stage(name, total, self.predicted.get(name))

    @contextmanager
    def _scoring(self) -> Iterator[None]:
        """Open the stage in which the method works; its figures go into `costs`."""
        method, checkpoint = METHODS[self.config.method], self.sweeper.skeleton.checkpoint
        shape = (0, 0) if self.ids is None else (len(self.ids), self.ids.shape[1])
        trials = None if method.trials is None else method.trials(self.plan.settings)
        sweeps = method.sweeps(self.plan.settings)
        task = Task(Sizes(self.sweeper), shape, layers=self.plan.layers, sweeps=sweeps, trials=trials)
        needs = method.needs_for(self.config.target, self.plan.settings)
        orders = [order for need in needs for order in need.passes(task)]
        start, read = time.perf_counter(), checkpoint.bytes_read
        with self._stage(f"scoring {method.name}", orders):
            yield
        self.costs["seconds"] = time.perf_counter() - start
        self.costs["bytes_read"] = checkpoint.bytes_read - read
        self.costs |= peaks()
