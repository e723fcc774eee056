"""What main_job.py's sweeps stand beside: the same computed by transformers, with the model in memory.

Each makes the model ready and gives what is timed. What is not scored is frozen, as streamprune does, so that no
gradient is computed in vain; sequences go through as many at once. Scores are added up to one number, to be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from timed import Figures, Run
from torch import Tensor, nn

from streamprune.kernels import noise_seed, perturb
from streamprune.methods.activation import PUBLISHED_SAMPLES
from streamprune.methods.table import resolve_settings
from streamprune.streaming.sweeper import default_micro_batch

Matrices = dict[tuple[int, str], nn.Parameter]  # scored, by layer and name inside it


@contextmanager
def whole_model(path: Path, device: torch.device, *, checkpointing: bool) -> Iterator[Any]:
    """The model in memory: in the stored dtype on a GPU, in float32 on a CPU."""
    from transformers import AutoModelForCausalLM

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).requires_grad_(False)
    if checkpointing:
        # It is only active in training mode; a Llama has no dropout to change.
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    yield model


def scored(model: Any) -> Matrices:
    """The matrices of the layers that are prunable by default."""
    layers = range(4, model.config.num_hidden_layers - 2)
    named = ((layer, *each) for layer in layers for each in model.model.layers[layer].named_parameters())
    return {(layer, name): p.requires_grad_(True) for layer, name, p in named if p.ndim == 2}


@contextmanager
def forward(path: Path, ids: Tensor, device: torch.device, settings: dict[str, Any]) -> Iterator[Run]:
    """A forward pass up to the last layer's output, all of which is kept."""
    with whole_model(path, device, checkpointing=False) as model:
        model.model.norm = nn.Identity()
        there = ids.to(device)

        @torch.no_grad()
        def run() -> Figures:
            parts = there.split(default_micro_batch(ids.shape[1]))
            hidden = [model.model(part, use_cache=False).last_hidden_state for part in parts]
            return {"sum": float(hidden[0][0].float().abs().sum())}

        yield run


@contextmanager
def scores(method: str, path: Path, ids: Tensor, device: torch.device, settings: dict[str, Any]) -> Iterator[Run]:
    """A method's scores, by autograd with gradient checkpointing."""
    with whole_model(path, device, checkpointing=True) as model:
        matrices, resolved = scored(model), resolve_settings(method, settings)
        score = {"taylor": taylor, "moreau-gs": moreau_gs, "gblm": gblm}[method]
        yield lambda: {"sum": score(model, matrices, ids.to(device), resolved)}


def taylor(model: Any, matrices: Matrices, ids: Tensor, settings: dict[str, Any]) -> float:
    """Σ |w g|."""
    _backward(model, ids, default_micro_batch(ids.shape[1]))
    return sum(float((p.detach() * _taken(p)).abs_().sum()) for p in matrices.values())


@torch.no_grad()
def moreau_gs(model: Any, matrices: Matrices, ids: Tensor, settings: dict[str, Any]) -> float:
    """Σ |w δ| / ρ after all steps, δ in float32 on the device; the noise is streamprune's."""
    rho, gamma, eta = settings["rho"], settings["gamma"], settings["eta"]
    originals = {key: p.detach().clone() for key, p in matrices.items()}
    deltas: dict[tuple[int, str], Tensor] = {}
    for step in range(settings["steps"]):
        for key, p in matrices.items():
            perturb(p.data, originals[key], deltas.get(key), settings["sigma"], noise_seed(0, step, 0, *key))
        with torch.enable_grad():
            _backward(model, ids, default_micro_batch(ids.shape[1]))
        for key, p in matrices.items():
            delta = _taken(p).mul_(-gamma)
            if key in deltas:
                delta.add_(deltas[key], alpha=1 - gamma / rho)
            dim = 1 if key[1].endswith(("o_proj.weight", "down_proj.weight")) else 0
            norms = delta.norm(dim=1 - dim, keepdim=True)
            deltas[key] = delta.mul_((1 - gamma * eta / norms).clamp_(min=0))
    for key, p in matrices.items():
        p.data.copy_(originals[key])
    return sum(float((originals[key] * delta).abs_().sum()) for key, delta in deltas.items()) / rho


def gblm(model: Any, matrices: Matrices, ids: Tensor, settings: dict[str, Any]) -> float:
    """Σ |w| (‖x‖ + α ‖g‖₁), both per sample; a backward pass for each sample."""
    squares: dict[tuple[int, str], Tensor] = {}
    watched = []
    for layer, name in matrices:
        module = model.model.layers[layer].get_submodule(name.removesuffix(".weight"))
        watched.append(module.register_forward_pre_hook(partial(_add_squares, squares, (layer, name))))
    with torch.no_grad():
        for part in ids.split(default_micro_batch(ids.shape[1])):
            model.model(part, use_cache=False)
    for hook in watched:
        hook.remove()
    norms: dict[tuple[int, str], Tensor] = {}
    for sample in ids.split(1):
        _backward(model, sample, 1)
        for key, p in matrices.items():
            gradient = _taken(p).abs_()
            norms[key] = norms[key].add_(gradient) if key in norms else gradient
    alpha, samples, total = settings["alpha"] * PUBLISHED_SAMPLES, len(ids), 0.0
    for key, p in matrices.items():
        factor = norms.pop(key).mul_(alpha / samples).add_((squares[key] / samples).sqrt_())
        total += float(factor.mul_(p.detach()).abs_().sum())
    return total


def _add_squares(
    squares: dict[tuple[int, str], Tensor], key: tuple[int, str], module: nn.Module, given: tuple[Tensor, ...]
) -> None:
    """Add Σ x² of a Linear's input, by column."""
    found = given[0].detach().flatten(0, -2).float().square().sum(dim=0)
    squares[key] = squares[key].add_(found) if key in squares else found


def _backward(model: Any, ids: Tensor, at_once: int) -> None:
    """Gradients of the mean loss over all sequences."""
    for part in ids.split(at_once):
        loss = model(part, labels=part, use_cache=False).loss
        (loss * (len(part) / len(ids))).backward()


def _taken(p: nn.Parameter) -> Tensor:
    """The gradient in float32, a tensor of its own; the parameter's goes."""
    grad, p.grad = p.grad, None
    assert grad is not None
    return grad.float()


PEERS: dict[str, Callable[..., Any]] = {
    "forward": forward,
    **{method: partial(scores, method) for method in ("taylor", "moreau-gs", "gblm")},
}
