"""Trainings: the same course in memory and streamed, batches, and what a teacher adds to the loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_sweeper, save_tiny, token_ids
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from streamprune.recovery import course as courses
from streamprune.recovery.course import Course, keep_logits, mean_loss, objective_of, padded
from streamprune.recovery.distillation import TeacherLogits, divergence, with_rest
from streamprune.recovery.in_memory import train_in_memory
from streamprune.recovery.lora import new_adapter
from streamprune.recovery.streamed import train_streamed
from streamprune.texts.instructions import IGNORED, Example

COURSE = Course.of(13, 8, 4.0, None, 1e-2, 2, 7)


def examples(count: int = 13, masked: int = 3) -> list[Example]:
    """Sequences of many lengths, whose beginnings are not counted."""
    generator, made = torch.Generator().manual_seed(5), []
    for _ in range(count):
        ids = torch.randint(0, 256, (int(torch.randint(6, 24, (1,), generator=generator)),), generator=generator)
        made.append(Example(ids, torch.where(torch.arange(len(ids)) < masked, IGNORED, ids)))
    return made


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize(("family", "masked"), [("llama", 3), ("phi3", 0), ("gpt2", 0)])
def test_both_trainings_have_the_same_losses_and_adapters(
    family: str, masked: int, taught: bool, tmp_path: Path
) -> None:
    save_tiny(tmp_path / family, family, dtype=torch.float32)
    save_tiny(tmp_path / "teacher", family, dtype=torch.float32, seed=9)
    sweeper, found = make_sweeper(tmp_path / family, dtype=torch.float32, micro_batch=2), examples(masked=masked)
    kept = TeacherLogits(tmp_path, 6, found) if taught else None
    if kept is not None:
        keep_logits(make_sweeper(tmp_path / "teacher", dtype=torch.float32), found, kept)
    first, second = (new_adapter(sweeper.skeleton, 4, 16.0, 1) for _ in range(2))
    streamed = train_streamed(sweeper, first, found, COURSE, dropout=0.0, teacher=kept)
    memory = train_in_memory(sweeper.skeleton, second, found, COURSE, micro_batch=2, dropout=0.0, teacher=kept)
    assert [step.number for step in streamed.steps] == list(range(1, COURSE.steps + 1))
    for mine, theirs in zip(streamed.steps, memory.steps, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5)
        assert mine.learning_rate == pytest.approx(theirs.learning_rate)
    assert streamed.steps[-1].loss < streamed.steps[0].loss - 0.5
    for mine, theirs in zip(streamed.adapter.parameters, memory.adapter.parameters, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def test_a_course_takes_every_sequence_once_an_epoch_and_warms_up_for_a_tenth_at_most() -> None:
    order = COURSE.order()
    assert COURSE.steps == 7 and len(order) == 56 and COURSE.warmup == 0
    assert all(sorted(order[13 * n : 13 * (n + 1)]) == list(range(13)) for n in range(4))
    assert order[:13] != order[13:26]
    assert Course.of(13, 8, 4.0, 3, 1e-2, 100, 7).steps == 3
    assert Course.of(1000, 8, 2.0, None, 1e-2, 100, 7).warmup == 25
    assert Course.of(51760, 64, 2.0, None, 1e-4, 100, 0).warmup == 100


def test_padding_changes_no_loss(tiny_llama: Path) -> None:
    model, found = AutoModelForCausalLM.from_pretrained(tiny_llama), examples(5)
    total, count = 0.0, 0
    for each in found:
        logits = model(each.ids[None]).logits[0, :-1]
        total += float(F.cross_entropy(logits, each.labels[1:], reduction="sum").detach())
        count += each.counted
    assert mean_loss(make_sweeper(tiny_llama, dtype=torch.float32), found) == pytest.approx(total / count, rel=1e-5)
    ids, labels = padded(found, 64)
    assert ids.shape == labels.shape and ids.shape[1] % courses.MULTIPLE == 0


def test_padding_stays_within_the_positions(tmp_path: Path) -> None:
    save_tiny(tmp_path / "gpt2", "gpt2", dtype=torch.float32, n_positions=21)
    sweeper = make_sweeper(tmp_path / "gpt2", dtype=torch.float32)
    found = [Example(ids, ids) for ids in token_ids(3, 21)]
    assert padded(found, sweeper.skeleton.positions)[0].shape == (3, 21)
    course = Course.of(3, 2, 1.0, 1, 1e-2, 0, 0)
    adapters = [new_adapter(sweeper.skeleton, 2, 4.0, 0) for _ in range(2)]
    losses = [
        train_streamed(sweeper, adapters[0], found, course, dropout=0.0).steps[0].loss,
        train_in_memory(sweeper.skeleton, adapters[1], found, course, micro_batch=2, dropout=0.0).steps[0].loss,
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_groups_that_exceed_a_sweep_give_the_same_loss_and_logits(
    tiny_llama: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    found, sweeper = examples(), make_sweeper(tiny_llama, dtype=torch.float32)
    whole = TeacherLogits(tmp_path, 4, found)
    keep_logits(sweeper, found, whole)
    expected = mean_loss(sweeper, found)
    monkeypatch.setattr(courses, "HIDDEN_BYTES", 60 * 48 * 4)
    assert len(list(courses.grouped(sweeper, found))) > 3
    assert mean_loss(sweeper, found) == pytest.approx(expected, rel=1e-6)
    parts = TeacherLogits(tmp_path, 4, found)
    keep_logits(sweeper, found, parts)
    for one, other in zip(whole.get([3, 0, 7]), parts.get([3, 0, 7]), strict=True):
        torch.testing.assert_close(one, other)


def test_a_teacher_s_logits_are_its_own(tiny_llama: Path, tmp_path: Path) -> None:
    found = examples(4)
    kept = TeacherLogits(tmp_path, 5, found)
    keep_logits(make_sweeper(tiny_llama, dtype=torch.float32), found, kept)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    values, tokens = kept.get([2])
    logits = model(found[2].ids[None]).logits[0, :-1][found[2].labels[1:] != IGNORED].detach()
    expected = logits.log_softmax(-1).topk(5)
    torch.testing.assert_close(values[:, :5], expected.values)
    torch.testing.assert_close(values[:, 5].exp(), 1 - expected.values.exp().sum(-1))
    assert tokens.long().equal(expected.indices)


def test_the_divergence_of_all_tokens_is_torch_s_and_of_some_it_is_of_classes() -> None:
    generator = torch.Generator().manual_seed(1)
    logits, theirs = (torch.randn(7, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    teacher = theirs.log_softmax(-1)
    every, some = (teacher.topk(k).indices for k in (20, 3))
    expected = F.kl_div(logits.log_softmax(-1), teacher, log_target=True, reduction="sum")
    logits.requires_grad_()
    found = divergence(logits, with_rest(theirs.float(), every), every)
    (grad,) = torch.autograd.grad(found, logits)
    assert float(found.detach()) == pytest.approx(float(expected), rel=1e-6)
    torch.testing.assert_close(grad, logits.detach().softmax(-1) - teacher.exp(), atol=1e-6, rtol=1e-6)

    def classes(log: torch.Tensor) -> torch.Tensor:
        chosen = log.exp().gather(-1, some)
        return torch.cat([chosen, 1 - chosen.sum(-1, keepdim=True)], -1).log()

    expected = F.kl_div(classes(logits.detach().log_softmax(-1)), classes(teacher), log_target=True, reduction="sum")
    assert float(divergence(logits.detach(), with_rest(theirs, some), some)) == pytest.approx(float(expected))


@pytest.mark.parametrize("sure", ["model", "teacher", "both"])
def test_the_divergence_of_sure_models_keeps_its_digits_in_float32(sure: str) -> None:
    generator = torch.Generator().manual_seed(4)
    wide = {name: torch.randn(6, 50, generator=generator, dtype=torch.float64) for name in ("model", "teacher")}
    for name in wide if sure == "both" else [sure]:
        wide[name][:, 3] += 20  # all others together are e-9
    found = []
    for dtype in (torch.float32, torch.float64):
        logits, theirs = (wide[name].to(dtype).requires_grad_(name == "model") for name in wide)
        tokens = wide["teacher"].topk(4).indices
        value = divergence(logits, with_rest(theirs, tokens), tokens)
        found.append((value.detach().double(), torch.autograd.grad(value, logits)[0].double()))
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact, atol=1e-5, rtol=1e-6)


def test_the_loss_of_blocks_adds_up_to_that_of_all_logits() -> None:
    generator = torch.Generator().manual_seed(2)
    ids, labels = padded(examples(4), 64)
    logits = torch.randn(*ids.shape, 30, generator=generator)
    labels = torch.where(labels == IGNORED, IGNORED, labels % 30)
    count = int((labels[:, 1:] != IGNORED).sum())
    theirs = torch.randn(count, 30, generator=generator)
    top = theirs.topk(4).indices
    objective = objective_of(labels, torch.device("cpu"), (with_rest(theirs, top), top.int()))
    whole = objective(logits, slice(None), slice(None))
    blocks = [
        objective(logits[rows, columns], rows, columns)
        for rows in (slice(0, 3), slice(3, 4))
        for columns in (slice(0, 5), slice(5, ids.shape[1] - 1))
    ]
    torch.testing.assert_close(sum(blocks), whole)
