"""Sequences begin as the tokenizer begins a text; the references are `tokenizer(text)` and transformers' own loss."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from cli_runner import SHORT
from tiny_models import save_tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from streamprune.config import PruneConfig
from streamprune.errors import CalibrationError, UsageError
from streamprune.pipeline import batches
from streamprune.pipeline.resume import hash_ids
from streamprune.pipeline.run import prune
from streamprune.pipeline.source import Source
from streamprune.texts.corpus import Corpus, open_corpus, sample_sequences
from streamprune.texts.documents import Documents, embedded_text
from streamprune.texts.tokenizer import beginning, chat_renderer, load_tokenizer

BOS, EOS, PAD = 256, 257, 258
# How families' tokenizers mark a text: (post-processor of a text, first tokens that every text is given).
MARKS = {
    "none, as SmolLM2 and Qwen": (None, ()),
    "bos, as Llama and Gemma": ("<s> $A", (BOS,)),
    "bos and eos, as T5": ("<s> $A </s>", (BOS,)),
    "two, as GLM": ("<s> <pad> $A", (BOS, PAD)),
    "eos alone": ("$A </s>", ()),
}


def save_marked(path, template, **options):
    """A tokenizer of a token per byte whose texts are marked as `template` says."""
    vocabulary = {token: index for index, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary |= {"<s>": BOS, "</s>": EOS, "<pad>": PAD}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if template is not None:
        specials = [("<s>", BOS), ("</s>", EOS), ("<pad>", PAD)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    options = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | options
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options).save_pretrained(path)


@pytest.fixture(params=MARKS)
def marked(request, tmp_path):
    """A directory with such a tokenizer, and what its texts begin with."""
    template, begins = MARKS[request.param]
    save_marked(tmp_path, template)
    return tmp_path, begins


def corpus_of(path, text, bos="auto"):
    tokenizer = load_tokenizer(path)
    documents = Documents("the text", "", lambda: iter([text]), prose=True)
    return Corpus(documents, tokenizer, beginning(tokenizer, bos))


def test_auto_is_what_the_tokenizer_puts_before_a_text(marked):
    path, begins = marked
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert beginning(tokenizer, "auto") == begins
    assert beginning(tokenizer, "always") == (BOS,)
    assert beginning(tokenizer, "never") == ()
    encoded = tokenizer("some words")["input_ids"]
    plain = tokenizer("some words", add_special_tokens=False)["input_ids"]
    assert encoded[: len(begins) + len(plain)] == [*begins, *plain]


@pytest.mark.parametrize("sampling", ["first", "random"])
@pytest.mark.parametrize("bos", ["auto", "always", "never"])
def test_each_sequence_is_the_encoding_of_its_own_text(bos, sampling, marked):
    path, begins = marked
    begins = {"auto": begins, "always": (BOS,), "never": ()}[bos]
    text = embedded_text("heldout")[:3000]
    ids = corpus_of(path, text, bos).sequences(5, 32, sampling, seed=0)
    assert ids.shape == (5, 32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    for row in ids.tolist():
        assert tuple(row[: len(begins)]) == begins
        words = tokenizer.decode(row[len(begins) :], skip_special_tokens=False)
        assert words in text or "�" in words
        if bos == "auto" and "�" not in words:
            assert tokenizer(words)["input_ids"][:32] == row
    if sampling == "first":
        real = 32 - len(begins)
        plain = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert torch.equal(ids[:, len(begins) :], plain[: 5 * real].view(5, real)), "no token is lost in between"


def test_segments_lose_no_token_between_them(marked):
    path, begins = marked
    text = embedded_text("heldout")[:1000]
    segments = corpus_of(path, text).segments(16, None)
    real = 16 - len(begins)
    assert len(segments) == len(text.encode()) // real
    assert segments[:, : len(begins)].tolist() == [list(begins)] * len(segments)


def test_tokenizers_without_a_bos_give_the_sequences_that_they_gave_before(tmp_path):
    save_marked(tmp_path, None)
    text = embedded_text("calibration")
    generator = torch.Generator().manual_seed(5)
    tokens = torch.tensor(AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"])
    starts = torch.randint(0, len(tokens) - 64 + 1, (7,), generator=generator)
    expected = torch.stack([tokens[start : start + 64] for start in starts])
    assert torch.equal(corpus_of(tmp_path, text).sequences(7, 64, "random", seed=5), expected)


def test_always_without_a_bos_token_is_refused(tmp_path):
    save_marked(tmp_path, None, bos_token=None)
    with pytest.raises(UsageError, match=r"--bos always: .* has no BOS token"):
        beginning(load_tokenizer(tmp_path), "always")
    assert beginning(load_tokenizer(tmp_path), "auto") == ()


def test_a_bos_that_the_config_does_not_name_is_taken_too(tmp_path):
    save_marked(tmp_path, "<s> $A", bos_token=None)
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<s>"]})
    assert tokenizer("a")["input_ids"][0] == BOS
    assert beginning(tokenizer, "auto") == (BOS,)


def test_a_tokenizer_that_knows_few_letters_shows_its_bos(tmp_path):
    vocabulary = {"<s>": 0, "A": 1, "C": 2, "G": 3, "T": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert beginning(PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>"), "auto") == (0,)


@pytest.mark.parametrize("mark", [True, False, None], ids=["bos", "no-bos", "default"])
@pytest.mark.parametrize("name", ["LlamaTokenizer", "GemmaTokenizer"])
def test_classes_of_transformers_begin_as_they_encode(name, mark):
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "<bos>": 4, "<eos>": 5, "▁a": 6, "a": 7, "▁": 8}
    options = {} if mark is None else {"add_bos_token": mark}
    tokenizer = getattr(transformers, name)(vocab=vocabulary, merges=[], **options)
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    assert [*beginning(tokenizer, "auto"), *plain] == tokenizer("a")["input_ids"]
    assert bool(beginning(tokenizer, "auto")) == bool(mark)


def test_a_sequence_of_marks_alone_is_refused(tmp_path):
    save_marked(tmp_path, "<s> <pad> $A")
    with pytest.raises(UsageError, match="--seq-len 2: leaves no token"):
        corpus_of(tmp_path, "words").sequences(1, 2, "first", seed=0)


TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("sampling", ["first", "random", "records"])
@pytest.mark.parametrize(
    ("template", "bos"), [("<s> $A", "auto"), (None, "auto"), (None, "always"), ("<s> $A", "never")]
)
def test_a_conversation_is_what_the_template_makes_of_it_with_one_bos(template, bos, sampling, tmp_path):
    save_marked(tmp_path, template, chat_template=TEMPLATE)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    corpus = open_corpus(tmp_path, tmp_path / "chat.jsonl", field="messages", bos=bos)
    expected = corpus.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert expected[0] == BOS
    assert corpus.sequences(1, len(expected), sampling, seed=0).tolist() == [expected]
    assert corpus.segments(len(expected), None).tolist() == [expected]


def test_a_window_that_begins_with_a_conversation_has_one_bos_too():
    tokens = torch.tensor([BOS, 1, 2, 3, 4] * 200)
    windows = sample_sequences(tokens, 100, 9, "random", 0, (BOS,))
    assert BOS not in windows[:, 0].tolist()
    assert all(row[row.index(1) : row.index(1) + 4] == [1, 2, 3, 4] for row in windows.tolist() if row.index(1) <= 5)


def test_a_tokenizer_without_a_template_refuses_conversations(tmp_path):
    save_marked(tmp_path, None)
    with pytest.raises(CalibrationError, match=r"chat template cannot take it .*--field"):
        chat_renderer(load_tokenizer(tmp_path))([{"role": "user", "content": "Hello"}])


# Whole runs.


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A saved gemma3_text whose tokenizer begins texts with BOS."""
    path = tmp_path_factory.mktemp("gemma")
    save_tiny(path, "gemma3_text", dtype=torch.float32)
    save_marked(path, "<s> $A")
    return path


def transformers_loss(path, ids):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    with torch.no_grad():
        return torch.stack([model(row[None], labels=row[None]).loss for row in ids]).mean().item()


@pytest.mark.parametrize(("bos", "begins"), [("auto", (BOS,)), ("never", ())])
def test_eval_is_transformers_loss_on_encoded_segments(bos, begins, gemma, streamprune, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(embedded_text("heldout")[:400])
    result = streamprune("eval", "--model", gemma, "--text", file, "--seq-len", 20, "--bos", bos, "--dtype", "float64")
    assert result.code == 0, result.err
    plain = AutoTokenizer.from_pretrained(gemma)(file.read_text(), add_special_tokens=False)["input_ids"]
    real = 20 - len(begins)
    ids = torch.tensor([[*begins, *plain[n : n + real]] for n in range(0, len(plain) - real + 1, real)])
    loss = float(result.out.split("loss ")[1].split()[0])
    assert loss == pytest.approx(transformers_loss(gemma, ids), abs=2e-6)
    assert ("each <s> and 19 of the text" in result.out) == bool(begins)


def test_calibration_repair_and_evaluation_all_begin_with_it(gemma, tmp_path):
    for bos in ("auto", "never"):
        options = {"samples": 2, "seq_len": 16, "compensate": True, "compensate_tokens": 300, "layers": (1, 3)}
        config = PruneConfig(model=gemma, output=tmp_path / bos, method="taylor", bos=bos, **options)
        facts = prune(config).facts
        assert facts["options"]["bos"] == bos
        assert facts["sequences_begin_with"] == ([{"id": BOS, "token": "<s>"}] if bos == "auto" else [])
        card = (tmp_path / bos / "README.md").read_text()
        assert f"`bos`: {bos}" in card
        assert json.loads((tmp_path / bos / "streamprune.json").read_text())["options"]["bos"] == bos
        with Source(str(gemma), device="cpu").open() as sweeper:
            tokens = batches.open_texts(config, sweeper.skeleton).tokens(config, sweeper.skeleton)
        parts = (tokens.calibration, tokens.repair, tokens.evaluation)
        assert [tuple(ids.shape) for ids in parts] == [(2, 16), (4, 64), (100, 64)]
        assert all(bool((ids[:, 0] == BOS).all()) == (bos == "auto") for ids in parts)
        assert all(BOS not in ids[:, 1:] for ids in parts)
        hashes = [facts["scoring"]["sha256_of_calibration_ids"]]
        hashes += [facts[part]["sha256_of_ids"] for part in ("compensation", "perplexity")]
        assert hashes == list(map(hash_ids, parts)), "what the run computed on"


def test_the_number_of_real_tokens_is_said(gemma, streamprune, output):
    done = streamprune("--model", gemma, "--output", output, "--method", "taylor", *SHORT, "--layers", "1:3")
    assert done.code == 0, done.err
    assert "calibration on 2 x 16 tokens, each <s> and 15 of the text; evaluation on 100 x 64 tokens, each" in done.err


def test_a_journal_of_another_beginning_is_refused(gemma, streamprune, output, monkeypatch):
    options = ("--model", gemma, "--output", output, "--method", "taylor", *SHORT, "--layers", "1:3", "--no-evaluate")
    monkeypatch.setattr("streamprune.pipeline.job.Job.cut", lambda *rest: (_ for _ in ()).throw(KeyboardInterrupt))
    assert streamprune(*options, "--resume").code == 1
    monkeypatch.undo()
    result = streamprune(*options, "--resume", "--bos", "never")
    assert result.code == 2
    assert "was begun with --bos auto, this run has never" in result.err
