"""The model on meta has the buffers and ties of one that transformers has drawn weights for."""

import pytest
import torch
from tiny_models import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM

from streamprune.model.families import FAMILIES
from streamprune.model.model_config import meta_model


@pytest.mark.parametrize("family", FAMILIES)
def test_buffers_and_ties_are_those_of_a_model_with_weights(family, tmp_path):
    save_tiny(tmp_path, family)
    config = AutoConfig.from_pretrained(tmp_path)
    ours, theirs = meta_model(config), AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert all(weight.is_meta for weight in ours.parameters())
    buffers, expected = dict(ours.named_buffers()), dict(theirs.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        torch.testing.assert_close(buffer, expected[name], rtol=0, atol=0)
    assert [each.get_output_embeddings().weight is each.get_input_embeddings().weight for each in (ours, theirs)] == [
        config.tie_word_embeddings
    ] * 2
