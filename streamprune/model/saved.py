"""Bytes that autograd saves of a layer's forward pass, counted by running it on tensors without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from streamprune.model.skeleton import LayerCall, Skeleton


class _Attention(torch.autograd.Function):
    """Attention that saves what FlashAttention and a CPU's do: q, k, v, what comes out, a float32 sum for each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out


class _Fused(TorchFunctionMode):
    """Mode in which attention is one operation, which on meta tensors it would not be."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            q, k, v = (*args, *((kwargs or {})[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            return _Attention.apply(q, k, v)
        return func(*args, **(kwargs or {}))


def saved_bytes(skeleton: Skeleton, layer: int, n: int, seq: int) -> int:
    """Count the bytes that a layer's graph holds of a micro-batch [n, seq], beside its weights and its input.

    Raises:
        Exception: what it computes depends on numbers, as which expert a token goes to, or runs on a GPU alone.
    """
    weights = {
        name: torch.empty_like(each, dtype=skeleton.dtype, device="meta", requires_grad=each.ndim > 1)
        for name, each in skeleton.layers[layer].named_parameters()
    }
    call = skeleton.record_without_weights(seq)[layer]
    call = LayerCall(*(tree_map_only(Tensor, lambda each: each.to("meta"), of) for of in (call.args, call.kwargs)))
    hidden = torch.empty(n, seq, skeleton.config.hidden_size, dtype=skeleton.dtype, device="meta", requires_grad=True)
    own = {each.untyped_storage()._cdata for each in (*weights.values(), hidden)}
    found: dict[int, torch.UntypedStorage] = {}  # alive, so that no other memory takes its place

    def note(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda noted: noted), _Fused():
        skeleton.run_layer(layer, weights, call, hidden)
    return sum(each.nbytes() for each in found.values())
