"""GGUF files, loaded by llama.cpp: the log-probabilities and greedy text of transformers."""

import json

import pytest
import torch
from llama_cpp import LlamaCpp
from safetensors.torch import load_file, save_file
from tiny_models import N_LAYERS, VOCABULARY, merge_once, save_tiny, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from streamprune import PruneConfig, prune
from streamprune.errors import CheckpointError, OutputError, UsageError
from streamprune.output.gguf import write_gguf

pytest.importorskip("gguf")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
EVEN = {"hidden_size": 96, "intermediate_size": 64, "head_dim": 16}  # whole blocks of q8_0
RUNS = [  # (family, its fields, options of the run, llama.cpp's architecture)
    ("llama", {}, None, "llama"),
    ("llama", {"tie_word_embeddings": True, "mlp_bias": True, "attention_bias": True}, None, "llama"),
    ("llama", {"rope_parameters": LLAMA3}, {"allocation": "global"}, "deci"),
    ("llama", {"rope_parameters": LINEAR}, {"stock": True, "mlp_ratio": 0.3}, "llama"),
    ("llama", {"rope_parameters": YARN}, None, "llama"),
    ("llama", {}, {"method": "flap", "samples": 4, "seq_len": 16}, "deci"),
    ("llama", {}, {"granularity": "layers", "ratio": 0.5, "layers": (1, 3)}, "llama"),
    ("mistral", {"sliding_window": None}, {"allocation": "global"}, "deci"),
    ("qwen2", {}, None, "qwen2"),
    ("qwen2", {}, {"allocation": "global"}, "deci"),
    ("qwen3", {"attention_bias": False}, None, "qwen3"),
    ("qwen3", {"attention_bias": False}, {"stock": True}, "qwen3"),
    ("qwen3", {"attention_bias": False, "tie_word_embeddings": True}, {"allocation": "global"}, "openelm"),
]


def save(path, family, **fields):
    """A tiny model, with a tokenizer for llama.cpp."""
    save_tiny(path, family, **fields)
    merge_once(path)


def edited(path, name="config.json", **fields):
    file = path / name
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def make(tmp_path, family, fields, options):
    """The directory of a tiny model, pruned if there are options."""
    save(tmp_path / "dense", family, dtype=torch.float32, **fields)
    if options is None:
        return tmp_path / "dense"
    given = {"method": "magnitude", "ratio": 0.3, "layers": (0, N_LAYERS), "evaluate": False, **options}
    prune(PruneConfig(str(tmp_path / "dense"), tmp_path / "pruned", **given))
    return tmp_path / "pruned"


def whole(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True).eval()


@pytest.mark.parametrize("family,fields,options,architecture", RUNS)
def test_llama_cpp_computes_what_transformers_does(family, fields, options, architecture, tmp_path):
    path = make(tmp_path, family, fields, options)
    written = write_gguf(path, tmp_path / "model.gguf", "f32")
    assert (written.architecture, written.nbytes) == (architecture, (tmp_path / "model.gguf").stat().st_size)
    model, ids = whole(path), token_ids(1, 24)[0].tolist()
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    loaded = LlamaCpp(tmp_path / "model.gguf")
    torch.testing.assert_close(loaded.log_probabilities(ids, VOCABULARY), expected, atol=2e-4, rtol=0)
    prompt = torch.tensor([ids[:8]])
    generated = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False)
    follows = generated[0, 8:].tolist()
    assert loaded.greedy(ids[:8], len(follows), VOCABULARY) == follows  # it may have come to an end


@pytest.mark.parametrize("gone", [{1: "mlp"}, {1: "attention"}, {0: "attention", 2: "mlp"}], ids=str)
@pytest.mark.parametrize(
    "family,fields,architecture",
    [
        ("llama", {}, "deci"),
        ("qwen2", {}, "deci"),
        ("qwen3", {"attention_bias": False, "tie_word_embeddings": True}, "openelm"),
    ],
)
def test_a_layer_without_its_mlp_or_attention_computes_the_same(family, fields, architecture, gone, tmp_path):
    path = make(tmp_path, family, fields, {"allocation": "global"})
    tensors, config = load_file(path / "model.safetensors"), json.loads((path / "config.json").read_text())
    parts = {"mlp": ("mlp.", "post_attention_layernorm."), "attention": ("self_attn.", "input_layernorm.")}
    assert config["per_layer_config"], "layers have widths of their own"
    for layer, what in gone.items():
        config["per_layer_config"][f"{layer}"] = config["per_layer_config"].get(f"{layer}", {}) | {"skip": [what]}
        begins = tuple(f"model.layers.{layer}.{part}" for part in parts[what])
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(begins)}
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    edited(path, **config)
    assert write_gguf(path, tmp_path / "model.gguf", "f32").architecture == architecture
    ids = token_ids(1, 24)[0].tolist()
    with torch.no_grad():
        expected = whole(path)(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    found = LlamaCpp(tmp_path / "model.gguf").log_probabilities(ids, VOCABULARY)
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("type_name", ["f16", "bf16"])
def test_narrower_types_have_the_same_perplexity_to_half_a_percent(type_name, tmp_path):
    path = make(tmp_path, "llama", EVEN, {"allocation": "global"})
    full = write_gguf(path, tmp_path / "full.gguf", "f32")
    written = write_gguf(path, tmp_path / "model.gguf", type_name)
    assert written.nbytes < full.nbytes
    model, loaded, losses = whole(path), LlamaCpp(written.path), []
    for ids in token_ids(3, 48).tolist():
        with torch.no_grad():
            expected = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        both = torch.stack([expected, loaded.log_probabilities(ids, VOCABULARY)])
        losses.append(-both[:, torch.arange(47), ids[1:]])
    one, other = torch.cat(losses, dim=1).mean(dim=1).exp()
    assert abs(other / one - 1) <= 0.005


def test_blocks_of_eight_bits_lie_half_a_step_from_what_is_stored(tmp_path):
    """The tiny model's down_proj has columns that are no whole blocks, and stays in float16."""
    import gguf

    path = make(tmp_path, "llama", {"hidden_size": 96, "head_dim": 16}, {"allocation": "global"})
    full, eight = (
        {tensor.name: tensor for tensor in gguf.GGUFReader(write_gguf(path, tmp_path / kind, kind).path).tensors}
        for kind in ("f32", "q8_0")
    )
    kinds = {name.split(".")[-2]: tensor.tensor_type.name for name, tensor in eight.items()}
    assert (kinds["attn_q"], kinds["ffn_down"], kinds["attn_norm"]) == ("Q8_0", "F16", "F32")
    for name, tensor in eight.items():
        expected = full[name].data
        found = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(expected.shape)
        if tensor.tensor_type.name == "Q8_0":
            blocks, error = (each.reshape(-1, 32) for each in (expected, abs(found - expected)))
            # A scale is rounded to float16.
            assert (error <= abs(blocks).max(axis=1, keepdims=True) / 127 * (0.5 + 127 * 2**-11)).all()
    assert LlamaCpp(tmp_path / "q8_0").next_token([1, 2, 3], VOCABULARY).exp().sum() == pytest.approx(1, abs=1e-4)


def test_the_type_is_the_stored_one_and_special_tokens_and_template_come_along(tmp_path):
    import gguf

    save(tmp_path / "in", "llama", dtype=torch.bfloat16)
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages }}")
    assert write_gguf(tmp_path / "in", tmp_path / "model.gguf").type == "bf16"
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    said = {name: field.contents() for name, field in fields.items()}
    assert said["tokenizer.ggml.model"] == "gpt2" and said["tokenizer.ggml.pre"] == "gpt-2"
    assert said["tokenizer.chat_template"] == "{{ messages }}"
    special = [said[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")]
    assert special == [256, 257, 258] and said["tokenizer.ggml.tokens"][256:] == ["<s>", "</s>", "<pad>", "Ġt"]
    assert said["tokenizer.ggml.token_type"][255:] == [1, 3, 3, 3, 1]


def test_what_llama_cpp_cannot_hold_is_refused_and_nothing_is_left(tmp_path):
    save(tmp_path / "llama", "llama", dtype=torch.float32)

    def refused(path, said, error=UsageError, **more):
        with pytest.raises(error, match=said):
            write_gguf(path, tmp_path / "model.gguf", **more)
        assert not list(tmp_path.glob("*model.gguf*"))

    for family, said in (
        ("gemma2", "gemma2 models are not written as GGUF, only llama, mistral"),
        ("gpt2", "gpt2 models are not written"),
    ):
        save_tiny(tmp_path / family, family)
        refused(tmp_path / family, said)
    ragged = make(tmp_path / "q", "qwen3", {"attention_bias": False}, {"allocation": "global"})
    refused(ragged, "llama.cpp's qwen3 has one width for all layers.*--allocation uniform --stock")
    biased = make(tmp_path / "b", "qwen3", {"attention_bias": True, "tie_word_embeddings": True}, {"layers": (1, 2)})
    refused(biased, "its openelm none at all; this model has blk.0.attn_q.bias")
    edited(ragged, tie_word_embeddings=True)  # it has a head of its own all the same
    refused(ragged, "no head beside the embeddings")
    refused(tmp_path / "nowhere", "nowhere", CheckpointError)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    for said, fields in (
        ("rotary embeddings of type dynamic", {"rope_parameters": dynamic}),
        ("of type yarn are .* has attention_factor", {"rope_parameters": YARN | {"attention_factor": 1.0}}),
        ("config.json has no rms_norm_eps", {"rms_norm_eps": None}),
        ("with silu and whole rotary embeddings", {"hidden_act": "gelu"}),
        ("is compressed; prune again without --compress", {"quantization_config": {"quant_method": "x"}}),
    ):
        before = (tmp_path / "llama" / "config.json").read_text()
        edited(tmp_path / "llama", **fields)
        refused(tmp_path / "llama", said, CheckpointError if "has no" in said else UsageError)
        (tmp_path / "llama" / "config.json").write_text(before)
    stored = json.loads((tmp_path / "llama" / "tokenizer.json").read_text())
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    for changed in ({"pre_tokenizer": bytes_alone}, {"normalizer": {"type": "Lowercase"}}):
        edited(tmp_path / "llama", "tokenizer.json", **stored | changed)
        refused(tmp_path / "llama", "splits texts in a way .* give it with --pre")
    assert write_gguf(tmp_path / "llama", tmp_path / "named.gguf", pre="gpt-2").nbytes > 0
    far = stored["model"]["vocab"] | {"far": 999}
    edited(
        tmp_path / "llama", "tokenizer.json", **stored | {"model": stored["model"] | {"vocab": far}, "normalizer": None}
    )
    refused(tmp_path / "llama", "token 'far' is number 999 of 260 embeddings")
    edited(tmp_path / "llama", "tokenizer.json", model=stored["model"] | {"merges": []})
    refused(tmp_path / "llama", "merges nothing")
    edited(tmp_path / "llama", "tokenizer.json", model=stored["model"] | {"type": "WordPiece"})
    refused(tmp_path / "llama", "a tokenizer of type WordPiece")
    (tmp_path / "llama" / "tokenizer.json").write_text("{")
    refused(tmp_path / "llama", "tokenizer.json", CheckpointError)
    (tmp_path / "llama" / "tokenizer.json").unlink()
    refused(tmp_path / "llama", "has no tokenizer.json")


SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
PIECES = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "t", "h", "e", "▁t", "he", "▁the", "c", "a"]
MERGES = [["▁", "t"], ["h", "e"], ["▁t", "he"]]
TEXT = " the cat, the\nhat; é 12 the"


def tokenizer_of_pieces(path, prefix):
    """SentencePiece's as transformers has it: BPE with bytes for what it does not know."""
    stored = json.loads((path / "tokenizer.json").read_text())
    vocabulary = {token: number for number, token in enumerate([*PIECES, "<s>", "</s>"])}
    stored["model"] |= {"vocab": vocabulary, "merges": MERGES, "byte_fallback": True, "unk_token": "<unk>"}
    stored["added_tokens"] = [
        stored["added_tokens"][0] | {"id": vocabulary[token], "content": token} for token in ("<unk>", "<s>", "</s>")
    ]
    prepend = [{"type": "Prepend", "prepend": "▁"}] if prefix else []
    edited(
        path,
        "tokenizer.json",
        **stored | {"normalizer": {"type": "Sequence", "normalizers": [*prepend, SPACES]}, "pre_tokenizer": None},
    )
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>"}')


@pytest.mark.parametrize("pieces", [None, True, False], ids=["bytes", "prefix", "pieces"])
def test_llama_cpp_makes_the_same_tokens_of_a_text(pieces, tmp_path):
    save(tmp_path / "in", "llama", dtype=torch.float32, vocab_size=VOCABULARY + 20)
    if pieces is not None:
        tokenizer_of_pieces(tmp_path / "in", pieces)
    ids = AutoTokenizer.from_pretrained(tmp_path / "in")(TEXT)["input_ids"]
    loaded = LlamaCpp(write_gguf(tmp_path / "in", tmp_path / "model.gguf").path)
    both = [loaded.next_token(given, VOCABULARY + 20) for given in (TEXT, ids)]
    torch.testing.assert_close(*both, atol=1e-3, rtol=0)
    assert loaded.prompt_tokens(TEXT) == len(ids)


def edit(file, **fields):
    left = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in left.items() if value is not Ellipsis}))


@pytest.mark.parametrize(
    ("family", "fields", "context"),
    [
        ("mistral", {}, 7),
        ("mistral", {"sliding_window": ..., "max_position_embeddings": 32768}, 4096),
        ("mistral", {"sliding_window": None}, 64),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": ...}, 64),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "layer_types": ...}, 8),
        ("llama", {"sliding_window": 8}, 64),
    ],
)
def test_a_context_ends_where_a_window_begins(family, fields, context, tmp_path):
    import gguf

    save(tmp_path / "in", family, dtype=torch.float32)
    edit(tmp_path / "in" / "config.json", **fields)
    written = gguf.GGUFReader(write_gguf(tmp_path / "in", tmp_path / "model.gguf").path).fields
    architecture = "llama" if family == "mistral" else family
    assert written[f"{architecture}.context_length"].contents() == context


def test_a_name_is_no_path_of_this_machine(tmp_path):
    import gguf

    save(tmp_path / "in", "llama", dtype=torch.float32)
    edit(tmp_path / "in" / "config.json", _name_or_path="/home/somebody/models/small/")
    written = gguf.GGUFReader(write_gguf(tmp_path / "in", tmp_path / "model.gguf").path).fields
    assert written["general.name"].contents() == "small"


def test_of_several_chat_templates_all_are_written(tmp_path):
    import gguf

    save(tmp_path / "in", "llama", dtype=torch.float32)
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    edit(tmp_path / "in" / "tokenizer_config.json", chat_template=templates)
    (tmp_path / "in" / "chat_template.jinja").unlink(missing_ok=True)
    written = gguf.GGUFReader(write_gguf(tmp_path / "in", tmp_path / "model.gguf").path).fields
    assert written["tokenizer.chat_template"].contents() == "{{ 1 }}"
    assert written["tokenizer.chat_template.tool_use"].contents() == "{{ 2 }}"


@pytest.mark.parametrize("without", ["model", "merges"])
def test_a_tokenizer_that_says_little_is_refused_in_a_line(without, tmp_path):
    save(tmp_path / "in", "llama", dtype=torch.float32)
    file = tmp_path / "in" / "tokenizer.json"
    fields = json.loads(file.read_text())
    (fields if without == "model" else fields["model"]).pop(without)
    file.write_text(json.dumps(fields))
    with pytest.raises(UsageError, match=r"tokenizer\.json.*merges nothing"):
        write_gguf(tmp_path / "in", tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_file_of_the_model_is_never_replaced(name, tmp_path):
    save(tmp_path / "in", "llama", dtype=torch.float32)
    before = (tmp_path / "in" / name).read_bytes()
    with pytest.raises(OutputError, match="is a file of the model itself; choose another --output"):
        write_gguf(tmp_path / "in", tmp_path / "in" / name, overwrite=True)
    assert (tmp_path / "in" / name).read_bytes() == before


def test_a_file_that_exists_stays_unless_it_is_to_be_replaced(tmp_path):
    save(tmp_path / "in", "llama", dtype=torch.float32)
    file = tmp_path / "model.gguf"
    file.write_text("mine")
    with pytest.raises(OutputError, match="exists; choose another --output, or pass --overwrite"):
        write_gguf(tmp_path / "in", file)
    assert file.read_text() == "mine"
    (tmp_path / ".model.gguf.partial-0123abcd").mkdir()  # of one that was killed
    (tmp_path / ".model.gguf.partial-0123abcd" / "model.gguf").write_text("half")
    write_gguf(tmp_path / "in", file, overwrite=True)
    assert file.read_bytes()[:4] == b"GGUF"
    write_gguf(tmp_path / "in", tmp_path / ".partial-x")  # which looks like one of those
    assert sorted(each.name for each in tmp_path.iterdir()) == [".partial-x", "in", "model.gguf"]
    with pytest.raises(OutputError, match="is a directory"):
        write_gguf(tmp_path / "in", tmp_path / "in", overwrite=True)
