"""What autograd saves of a layer is counted without weights, in every family: as much as it really saves."""

import pytest
import torch
from tiny_models import FAMILY_NAMES, GROUPED, make_sweeper, save_tiny, token_ids

from streamprune.model.saved import saved_bytes
from streamprune.pipeline.source import Source

N, SEQ, HIDDEN = 2, 96, 128
WIDE = {"hidden_size": HIDDEN, "intermediate_size": 320, "num_attention_heads": 8, "max_position_embeddings": 128}
FIELDS = {
    "opt": {name: value for name, value in WIDE.items() if name != "intermediate_size"}
    | {"ffn_dim": 512, "word_embed_proj_dim": HIDDEN},
    "gpt2": {"n_embd": HIDDEN, "n_head": 8, "n_positions": 128, "n_inner": 512},
} | {name: WIDE | {"num_key_value_heads": 4, "head_dim": 16} for name in GROUPED}


def really_saved(sweeper, layer):
    """Bytes of all memory that a layer's graph holds beside its weights and its input."""
    with sweeper.pager.pages([layer]) as pages:
        weights = {name: each.detach().clone() for name, each in sweeper.binder.bind(next(pages), None, {}).items()}
    hidden = torch.randn(N, SEQ, HIDDEN, dtype=sweeper.skeleton.dtype, requires_grad=True)
    own, found = {each.untyped_storage().data_ptr() for each in (*weights.values(), hidden)}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage

    call = sweeper.skeleton.record(token_ids(1, SEQ))[layer]
    scored = {name: each.requires_grad_(each.ndim > 1) for name, each in weights.items()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        sweeper.skeleton.run_layer(layer, scored, call, hidden)
    return sum(each.nbytes() for each in found.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_is_counted_is_what_is_saved(family, dtype, tmp_path):
    save_tiny(tmp_path / "model", family, dtype=torch.float32, **FIELDS.get(family, WIDE))
    sweeper = make_sweeper(tmp_path / "model", dtype=getattr(torch, dtype))
    planned = Source(str(tmp_path / "model"), planned=torch.device("cuda"), dtype=dtype)
    if family == "mixtral":
        with planned.open() as found, pytest.raises(NotImplementedError):
            saved_bytes(found.skeleton, 1, N, SEQ)
        return
    real = really_saved(sweeper, 1)
    with torch.no_grad():  # a caller's: the sweeps turn gradients on
        assert saved_bytes(sweeper.skeleton, 1, N, SEQ) >= real
    # A CPU's attention puts out what o is given; where it does not, that is one more.
    assert real <= saved_bytes(sweeper.skeleton, 1, N, SEQ) <= 1.1 * real
    with planned.open() as found:
        assert saved_bytes(found.skeleton, 1, N, SEQ) == saved_bytes(sweeper.skeleton, 1, N, SEQ)
