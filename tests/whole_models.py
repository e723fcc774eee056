"""Whole transformers models in memory, by hand: their layers, what o and down are given, units masked, layers skipped.

Nothing here comes from the package.
"""

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

STACKS = {"gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers"}
DOWN = {"gpt2": "mlp.c_proj", "gpt_neox": "mlp.dense_4h_to_h", "opt": "fc2"}
O_PROJ = "self_attn.o_proj"


def load(path, dtype=torch.float64, **options):
    """A saved model, loaded as anybody would; nothing may be missing or left over."""
    if dtype == torch.float64:
        options["experts_implementation"] = "eager"  # the one that is preferred has no float64
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model.eval()


def stack(model):
    """The list of decoder layers."""
    return model.get_submodule(STACKS.get(model.config.model_type, "model.layers"))


def down_name(model):
    return DOWN.get(model.config.model_type, "mlp.down_proj")


def out_name(model, kind):
    """The module through which units of a kind reach the residual stream, by its name inside a layer."""
    return O_PROJ if kind == "kv_group" else down_name(model)


def matrix(module):
    """A view [d_out, d_in] of a Linear's or Conv1D's weight."""
    return module.weight.data.T if isinstance(module, Conv1D) else module.weight.data


def columns(model, kind, units):
    """The inputs of o or down that belong to units."""
    if kind == "channel":
        return list(units)
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = config.num_attention_heads // config.num_key_value_heads * head
    return [unit * width + line for unit in units for line in range(width)]


def mask_unit_kind(model, layer, kind, kept):
    """Zero the columns of all but the `kept` units; of OLMo 2, whose norm spans all heads, the heads themselves too."""
    module = stack(model)[layer].get_submodule(out_name(model, kind))
    lines = columns(model, kind, kept)
    gone = sorted(set(range(matrix(module).shape[1])) - set(lines))
    matrix(module)[:, gone] = 0
    if kind == "kv_group" and model.config.model_type == "olmo2":
        attention, groups = stack(model)[layer].self_attn, model.config.num_key_value_heads
        head = model.config.hidden_size // model.config.num_attention_heads
        attention.q_proj.weight.data[gone] = 0
        for group in set(range(groups)) - set(kept):
            attention.k_proj.weight.data[group * head : (group + 1) * head] = 0
        # The mean square of the sliced norm is over fewer elements: of k out of n it is n/k times as large.
        for norm in (attention.q_norm, attention.k_norm):
            norm.weight.data *= (len(kept) / groups) ** 0.5
            norm.variance_epsilon *= len(kept) / groups
    return lines


@torch.no_grad()
def run(model, ids, *modules):
    """Logits, and for each module what it was given and what it put out, as [tokens, width]."""
    seen = {}

    def keep(index):
        def hook(module, given, made):
            made = made[0] if isinstance(made, tuple) else made
            seen[index] = given[0].flatten(0, -2).clone(), made.flatten(0, -2).clone()

        return hook

    # A layer is called with its input as the first argument; so are Linears.
    handles = [module.register_forward_hook(keep(index)) for index, module in enumerate(modules)]
    try:
        logits = model(ids, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits, *(seen[index] for index in range(len(modules)))


class Skip(nn.Module):
    """A layer that leaves the residual stream as it is; those after it keep their numbers."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


def skip_layers(model, layers):
    """Put `Skip` in the place of layers; returns the model."""
    for layer in layers:
        stack(model)[layer] = Skip()
    return model


def mean_loss(model, ids):
    """Mean next-token loss in nats."""
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].double()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
