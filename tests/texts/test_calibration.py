"""Text becomes the tokens that it should, and the streamed perplexity is transformers' own."""

from __future__ import annotations

import math
import re

import pytest
import torch
from tiny_models import VOCABULARY, save_tiny, save_tokenizer, token_ids
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from streamprune.errors import CalibrationError, CheckpointError
from streamprune.pipeline.source import Source
from streamprune.streaming.perplexity import perplexity, sweeps_needed
from streamprune.texts.corpus import Corpus, sample_sequences
from streamprune.texts.documents import Documents, embedded_text
from streamprune.texts.tokenizer import load_tokenizer, tokenize

# Sampling: tokens that are their own positions show where each window lies.


@pytest.mark.parametrize(("length", "samples", "seq_len"), [(1000, 10, 16), (160, 10, 16), (17, 1, 16), (16, 1, 16)])
def test_random_windows_are_consecutive_tokens_inside_the_text(length, samples, seq_len):
    windows = sample_sequences(torch.arange(length), samples, seq_len, "random", seed=0)
    assert windows.shape == (samples, seq_len)
    assert windows.dtype == torch.int64
    assert torch.equal(windows - windows[:, :1], torch.arange(seq_len).expand(samples, seq_len))
    assert windows.min() >= 0
    assert windows.max() < length


def test_random_windows_reach_both_ends_of_the_text():
    starts = {sample_sequences(torch.arange(18), 1, 16, "random", seed)[0, 0].item() for seed in range(50)}
    assert starts == {0, 1, 2}


def test_random_windows_are_drawn_by_the_seed_alone():
    tokens = torch.arange(5000)
    first = sample_sequences(tokens, 10, 32, "random", seed=3)
    torch.manual_seed(99)
    assert torch.equal(first, sample_sequences(tokens, 10, 32, "random", seed=3))
    assert not torch.equal(first, sample_sequences(tokens, 10, 32, "random", seed=4))


def test_drawing_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    sample_sequences(torch.arange(500), 10, 32, "random", seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_first_takes_consecutive_windows_whatever_the_seed():
    for seed in range(3):
        windows = sample_sequences(torch.arange(100), 3, 16, "first", seed)
        assert torch.equal(windows, torch.arange(48).view(3, 16))


@pytest.mark.parametrize("sampling", ["random", "first"])
def test_a_text_one_token_too_short_is_refused_with_the_counts(sampling):
    with pytest.raises(CalibrationError, match=r"1,599 tokens, 100 samples of 16 need 1,600.*--calibration.*--samples"):
        sample_sequences(torch.arange(1599), 100, 16, sampling, 0)
    assert sample_sequences(torch.arange(1600), 100, 16, sampling, 0).shape == (100, 16)


def corpus_of(tokens, **options):
    """A corpus whose text has these tokens."""

    def tokenizer(text, add_special_tokens, verbose):
        return {"input_ids": [int(word) for word in text.split()]}

    text = " ".join(map(str, tokens))
    return Corpus(Documents("the text", "", lambda: iter([text]), prose=True), tokenizer, **options)


def test_segments_are_the_text_from_its_start_without_the_rest():
    corpus = corpus_of(range(37))
    assert torch.equal(corpus.segments(8, None), torch.arange(32).view(4, 8))
    assert torch.equal(corpus.segments(8, 2), torch.arange(16).view(2, 8))
    assert torch.equal(corpus.segments(8, None, most=3), torch.arange(24).view(3, 8))


@pytest.mark.parametrize(("length", "samples", "named"), [(7, None, "1 segments of 8"), (31, 4, "4 segments of 8")])
def test_too_few_tokens_for_the_segments_are_refused(length, samples, named):
    with pytest.raises(CalibrationError, match=rf"{length} tokens, {named} need .*longer text"):
        corpus_of(range(length)).segments(8, samples)


# Tokens.


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return load_tokenizer(path)


def test_tokens_are_those_of_the_whole_text(tokenizer):
    text = "Ein kurzer Satz — and the next.\n\nA third ☂.\n"
    tokens = tokenize(tokenizer, text)
    assert tokens.dtype == torch.int64
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("size", [1, 7, 20, 200])
def test_tokenising_in_blocks_loses_and_repeats_nothing(size, tokenizer, monkeypatch):
    text = "first line\nsecond line, somewhat longer than a block\n\n\nlast without an end ☂" * 5
    whole = tokenize(tokenizer, text)
    monkeypatch.setattr("streamprune.texts.tokenizer.BLOCK_CHARACTERS", size)
    assert torch.equal(tokenize(tokenizer, text), whole)


def marked_words(kind):
    """A tokenizer that puts something before a text, or makes one token of white space."""
    letters = [chr(number) for number in range(33, 127)]
    vocabulary = {token: number for number, token in enumerate(["▁", "\n", "\n\n", "Ġ", "Ċ", "ĊĊ", *letters])}
    merges = [("\n", "\n"), ("Ċ", "Ċ")]
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    if kind == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    elif kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix-space")
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("size", [5, 40, 100])
@pytest.mark.parametrize("kind", ["metaspace", "prepend", "prefix-space", "byte-level"])
def test_blocks_have_the_tokens_of_the_whole_text(kind, size, monkeypatch):
    text = "A line of words\n\nThe next one, and\n = more = \n \n of it\nthe last. " * 7
    tokenizer = marked_words(kind)
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    monkeypatch.setattr("streamprune.texts.tokenizer.BLOCK_CHARACTERS", size if size > 5 else 60)
    assert tokenize(tokenizer, text).tolist() == whole


def test_no_special_tokens_are_added(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    adding = AutoTokenizer.from_pretrained(tmp_path)
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)])
    adding.backend_tokenizer.post_processor = template
    assert adding("ab")["input_ids"][0] == 256
    assert torch.equal(tokenize(adding, "ab"), tokenize(tokenizer, "ab"))


def test_a_text_longer_than_the_model_takes_is_tokenised_without_a_warning(tokenizer):
    assert len(tokenize(tokenizer, "x" * 1000)) == 1000  # model_max_length is 64; warnings are errors here


def test_an_empty_text_has_no_tokens(tokenizer):
    assert tokenize(tokenizer, "").shape == (0,)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no usable tokenizer.*copy the tokenizer files"):
        load_tokenizer(tmp_path)


# The prose in the package.


def words(name: str) -> list[str]:
    return re.findall(r"[\w'’-]+", embedded_text(name).lower())


def test_embedded_calibration_text_is_long_enough_and_the_held_out_one_too():
    assert len(words("calibration")) >= 4000
    assert len(words("heldout")) >= 2000


def grams(name: str, n: int = 8) -> list[tuple[str, ...]]:
    text = words(name)
    return [tuple(text[start : start + n]) for start in range(len(text) - n + 1)]


def test_embedded_texts_share_no_run_of_eight_words():
    assert not set(grams("calibration")) & set(grams("heldout"))


@pytest.mark.parametrize("name", ["calibration", "heldout"])
def test_embedded_texts_do_not_repeat_themselves(name):
    runs = grams(name)
    assert len(set(runs)) == len(runs)


def test_embedded_text_suffices_for_the_default_samples_at_five_characters_a_token():
    assert len(embedded_text("calibration")) >= 10 * 128 * 5


# Perplexity.


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """family -> (directory, model): float64 models, saved once."""
    made = {}

    def get(family: str):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            made[family] = path, save_tiny(path, family, dtype=torch.float64)
        return made[family]

    return get


@pytest.mark.parametrize("group", [None, 1, 3, 100], ids=lambda group: f"group-{group}")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_perplexity_equals_that_of_transformers(family, group, measured, monkeypatch):
    path, model = measured(family)
    segments = token_ids(n=7, seq=21, seed=5)
    assert segments.max() < VOCABULARY
    if group is not None:
        monkeypatch.setattr("streamprune.streaming.perplexity.HIDDEN_BYTES", group * 21 * 48 * 8 + 5)
    with torch.no_grad():
        logits = model(segments).logits[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), segments[:, 1:].flatten())
        own = torch.stack([model(s[None], labels=s[None]).loss for s in segments]).double().mean()
    assert own.item() == pytest.approx(expected.item(), rel=1e-6), "the reference is transformers' own loss"
    with Source(str(path), device="cpu", dtype="float64", micro_batch=2).open() as sweeper:
        sweeps = sweeps_needed(sweeper, segments)
        assert sweeps == {None: 1, 1: 7, 3: 3, 100: 1}[group]
        checkpoint = sweeper.skeleton.checkpoint
        before = checkpoint.bytes_read
        result = perplexity(sweeper, segments)
        assert checkpoint.bytes_read - before == sweeps * sweeper.pager.layer_bytes()
    assert result.loss == pytest.approx(expected.item(), rel=1e-6)
    assert result.perplexity == pytest.approx(expected.exp().item(), rel=1e-6)
    assert (result.segments, result.tokens) == (7, 140)


def test_perplexity_is_independent_of_groups_and_micro_batches(measured, monkeypatch):
    path, _ = measured("llama")
    segments = token_ids(n=5, seq=13)
    losses = []
    for hidden, micro_batch in ((2 << 30, 5), (2 << 30, 2), (1, 1), (2 * 13 * 48 * 8, 3)):
        monkeypatch.setattr("streamprune.streaming.perplexity.HIDDEN_BYTES", hidden)
        with Source(str(path), device="cpu", dtype="float64", micro_batch=micro_batch).open() as sweeper:
            losses.append(perplexity(sweeper, segments).loss)
    assert max(losses) - min(losses) <= 1e-7 * losses[0]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(tmp_path):
    model = save_tiny(tmp_path, "llama", dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    with Source(str(tmp_path), device="cpu", dtype="float64").open() as sweeper:
        result = perplexity(sweeper, token_ids())
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-12)


def test_a_loss_beyond_the_range_of_floats_is_an_infinite_perplexity(tmp_path):
    model = save_tiny(tmp_path, "llama", dtype=torch.float64)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    model.save_pretrained(tmp_path)
    with Source(str(tmp_path), device="cpu", dtype="float64").open() as sweeper:
        result = perplexity(sweeper, token_ids())
    assert result.loss > 710
    assert math.isinf(result.perplexity)
