"""The real 135M Llama, where `streamprune demo --fetch-only` has put it: counts, loading, perplexity, bytes read."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from streamprune import PruneConfig, prune
from streamprune.commands import demo
from streamprune.methods.sinks import UnitScores
from streamprune.methods.table import METHODS, resolve_settings
from streamprune.pipeline.source import Source
from streamprune.planning.rates import default_cache
from streamprune.streaming.statistics import Statistics
from streamprune.verification.verify import verify

MODEL = default_cache() / demo.MODEL_NAME
pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(not (MODEL / "config.json").is_file(), reason="run `streamprune demo --fetch-only` first"),
]


def rchar():
    """Bytes that this process has asked the kernel to read."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    """Taylor, a quarter of layers 4:28."""
    output = tmp_path_factory.mktemp("real") / "out"
    return prune(PruneConfig(model=str(MODEL), output=output, method="taylor", ratio=0.25, layers=(4, 28)))


def test_a_quarter_of_layers_4_to_28_is_512_channels_each(pruned):
    assert pruned.facts["parameters"] == {"before": 134_515_008, "after": 113_281_344}
    assert all(len(pruned.kept[layer]["channel"]) == 1024 for layer in range(4, 28))
    assert all(len(pruned.kept[layer]["kv_group"]) == 3 for layer in range(30))


def test_the_output_loads_with_and_without_remote_code(pruned):
    for options in ({}, {"trust_remote_code": True}):
        model = AutoModelForCausalLM.from_pretrained(pruned.output, dtype=torch.float32, **options)
        assert model.num_parameters() == 113_281_344


def test_the_output_behaves_as_the_masked_dense_model(pruned):
    assert all(check.passed for check in verify(pruned.output))


def test_taylor_keeps_what_random_loses(pruned, tmp_path):
    options = {"model": str(MODEL), "ratio": 0.25, "layers": (4, 28)}
    random = prune(PruneConfig(output=tmp_path / "random", method="random", **options))
    before, taylor = (pruned.facts["perplexity"][key] for key in ("before", "after"))
    assert before < taylor < 0.75 * random.facts["perplexity"]["after"]


def test_a_sweep_reads_the_layers_bytes_and_no_more():
    with Source(str(MODEL), micro_batch=2).open() as sweeper:
        ids = torch.randint(0, 1000, (2, 16), generator=torch.Generator().manual_seed(0))
        statistics = Statistics(sweeper, ids, range(4, 28), seed=0)
        statistics.gradients(lambda *tensors: None)  # loads what torch and transformers import on first use
        checkpoint = sweeper.skeleton.checkpoint
        counted, asked = checkpoint.bytes_read, rchar()
        METHODS["taylor"].score(
            statistics,
            resolve_settings("taylor", {}),
            UnitScores(statistics.sweeper.skeleton.all_units(statistics.layers)),
        )
        counted, asked = checkpoint.bytes_read - counted, rchar() - asked
        sizes = [sum(entry.nbytes for entry in layer.values()) for layer in sweeper.pager.entries]
    # Forwards and backwards from the lowest prunable layer; two layers are still there at each turn.
    needed = 2 * sum(sizes[4:]) - 4 * sizes[0]
    assert counted == needed
    assert needed <= asked <= 1.01 * needed
