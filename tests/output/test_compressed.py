"""--compress: 2:4 weights as sparse-24-bitmask, read back by compressed-tensors itself, and refused without it."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from cli_runner import SHORT, cells, edit_tensors
from killed_runs import kill_at_commits
from safetensors.torch import load_file
from tiny_models import save_tiny

from streamprune.output import sparse24
from streamprune.storage.directory import temporary_sibling

OPTIONS = ("--granularity", "2:4", "--method", "magnitude", "--layers", "1:3", "--dtype", "float32", *SHORT)
PRUNED = [
    f"model.layers.{layer}.{module}"
    for layer in (1, 2)
    for module in (
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )
]


@pytest.fixture
def package():
    """Skips where there is no compressed-tensors, or one without the format."""
    reason = "needs compressed-tensors 0.13 or 0.14: pip install 'streamprune[compressed]'"
    return pytest.importorskip("compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask", reason=reason)


@pytest.fixture
def dense(tmp_path):
    """A bfloat16 Llama whose matrices all have rows that 4 divides, those of `down` not by 8."""
    save_tiny(tmp_path / "dense", "llama", dtype=torch.bfloat16, intermediate_size=44)
    return tmp_path / "dense"


@pytest.fixture
def pair(package, streamprune, dense, tmp_path):
    """The same run without and with --compress: two directories, and what the second one printed."""
    plain, output = tmp_path / "plain", tmp_path / "compressed"
    arguments = ("--model", dense, "--quiet", *OPTIONS)
    assert streamprune(*arguments, "--output", plain).code == 0
    result = streamprune(*arguments, "--output", output, "--compress")
    assert result.code == 0, result.err
    return plain, output, result


def test_stored_tensors_are_what_the_package_makes_of_the_pruned_ones(package, pair):
    plain, output, _ = pair
    before, after = (load_file(path / "model.safetensors") for path in (plain, output))
    for module in PRUNED:
        matrix = before.pop(f"{module}.weight")
        shape, values, mask = (after.pop(f"{module}.{part}") for part in ("shape", "compressed", "bitmask"))
        assert f"{module}.weight" not in after
        assert (shape.dtype, shape.tolist()) == (torch.int64, [[matrix.shape[0]], [matrix.shape[1]]])
        assert (values.dtype, values.shape) == (matrix.dtype, (matrix.shape[0], matrix.shape[1] // 2))
        assert (mask.dtype, mask.shape) == (torch.uint8, (matrix.shape[0], -(-matrix.shape[1] // 8)))
        restored = package.Sparse24BitMaskTensor.from_compressed_data(shape, values, mask).decompress()
        assert torch.equal(restored, matrix)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(output.glob(".*"))


def test_files_are_smaller_by_almost_half_of_the_pruned_matrices(pair):
    plain, output, result = pair
    before, after = (load_file(path / "model.safetensors") for path in (plain, output))
    rows = {module: before[f"{module}.weight"] for module in PRUNED}
    saved = sum(tensor.nbytes // 2 - tensor.shape[0] * -(-tensor.shape[1] // 8) - 16 for tensor in rows.values())
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in (before, after)]
    assert sizes[0] - sizes[1] == saved > 0
    assert cells(result.out, "bytes") == [str(sizes[0]), str(sizes[1])]
    assert (output / "model.safetensors").stat().st_size < (plain / "model.safetensors").stat().st_size


def test_perplexity_config_card_and_summary(pair):
    plain, output, result = pair
    facts, same = (json.loads((path / "streamprune.json").read_text()) for path in (output, plain))
    assert facts["perplexity"] == same["perplexity"]
    assert facts["versions"]["compressed-tensors"] == sparse24.version()
    config, before = (json.loads((path / "config.json").read_text()) for path in (output, plain))
    fields = config.pop("quantization_config")
    assert config == before
    assert fields["quant_method"] == "compressed-tensors"
    sparse = fields["sparsity_config"]
    assert (sparse["format"], sparse["sparsity_structure"]) == ("sparse-24-bitmask", "2:4")
    assert (sparse["targets"], sparse["ignore"]) == (PRUNED, [])
    card = (output / "README.md").read_text()
    for text in (card, result.out):
        for reader in ("transformers 4 ", "vLLM before 0.19", "transformers 5 refuses"):
            assert reader in text
    assert "sparse-24-bitmask" not in (plain / "README.md").read_text()


def test_the_package_finds_the_format_by_the_config(package, pair):
    model_compressor = pytest.importorskip("compressed_tensors.compressors").ModelCompressor
    fields = json.loads((pair[1] / "config.json").read_text())["quantization_config"]
    found = model_compressor.from_compression_config(fields)
    assert isinstance(found.sparsity_compressor, package.Sparse24BitMaskCompressor)
    assert found.quantization_config is None
    restored = dict(found.sparsity_compressor.decompress(str(pair[1])))
    assert all(torch.equal(restored[n], t) for n, t in load_file(pair[0] / "model.safetensors").items())


@pytest.mark.slow
def test_verify_and_eval_read_it(pair, streamprune):
    plain, output, _ = pair
    result = streamprune("verify", output)
    assert result.code == 0, result.err
    assert "weights decompressed" in result.out
    assert "FAILED" not in result.out
    told = [streamprune("eval", "--model", path, "--seq-len", "32", "--quiet").out for path in (plain, output)]
    assert told[0] == told[1] != ""
    assert not list(output.glob(".*")), "the dense copy stayed"


def test_verify_sees_a_changed_value(pair, streamprune):
    _, output, _ = pair
    edit_tensors(output, lambda tensors: tensors[f"{PRUNED[0]}.compressed"].mul_(2))
    result = streamprune("verify", output)
    assert result.code == 1
    assert "FAILED" in result.out


def test_a_damaged_bitmask_is_named(pair, streamprune):
    _, output, _ = pair
    edit_tensors(output, lambda tensors: tensors[f"{PRUNED[0]}.bitmask"].fill_(255))
    result = streamprune("eval", "--model", output, "--seq-len", "32", "--quiet")
    assert result.code == 1
    assert f"{PRUNED[0]}.weight cannot be decompressed" in result.err
    assert not list(output.glob(".*"))


def test_compressed_weights_are_not_pruned_again(pair, refused):
    refused(pair[1], *OPTIONS, code=1, names=(str(pair[1]), "compressed"), remedy="prune the dense model")


def test_transposed_matrices_are_refused(package, refused, tmp_path):
    save_tiny(tmp_path / "gpt2", "gpt2", dtype=torch.float32, n_inner=40)
    refused(tmp_path / "gpt2", *OPTIONS, "--compress", code=2, names=("--compress", "gpt2"), remedy="leave")


def test_a_matrix_that_is_not_2_4_is_never_stored(package):
    with pytest.raises(AssertionError, match="is not 2:4"):
        sparse24.parts("a.weight", torch.ones(4, 8))


def test_without_the_package_it_is_refused_before_any_work(monkeypatch, refused, streamprune, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "compressed_tensors"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    # Not even the model is looked at.
    message = refused(tmp_path / "none", *OPTIONS, "--compress", code=2, names=("--compress", "compressed-tensors"))
    assert "pip install 'streamprune[compressed]'" in message
    planned = streamprune("plan", "--model", tmp_path / "none", *OPTIONS, "--compress")
    assert planned.code == 2 and message in planned.err


def test_a_version_that_has_lost_the_format_is_refused(monkeypatch, refused, model):
    monkeypatch.setitem(sys.modules, "compressed_tensors.compressors.sparse_compressors.sparse_24_bitmask", None)
    refused(model, *OPTIONS, "--compress", code=2, names=("0.13", "before 0.15"), remedy="pip install")


@pytest.mark.parametrize("granularity", ["units", "weights", "4:8"])
def test_only_2_4_is_compressed(granularity, refused, model):
    refused(model, "--granularity", granularity, "--compress", code=2, names=("--compress",), remedy="leave")


def test_dense_directories_are_read_as_they_are(tiny_llama):
    with sparse24.decompressed(tiny_llama) as directory:
        assert directory == tiny_llama


@pytest.mark.parametrize("method", ["magnitude", "gblm"])
def test_a_run_killed_at_any_commit_ends_with_the_same_bytes(method, package, dense, tmp_path, killing):
    kill_at_commits((method, "2:4", {}, {"compress": True, "layers": (1, 3)}), dense, tmp_path, killing)


@pytest.mark.parametrize("name", ["out", ".out.partial-0123abcd"])
def test_a_copy_that_a_killed_process_left_is_removed_by_the_next(name, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / ".out.partial-dead").mkdir()
    (tmp_path / name).mkdir(exist_ok=True)
    with temporary_sibling(tmp_path / name) as first, temporary_sibling(tmp_path / name) as second:
        assert first.is_dir() and second.is_dir() and first != second
        assert not (tmp_path / ".out.partial-dead").exists()
    assert [each.name for each in tmp_path.iterdir() if not each.samefile(tmp_path / name)] in ([], ["out"])
