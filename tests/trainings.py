"""Trainings of a tiny model that a user begins, and one that is stopped."""

import pytest

from streamprune.pipeline.progress import Progress

FAST = ("--cutoff", 32, "--batch", 8, "--learning-rate", 0.01, "--quiet", "--no-evaluate")
IN_MEMORY, STREAMED = (), ("--streamed",)


def interrupted(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the training be stopped behind a step."""
    note = Progress.note

    def stop(self: Progress, step: int, steps: int, **figures: float) -> None:
        note(self, step, steps, **figures)
        if step == at:
            raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "note", stop)
