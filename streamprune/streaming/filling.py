"""Inputs of o and down whose lost lines are filled in from what is left, so that a masked layer is a repaired one.

With G the inputs' Gram matrix and λI a ridge on it, the best linear guess at lost lines x_R by those that stay, x_S, is

    x̂_R = G_RS G_SS⁻¹ x_S = −P_RR⁻¹ P_RS x_S,    P = (G + λI)⁻¹,

and W_S x_S + W_R x̂_R is what W' = W G[:, S] G_SS⁻¹ makes of x_S, with the ridge in G: but for λ the repair's fit to
a layer's own output (recovery/least_squares.py), at the cost of the few lines that go and without a solve for each
row of W.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from streamprune.errors import StreampruneError
from streamprune.model.masking import output_matrices
from streamprune.model.skeleton import Skeleton
from streamprune.model.units import Kind, TensorRef, kept_lines
from streamprune.storage.journal import Key

FILL_RIDGE = 0.01  # λ relative to the mean of G's diagonal: what is learnt from few tokens holds of others


def inverse_gram(total: Tensor, ref: TensorRef, instead: str) -> Tensor:
    """Return P = (G + λI)⁻¹ [width, width] of a Gram matrix of a matrix's inputs, which is overwritten.

    Raises:
        StreampruneError: there is none; the setting `instead` does without it.
    """
    damping = FILL_RIDGE * total.diagonal().mean()
    total.diagonal().add_(damping.clamp(min=torch.finfo(total.dtype).tiny))
    try:
        return torch.cholesky_inverse(torch.linalg.cholesky(total))
    except torch.linalg.LinAlgError as error:
        raise StreampruneError(
            f"layer {ref.layer}, {ref.tensor}: the Gram matrix of its inputs cannot be inverted; "
            f"try --dtype float32, raise --samples, or pass --set {instead}"
        ) from error


class Filling:
    """Filling of one matrix's input for one mask.

    Args:
        inverse: P [width, width]. kept: the lines that stay, int64, ascending; some go.

    Raises:
        StreampruneError: P is not definite.
    """

    def __init__(self, inverse: Tensor, kept: Tensor) -> None:
        gone = torch.ones(len(inverse), dtype=torch.bool)
        gone[kept] = False
        self.kept, self.gone = kept.to(inverse.device), gone.nonzero().flatten().to(inverse.device)
        self.rows = inverse.index_select(0, self.gone)  # P_R; x has zeros where its columns R are
        block = self.rows.index_select(1, self.gone)
        block = block.to(torch.promote_types(block.dtype, torch.float32))
        block.diagonal().mul_(1 + torch.finfo(inverse.dtype).eps)  # rounded to few bits it may not be definite
        block = block.mT  # by columns, as LAPACK has it, so that the factor takes its place
        try:
            self.factor = torch.linalg.cholesky(block, out=block)
        except torch.linalg.LinAlgError as error:
            raise StreampruneError(
                "the inverse Gram matrix of a layer's inputs is singular; raise --samples, or pass --set repaired=no"
            ) from error

    def __call__(self, x: Tensor) -> Tensor:
        """Fill in an input of all lines, or of those that stay, with any behind them: [..., width] of its dtype."""
        width = self.rows.shape[1]
        left = x.index_select(-1, self.kept) if x.shape[-1] == width else x[..., : len(self.kept)]
        whole = left.new_zeros((*left.shape[:-1], width)).index_copy_(-1, self.kept, left)
        right = self.rows @ whole.flatten(0, -2).T.to(self.rows.dtype)
        guess = torch.cholesky_solve(right.to(self.factor.dtype), self.factor).neg_().T
        return whole.index_copy_(-1, self.gone, guess.to(x.dtype).view(*left.shape[:-1], len(self.gone)))


def fillings(
    skeleton: Skeleton, layer: int, kept: Mapping[Kind, Tensor], inverses: Mapping[Key, Tensor]
) -> dict[str, Filling]:
    """Make the fillings of a layer's mask, by the names of the matrices that have an inverse and lose lines."""
    geometry, found = skeleton.geometries[layer], {}
    for member in output_matrices(skeleton, layer):
        units = kept.get(member.kind)
        if units is None or len(units) == geometry.units(member.kind):
            continue
        if (layer, member.tensor) in inverses:
            found[member.tensor] = Filling(inverses[layer, member.tensor], kept_lines(member, geometry, units))
    return found
