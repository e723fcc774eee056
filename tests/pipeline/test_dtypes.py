"""What a run computes in and keeps its state in where nobody says: chosen, said, recorded, and held by a journal."""

import json
import re

import pytest
import torch
from cli_runner import SHORT
from killed_runs import Killed, config, weights
from tiny_models import save_tiny

from streamprune import PruneConfig, evaluate, prune
from streamprune.errors import UsageError
from streamprune.paging.device import compute_dtype, multiplies_bfloat16, state_dtype
from streamprune.pipeline.run import foretell
from streamprune.storage.checkpoint import Checkpoint

CPU, GPU = torch.device("cpu"), torch.device("cuda")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
TAYLOR = ("taylor", "units", {}, {})


@pytest.fixture
def processor(monkeypatch):
    """Makes the processor one that multiplies bfloat16 itself, or one that does not."""

    def be(native):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, "avx512_bf16": native})

    return be


@pytest.fixture
def half(tmp_path):
    """A saved bfloat16 Llama of 8 layers."""
    save_tiny(tmp_path / "half", "llama", dtype=BF16, num_hidden_layers=8)
    return tmp_path / "half"


@pytest.mark.parametrize(
    ("found", "native"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_tile": True, "amx_bf16": True}, True),
        ({"amx_tile": True, "amx_fp16": True}, False),
        ({"architecture": "arm64", "neon": True}, False),
    ],
)
def test_a_processor_multiplies_bfloat16_by_either_instruction(found, native, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert multiplies_bfloat16() is native


@pytest.mark.parametrize("stored", [F16, BF16, F32, F64])
def test_the_compute_dtype_is_the_stored_one_where_the_device_is_fast_in_it(stored, processor, tmp_path):
    save_tiny(tmp_path, "llama", dtype=stored)
    with Checkpoint(tmp_path) as checkpoint:
        for native in (True, False):
            processor(native)
            assert compute_dtype("auto", GPU, checkpoint) == stored
            # float16 does not fit into bfloat16, and no processor was measured that multiplies it.
            assert compute_dtype("auto", CPU, checkpoint) == (BF16 if native and stored == BF16 else F32)
            for asked in (F16, BF16, F32, F64):
                assert compute_dtype(str(asked).removeprefix("torch."), CPU, checkpoint) == asked


@pytest.mark.parametrize("narrows", [True, False])
def test_state_is_narrow_where_it_was_measured_on_a_gpu_that_computes_in_half_precision(narrows):
    on_gpu = {dtype: state_dtype("auto", GPU, dtype, narrows=narrows) for dtype in (F16, BF16, F32, F64)}
    assert on_gpu == {
        dtype: "bfloat16" if narrows and dtype.itemsize == 2 else "float32" for dtype in (F16, BF16, F32, F64)
    }
    assert {state_dtype("auto", CPU, dtype, narrows=narrows) for dtype in (F16, BF16, F32, F64)} == {"float32"}
    assert state_dtype("float32", GPU, BF16, narrows=narrows) == "float32"
    assert state_dtype("bfloat16", CPU, F32, narrows=narrows) == "bfloat16"


@pytest.mark.parametrize(("native", "chosen"), [(True, "bfloat16"), (False, "float32")])
def test_what_is_chosen_is_what_asking_for_it_gives_and_is_said_and_recorded(
    native, chosen, processor, half, tmp_path, streamprune
):
    processor(native)
    found = {}
    for name, asked in (("auto", ()), ("asked", ("--dtype", chosen))):
        options = ("--method", "taylor", "--layers", "2:6", *SHORT, *asked)
        result = streamprune("--model", half, "--output", tmp_path / name, *options)
        assert result.code == 0, result.err
        assert re.findall(r"computed in (\w+)", result.out + result.err) == [chosen]  # once
        facts = json.loads((tmp_path / name / "streamprune.json").read_text())
        assert facts["options"]["dtype"] == chosen
        assert f"- `dtype`: {chosen}\n" in (tmp_path / name / "README.md").read_text()
        found[name] = weights(tmp_path / name), facts["perplexity"]
    assert found["auto"] == found["asked"]


def test_both_perplexities_of_a_run_are_computed_in_what_it_computes_in(processor, half, tmp_path):
    """Not in what `auto` would choose for the source and the output."""
    processor(True)
    facts = prune(PruneConfig(str(half), tmp_path / "out", "magnitude", layers=(2, 6), dtype="float32")).facts
    segments, length = facts["perplexity"]["segments"]
    for directory, when in ((half, "before"), (tmp_path / "out", "after")):
        by_dtype = {
            name: evaluate(directory, seq_len=length, samples=segments, dtype=name) for name in ("float32", "auto")
        }
        assert facts["perplexity"][when] == pytest.approx(by_dtype["float32"].perplexity, rel=1e-9)
        assert by_dtype["auto"].perplexity != pytest.approx(by_dtype["float32"].perplexity, rel=1e-7)
        assert [found.dtype for found in by_dtype.values()] == ["float32", "bfloat16"]


@pytest.mark.parametrize(("begun", "moved"), [(True, "float32"), (False, "bfloat16")])
def test_a_journal_on_a_machine_that_would_choose_another_dtype_is_refused_until_told(
    begun, moved, processor, half, tmp_path, killing
):
    processor(begun)
    first = {"float32": "bfloat16", "bfloat16": "float32"}[moved]
    expected = weights(prune(config(half, tmp_path / "whole", *TAYLOR)).output)
    killing(2, "after")
    with pytest.raises(Killed):
        prune(config(half, tmp_path / "out", *TAYLOR, resume=True))
    killing(-1, "after")
    processor(not begun)
    with pytest.raises(UsageError, match=f"begun with --dtype {first}, this run has {moved}; give what it was"):
        prune(config(half, tmp_path / "out", *TAYLOR, resume=True))
    assert weights(prune(config(half, tmp_path / "out", *TAYLOR, resume=True, dtype=first)).output) == expected


def test_the_dtype_of_the_state_is_recorded_where_there_is_a_state(tiny_llama, tmp_path):
    kept = {}
    for name, settings, options in (
        ("none", {"steps": 1}, {}),
        ("some", {"steps": 2}, {}),
        ("narrow", {"steps": 2}, {"state_dtype": "bfloat16"}),
    ):
        what = ("moreau-gs", "units", settings, options)
        kept[name] = prune(config(tiny_llama, tmp_path / name, *what)).facts["options"]["state_dtype"]
    assert kept == {"none": "auto", "some": "float32", "narrow": "bfloat16"}


@pytest.mark.parametrize(
    ("stored", "dtype", "said"),
    [(BF16, "auto", "bfloat16"), (F16, "auto", "bfloat16"), (F32, "auto", "float32"), (BF16, "float32", "float32")],
)
def test_a_plan_for_a_gpu_says_and_counts_what_it_computes_in_and_keeps(stored, dtype, said, tmp_path):
    wide = {"hidden_size": 192, "intermediate_size": 512, "head_dim": 32}  # all matrices are whole pages
    save_tiny(tmp_path / "model", "llama", dtype=stored, num_hidden_layers=8, **wide)
    given = {"method": "moreau-gs", "layers": (2, 6), "evaluate": False, "dtype": dtype}
    by_state = {
        state: foretell(PruneConfig(str(tmp_path / "model"), tmp_path / "out", state_dtype=state, **given), assume="l4")
        for state in ("auto", "float32", "bfloat16")
    }
    computed = str(stored).removeprefix("torch.") if dtype == "auto" else dtype
    assert f"computed in {computed}\n" in by_state["auto"].text
    assert f"of {said} state" in by_state["auto"].text
    held = {name: plan.placement.stages[0].host["state of the method"] for name, plan in by_state.items()}
    assert held["auto"] == held[said]
    assert held["float32"] == pytest.approx(2 * held["bfloat16"], rel=0.01) and held["bfloat16"] > 0
