"""A streamed model answers lm-eval as lm-eval's own model of transformers' does, however it is divided into passes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from marks import slow
from tiny_models import make_sweeper, save_tiny
from whole_models import load

import streamprune  # noqa: F401  it lets transformers load ragged checkpoints
from streamprune import PruneConfig, prune
from streamprune.errors import TaskError

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from streamprune.streaming import lengths
from streamprune.streaming.lengths import plan_passes
from streamprune.tasks.streamed_lm import StreamedLM, computed_once
from streamprune.texts.tokenizer import load_tokenizer

WORDS = ["the", "a", "cat", "dog", "sat", "on", "mat", "ran", "far", "away", "from", "home", "again"]
PRECISE = 1e-9  # in float64, of sums of up to a thousand nats
IN_FLOAT32 = ("gemma2", "gpt_neox", "mixtral")  # transformers computes a part of these in float32 whatever the dtype
# The byte tokenizer counts more tokens of a long text than the model takes, which both cut.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def asked(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def words(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def questions() -> list[Instance]:
    """Four continuations each of contexts of many lengths, with spaces at the seam, and what is special."""
    draw = random.Random(0)
    pairs = [
        (context, " " + words(draw, draw.randint(1, 3)))
        for context in (words(draw, draw.randint(1, 6)) + " " * (number % 3) for number in range(8))
        for _ in range(4)
    ]
    pairs += [("", " cat"), ("<s>the", " c"), (words(draw, 30), " far away"), ("ab", "c"), ("ab", "cd"), ("ab", "d")]
    return [asked("loglikelihood", *pair) for pair in pairs]


def texts() -> list[Instance]:
    draw = random.Random(1)
    return [asked("loglikelihood_rolling", words(draw, count)) for count in (1, 3, 20, 45)]


def beginnings() -> list[Instance]:
    draw = random.Random(2)
    wishes: list[dict[str, Any]] = [
        {"until": ["e", "at"], "max_gen_toks": 12},
        {"until": "\n", "max_gen_toks": 5, "do_sample": False, "temperature": 0.0},
        {"until": [], "max_gen_toks": 9},
    ]
    return [asked("generate_until", words(draw, count), wishes[count % 3]) for count in (1, 2, 3, 4, 5, 30)]


@contextmanager
def streamed(path: Path, **options: Any) -> Iterator[StreamedLM]:
    sweeper = make_sweeper(path)
    with closing(sweeper):
        yield StreamedLM(sweeper, load_tokenizer(path), **options)


def in_memory(path: Path, dtype: torch.dtype = torch.float64) -> HFLM:
    return HFLM(pretrained=load(path, dtype), tokenizer=load_tokenizer(path), batch_size=1)


def check_equal(path: Path, precise: float = PRECISE) -> None:
    theirs = in_memory(path)
    with streamed(path) as ours:
        expected, found = theirs.loglikelihood(questions(), disable_tqdm=True), ours.loglikelihood(questions())
        assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=precise)
        assert [each[1] for each in found] == [each[1] for each in expected]
        expected_sums = theirs.loglikelihood_rolling(texts(), disable_tqdm=True)
        assert ours.loglikelihood_rolling(texts()) == pytest.approx(expected_sums, abs=10 * precise)
        generated = theirs.generate_until(beginnings(), disable_tqdm=True)
        assert ours.generate_until(beginnings()) == generated
        assert len(set(generated)) > 1


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", *map(slow, ("opt", "gpt_neox", "qwen3", "mistral", "smollm3", "mixtral"))]
)
def test_a_streamed_model_answers_as_the_whole_one(family, tmp_path):
    save_tiny(tmp_path / family, family)
    check_equal(tmp_path / family, 1e-5 if family in IN_FLOAT32 else PRECISE)


@pytest.mark.parametrize("stock", [False, True])
def test_a_pruned_model_answers_as_transformers_has_it(stock, tmp_path):
    save_tiny(tmp_path / "dense", "llama", dtype=torch.float32)
    config = PruneConfig(
        model=tmp_path / "dense",
        output=tmp_path / "pruned",
        method="magnitude",
        ratio=0.4,
        layers=(0 if stock else 1, 4),
        stock=stock,
        allocation="uniform" if stock else "global",
        evaluate=False,
    )
    assert prune(config).layout == ("stock" if stock else "ragged")
    check_equal(tmp_path / "pruned")


def test_float32_is_as_near_as_sums_of_float32_are(tiny_llama):
    expected = in_memory(tiny_llama, torch.float32).loglikelihood(questions(), disable_tqdm=True)
    with closing(make_sweeper(tiny_llama, dtype=torch.float32)) as sweeper:
        found = StreamedLM(sweeper, load_tokenizer(tiny_llama)).loglikelihood(questions())
    assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], rel=1e-6)


def test_what_the_model_itself_would_say_is_greedy(tmp_path):
    model = save_tiny(tmp_path / "llama", "llama")
    context = list(b"a cat sat on")
    said = model.generate(torch.tensor([context]), max_new_tokens=6, do_sample=False)[0, len(context) :].tolist()
    other = [*said[:-1], (said[-1] + 1) % 250]
    with streamed(tmp_path / "llama") as lm:
        requests = [(None, context, said), (None, context, said[:1]), (None, context, other)]
        assert [greedy for _, greedy in lm._loglikelihood_tokens(requests)] == [True, True, False]


def test_answers_do_not_depend_on_batches_and_passes(tmp_path, monkeypatch):
    save_tiny(tmp_path / "llama", "llama")
    with streamed(tmp_path / "llama") as lm:
        expected, generated = lm.loglikelihood(questions()), lm.generate_until(beginnings())
    for micro_batch, hidden_bytes in ((1, 1 << 30), (3, 20_000), (None, 1)):
        monkeypatch.setattr(lengths, "HIDDEN_BYTES", hidden_bytes)
        with streamed(tmp_path / "llama", micro_batch=micro_batch) as lm:
            found = lm.loglikelihood(questions())
            assert [each[0] for each in found] == pytest.approx([each[0] for each in expected], abs=PRECISE)
            assert lm.generate_until(beginnings()) == generated


def test_bos_is_put_before_texts_or_left_out_as_asked(tmp_path):
    save_tiny(tmp_path / "llama", "llama")
    tokenizer = load_tokenizer(tmp_path / "llama")
    bos, cat = tokenizer.bos_token_id, tokenizer.encode("cat", add_special_tokens=False)
    for option, begun in (("auto", tokenizer.encode("cat")), ("never", cat), ("always", [bos, *cat])):
        with streamed(tmp_path / "llama", bos=option) as lm:
            assert lm.tok_encode("cat") == begun
            assert lm.tok_encode("cat", add_special_tokens=False) == cat
            assert lm.tok_encode("<s>cat") == [bos, *cat]


# Passes and batches.


def test_each_sequence_is_computed_once_within_the_bounds(tmp_path):
    save_tiny(tmp_path / "llama", "llama")
    draw = random.Random(0)
    sizes = [draw.randint(1, 61) for _ in range(200)]
    with streamed(tmp_path / "llama") as lm:
        divided = plan_passes(lm.sweeper, sizes, 61, micro_batch=7)
    batches = [batch for each in divided for batch in each]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(200))
    for batch in batches:
        longest = max(sizes[row] for row in batch.rows)
        assert longest <= batch.length <= min(61, longest + lengths.STEP - 1)
        assert all(sizes[row] >= batch.length - lengths.STEP for row in batch.rows)
        assert len(batch.rows) <= 7


def test_what_is_another_ones_beginning_is_not_computed_again():
    inputs = [(1, 2), (1, 2, 3), (4,), (1, 2), (1, 2, 4), (2,), ()]
    sequences, places = computed_once(inputs)
    assert sorted(sequences) == [(1, 2, 3), (1, 2, 4), (2,), (4,)]
    for each, place in zip(inputs, places, strict=True):
        assert sequences[place][: len(each)] == each


# What is refused.


@pytest.mark.parametrize(
    ("wishes", "names"),
    [
        ({"until": ["."], "do_sample": True, "temperature": 0.8}, ("do_sample=True", "greedy")),
        ({"until": ["."], "num_beams": 4}, ("num_beams=4", "greedy")),
        ({"until": ["."], "max_gen_toks": 64}, ("generates 64", "the model takes 64")),
    ],
)
def test_generation_that_is_not_greedy_or_too_long_is_refused(wishes, names, tmp_path):
    save_tiny(tmp_path / "llama", "llama")
    with streamed(tmp_path / "llama") as lm, pytest.raises(TaskError) as raised:
        lm.generate_until([asked("generate_until", "a cat", wishes)])
    assert all(name in str(raised.value) for name in names)


def test_a_continuation_that_cannot_be_scored_is_refused(tmp_path):
    save_tiny(tmp_path / "llama", "llama")
    with streamed(tmp_path / "llama") as lm:
        for continuation in ("", "x" * 65):
            with pytest.raises(TaskError, match="1 to 64"):
                lm.loglikelihood([asked("loglikelihood", "a cat", continuation)])


def test_a_tokenizer_without_marks_of_a_text_is_refused(tmp_path):
    save_tiny(tmp_path / "llama", "llama")
    tokenizer = load_tokenizer(tmp_path / "llama")
    tokenizer.bos_token = tokenizer.eos_token = None
    with closing(make_sweeper(tmp_path / "llama")) as sweeper, pytest.raises(TaskError, match=r"name one in"):
        StreamedLM(sweeper, tokenizer)


def test_a_context_of_which_no_token_is_left_is_that_of_no_context(tmp_path):
    save_tiny(tmp_path / "llama", "llama")
    with streamed(tmp_path / "llama") as lm:
        (empty, spaces) = lm._loglikelihood_tokens([(None, [lm.prefix_token_id], [7, 9]), (None, [], [7, 9])])
        assert empty == spaces
        assert lm.generate_until([asked("generate_until", "", {"until": [], "max_gen_toks": 2})])
        assert lm.generate_until([asked("generate_until", "a cat", {"until": [], "max_gen_toks": 0})]) == [""]
