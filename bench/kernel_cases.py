"""Which kernels are compiled, counted and timed, and on which operands.

A case makes its operands on any device ("meta" for compiling) and from them the kernel's start, the op as streamprune
calls it, and the plain torch expression that it stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from streamprune.kernels import (
    add_product,
    grad_norm,
    gram,
    moreau_step,
    obs_block,
    perturb,
    prune_n_of_m,
    prune_rows,
    unit_score,
)
from streamprune.kernels.grad_norm import launch as launch_grad_norm
from streamprune.kernels.gram import BLOCK_COLS, BLOCK_ROWS
from streamprune.kernels.gram import launch as launch_gram
from streamprune.kernels.launch import Launch
from streamprune.kernels.moreau_step import launch as launch_moreau_step
from streamprune.kernels.obs_block import BLOCK_COLUMNS
from streamprune.kernels.obs_block import launch as launch_obs_block
from streamprune.kernels.perturb import launch as launch_perturb
from streamprune.kernels.unit_score import CHUNK_ROWS
from streamprune.kernels.unit_score import launch as launch_unit_score
from streamprune.kernels.weight_score import launch_n_of_m, launch_rows

BF16, F32 = torch.bfloat16, torch.float32
# Hidden and intermediate size: SmolLM2-135M, SmolLM2-1.7B, Llama-2-13B, Llama-2-70B.
SIZES = {"135M": (576, 1536), "1.7B": (2048, 8192), "13B": (5120, 13824), "70B": (8192, 28672)}
COMPILED = ("13B", "70B")
SAMPLES, TOKENS = 10, 128
SIGMA, RHO, GAMMA, THRESHOLD, ALPHA = 0.05, 0.2, 2e-4, 1e-6, 100.0
SEED = (1 << 62) + 1


@dataclass(frozen=True)
class Operands:
    """Makes tensors for a matrix of `rows` × `columns` on `device`."""

    rows: int
    columns: int
    device: str

    def normal(self, dtype: torch.dtype, *shape: int) -> Tensor:
        """Standard normals, of the matrix's shape by default."""
        matrix = torch.empty(shape or (self.rows, self.columns), dtype=F32, device=self.device)
        return (matrix if matrix.is_meta else matrix.normal_()).to(dtype)

    def zeros(self, *shape: int, dtype: torch.dtype = F32) -> Tensor:
        """Something to write to, of the matrix's shape by default."""
        return torch.zeros(shape or (self.rows, self.columns), dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Made:
    """A kernel's start, the op that streamprune calls, and the torch expression that both stand for.

    `library` is the product, by cuBLAS on a GPU, that a kernel of products is compared with.
    """

    launch: Launch
    op: Callable[[], Any]
    naive: Callable[[], Any]
    library: Callable[[], Any] | None = None


def _all(o: Operands) -> int:
    return o.rows * o.columns


@dataclass(frozen=True)
class Case:
    """One kernel with one choice of its constants.

    Attributes:
        name: of the row in tables.
        matrix: "up" [intermediate, hidden], whose units are rows, "down" [hidden, intermediate]: columns, "gram"
            [intermediate, intermediate], or "block" [128, intermediate]: some columns of "up", a line each.
        minimum: least bytes per element of the matrix: every operand read once, every result written once.
        make: everything else, from operands.
        elements: how many elements of the matrix are worked on.
        wanted: least rate of the kernel over that of a copy, or of the library's product; None where neither is near,
            or where no run depends on it: that takes less than 1 % of every run (kernel_shares.py).
    """

    name: str
    matrix: str
    minimum: float
    make: Callable[[Operands], Made]
    elements: Callable[[Operands], int] = _all
    wanted: float | None = 0.85

    def operands(self, size: tuple[int, int], device: str) -> Operands:
        """Operands for (hidden, intermediate)."""
        hidden, intermediate = size
        rows = {"up": intermediate, "down": hidden, "gram": intermediate, "block": BLOCK_COLUMNS}[self.matrix]
        return Operands(rows, hidden if self.matrix == "up" else intermediate, device)


def _perturb(with_delta: bool, dtype: torch.dtype, o: Operands) -> Made:
    out, weight, delta = o.zeros(dtype=dtype), o.normal(dtype), o.normal(F32) if with_delta else None

    def naive() -> Tensor:
        noise = torch.randn_like(weight, dtype=F32) * SIGMA * weight.abs()
        return (weight + noise if delta is None else weight + delta + noise).to(dtype)

    return Made(
        launch_perturb(out, weight, delta, SIGMA, SEED), lambda: perturb(out, weight, delta, SIGMA, SEED), naive
    )


def _moreau_step(dim: int, threshold: float | None, has_delta: bool, o: Operands) -> Made:
    delta, grad, norms = o.normal(F32), o.normal(F32), o.zeros((o.rows, o.columns)[dim])

    def op() -> Any:
        return moreau_step(delta if has_delta else None, grad, RHO, GAMMA, dim=dim, threshold=threshold)

    def naive() -> Tensor:
        step = (1 - GAMMA / RHO) * delta - GAMMA * grad if has_delta else -GAMMA * grad
        if threshold is None:
            return step
        return step * (1 - threshold / step.norm(dim=1 - dim, keepdim=True)).clamp(min=0)

    start = launch_moreau_step(
        delta if has_delta else grad, grad, norms, RHO, GAMMA, dim=dim, threshold=threshold, has_delta=has_delta
    )
    return Made(start, op, naive)


def _unit_score(dim: int, form: str, o: Operands) -> Made:
    weight = o.normal(BF16)
    a = o.normal(F32) if form in ("first", "mix", "vectorize") else weight
    fisher = o.normal(F32) if form in ("second", "mix") else weight
    partial_sums = o.zeros(1 if dim == 0 else -(-o.rows // CHUNK_ROWS), (o.rows, o.columns)[dim])

    def naive() -> Tensor:
        terms = {
            "first": lambda: (weight * a).abs(),
            "second": lambda: weight**2 * fisher,
            "mix": lambda: (weight * a - 0.5 * weight**2 * fisher).abs(),
            "vectorize": lambda: weight * a,
            "square": lambda: weight.float() ** 2,
        }[form]()
        return terms.sum(dim=1 - dim)

    start = launch_unit_score(partial_sums, weight, a, dim, form, fisher)
    return Made(start, lambda: unit_score(weight, a, dim, form, fisher), naive)


def _grad_norm(power: int, o: Operands) -> Made:
    x, dy = o.normal(BF16, SAMPLES, TOKENS, o.columns), o.normal(BF16, SAMPLES, TOKENS, o.rows)
    acc = o.zeros()

    def naive() -> None:
        for inputs, gradients in zip(x, dy, strict=True):
            grad = gradients.float().T @ inputs.float()
            acc.add_(grad.abs() ** power)

    def library() -> Tensor:
        return dy.flatten(0, 1).T @ x.flatten(0, 1)

    return Made(launch_grad_norm(acc, x, dy, power), lambda: grad_norm(acc, x, dy, power), naive, library)


def _gram(o: Operands) -> Made:
    x, total = o.normal(BF16, SAMPLES * TOKENS, o.columns), o.zeros()

    def naive() -> None:
        wide = x.float()
        total.add_(wide.T @ wide)

    return Made(launch_gram(total, x), lambda: gram(total, x), naive, lambda: add_product(total, x, x))


def _triangle(o: Operands) -> int:
    """Elements of the tiles that hold the lower triangle."""
    return sum(
        min(BLOCK_ROWS, o.rows - row) * min(o.columns, -(-(row + BLOCK_ROWS) // BLOCK_COLS) * BLOCK_COLS)
        for row in range(0, o.rows, BLOCK_ROWS)
    )


def _pruning(o: Operands) -> tuple[Tensor, Tensor, Tensor, Callable[[], Tensor]]:
    weight, x_norm, gradient = o.normal(BF16), o.zeros(o.columns).add_(1.0), o.normal(F32).abs_()
    return weight, x_norm, gradient, lambda: weight.abs() * (x_norm + ALPHA * gradient)


def _prune_rows(o: Operands) -> Made:
    (weight, x_norm, gradient, score), count = _pruning(o), o.columns // 2

    def naive() -> Tensor:
        return weight.scatter_(1, score().argsort(dim=1, stable=True)[:, :count], 0)

    start = launch_rows(weight, count, x_norm, gradient, ALPHA)
    return Made(start, lambda: prune_rows(weight, count, x_norm, gradient, ALPHA), naive)


def _prune_n_of_m(n: int, m: int, o: Operands) -> Made:
    weight, x_norm, gradient, score = _pruning(o)

    def naive() -> Tensor:
        gone = score().view(o.rows, -1, m).argsort(dim=2, stable=True)[..., : m - n]
        return weight.view(o.rows, -1, m).scatter_(2, gone, 0)

    start = launch_n_of_m(weight, n, m, x_norm, gradient, ALPHA)
    return Made(start, lambda: prune_n_of_m(weight, n, m, x_norm, gradient, ALPHA), naive)


def _obs_block(n: int, m: int, o: Operands) -> Made:
    weight, errors, gone = o.normal(F32), o.zeros(), None if m else o.normal(F32) > 0
    factor = o.normal(F32, o.rows, o.rows).triu(1).mul_(1e-3) + torch.eye(o.rows, device=o.device)

    def naive() -> None:
        for column, pivot in enumerate(factor.diagonal()):
            if m and column % m == 0:
                group = slice(column, column + m)
                scores = (weight[group] / factor.diagonal()[group, None]) ** 2
                gone_of_m = scores.argsort(dim=0, stable=True).argsort(dim=0) < m - n
            goes = gone_of_m[column % m] if gone is None else gone[column]
            errors[column] = torch.where(goes, weight[column] / pivot, 0)
            weight[column + 1 :] -= factor[column, column + 1 :, None] * errors[column]
            weight[column] = torch.where(goes, 0, weight[column])

    start = launch_obs_block(weight, factor, errors, gone, n, m)
    return Made(start, lambda: obs_block(weight, factor, weight.numel() // 2, n, m), naive)


def cases() -> Iterator[Case]:
    """All of them. Bytes are for bfloat16 weights and float32 δ, g, F and norms, unless named otherwise."""
    yield Case("perturb", "up", 8, partial(_perturb, True, BF16))
    yield Case("perturb, no δ", "up", 4, partial(_perturb, False, BF16))
    yield Case("perturb, float32", "up", 12, partial(_perturb, True, F32))
    yield Case("moreau_step", "up", 12, partial(_moreau_step, 0, None, True))
    for lines, dim, matrix in (("rows", 0, "up"), ("columns", 1, "down")):
        yield Case(f"moreau_step, GST {lines}", matrix, 12, partial(_moreau_step, dim, THRESHOLD, True))
        yield Case(f"moreau_step, GST {lines}, δ = 0", matrix, 8, partial(_moreau_step, dim, THRESHOLD, False))
        for form, least in {"first": 6, "second": 6, "mix": 10, "vectorize": 6, "square": 2}.items():
            yield Case(f"unit_score {form}, {lines}", matrix, least, partial(_unit_score, dim, form), wanted=None)
    for power, name in {1: "Σ|G|", 2: "ΣG²"}.items():
        yield Case(f"grad_norm {name}", "up", 8, partial(_grad_norm, power), wanted=0.60)
    # Half of the library's products: it is wanted that it takes no longer than they do.
    yield Case("gram", "gram", 8, _gram, _triangle, wanted=1.0)
    # Half of the weights are written, as zeros.
    yield Case("prune_rows", "up", 7, _prune_rows)
    yield Case("prune_rows, long", "down", 7, _prune_rows)
    for n, m in ((2, 4), (4, 8)):
        yield Case(f"prune_n_of_m {n}:{m}", "up", 7, partial(_prune_n_of_m, n, m), wanted=None)
    # W read and written, and its errors; columns wait for each other, not for memory.
    yield Case("obs_block", "block", 13, partial(_obs_block, 0, 0), wanted=None)
    for n, m in ((2, 4), (4, 8)):
        yield Case(f"obs_block {n}:{m}", "block", 12, partial(_obs_block, n, m), wanted=None)
