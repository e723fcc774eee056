"""Time of single operations on a machine: their FLOPs over its rate, or their bytes over its memory's."""

from __future__ import annotations

from typing import Any

import torch
from clock_rates import Machine
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from streamprune.kernels.launch import Launch

aten = torch.ops.aten
NO_KERNEL = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided, aten._unsafe_view}
ROWS_ONLY = {aten.embedding, aten.index, aten.index_select, aten.gather}  # which read as much as they put out
IN_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}  # of which torch counts the others' FLOPs
WRITE_ONLY = {aten.copy_, aten.zero_, aten.fill_, aten.normal_}  # to their first operand
# FLOPs of a matrix of n rows, over n³ (Golub and Van Loan): a Cholesky factor, an inverse or a solution from it, and a
# triangle solved for as many columns.
FACTORS = {
    aten.linalg_cholesky_ex: 1 / 3,
    aten.cholesky_inverse: 2 / 3,
    aten.cholesky_solve: 2,
    aten.linalg_solve_triangular: 1,
}


def operation_seconds(op: Any, args: Any, kwargs: Any, made: Any, machine: Machine) -> float:
    """Time of an operation of torch: its products, or every operand read once and every result written."""
    written = _nbytes(made)
    if op in ROWS_ONLY:
        return 2 * written / machine.memory
    read = _nbytes(args[1:]) if op in WRITE_ONLY else _nbytes(args)
    taken, op = (read + written) / machine.memory, IN_PLACE.get(op, op)
    if op in flop_registry:
        operand = args[1] if op in (aten.addmm, aten.baddbmm) else args[0]
        operands = [each for each in args if isinstance(each, Tensor)]
        taken = max(taken, flop_registry[op](*operands, out_val=made) / machine.products(operand.dtype))
    elif op in FACTORS:
        taken = max(taken, FACTORS[op] * args[-1].shape[-1] ** 3 / machine.products(args[0].dtype))
    return taken


def kernel_seconds(launch: Launch, machine: Machine) -> float:
    """Time of one of our kernels: its products, or each operand moved once, the first both ways if it is changed."""
    given = launch.arguments
    tensors = {id(each): each for each in given.values() if isinstance(each, Tensor)}
    first = next(name for name, each in given.items() if isinstance(each, Tensor))
    both_ways = 0 if first in ("out_ptr", "partial_ptr") else _nbytes(given[first])
    taken = (sum(map(_nbytes, tensors.values())) + both_ways) / machine.memory
    name = launch.kernel.__name__
    if name == "grad_norm_kernel":
        products = 2 * given["n_samples"] * given["n_tokens"] * given["d_out"] * given["d_in"]
        taken = max(taken, products / machine.grad_norm)
    elif name == "gram_kernel":  # half of the matrix
        taken = max(taken, given["n_tokens"] * given["n_cols"] ** 2 / machine.half)
    elif name == "obs_block_kernel":  # each column's error goes to those behind it
        taken = max(taken, given["n_rows"] * given["n_cols"] ** 2 / machine.single)
    return taken


def _nbytes(things: Any) -> int:
    """Bytes of tensors; of expanded ones, those that lie in memory."""
    if isinstance(things, Tensor):
        size = things.element_size()
        for extent, stride in zip(things.shape, things.stride(), strict=True):
            size *= extent if stride else 1
        return size
    return sum(map(_nbytes, things)) if isinstance(things, list | tuple) else 0
