"""Least squares on masks: every row of a matrix on the columns that its mask keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops

_REMEDY = "use a larger ridge"


def fit_on_masks(moments: Tensor, targets: Tensor, keep: Tensor, what: str) -> Tensor:
    """Minimise ``w H w^T - 2 w t^T`` for every row ``t`` of the targets, with zeros where pruned.

    ``w_S = t_S (H_SS)^-1`` for the kept columns S.  With ``G = H^-1`` and the pruned columns P,
    the same row is ``t G - u G``, where ``u_P = (t G)_P (G_PP)^-1`` and u is zero elsewhere (the
    surgeon's formula, Hassibi and Stork 1993): rows take the way that costs less.

    Args:
        moments: ``H``, float64 ``[n, n]``, symmetric, the ridge already added.
        targets: float64 ``[m, n]``.
        keep: bool ``[m, n]``; rows that keep the same columns share their factorisation.
        what: name of the matrix, for the error.

    Returns:
        float64 ``[m, n]``, exactly zero where pruned.

    Raises:
        NumericalError: the moments of a row's columns are not positive definite.
    """
    by_pruned = _by_pruned_columns(keep)
    fitted = torch.empty_like(targets)
    fitted[~by_pruned] = _solve(moments, targets[~by_pruned], keep[~by_pruned], what)
    if by_pruned.any():
        inverse = _inverse(moments, what)
        unpruned = targets[by_pruned] @ inverse
        pruned = ~keep[by_pruned]
        change = _solve(inverse, unpruned, pruned, what) @ inverse
        fitted[by_pruned] = (unpruned - change).masked_fill_(pruned, 0)
    return fitted


def _by_pruned_columns(keep: Tensor) -> Tensor:
    """Which rows are cheaper by their pruned columns, bool ``[m]``."""
    rows, columns = keep.shape
    kept = keep.sum(1).double()
    pruned = columns - kept
    # Flops of a row: its factorisation, or that of its complement, its share of the inverse (n^3)
    # and its two products with it (2 n^2 each).
    return pruned**3 / 3 + columns**3 / max(1, rows) + 4 * columns**2 < kept**3 / 3


def _inverse(moments: Tensor, what: str) -> Tensor:
    factor, info = torch.linalg.cholesky_ex(moments)
    if info.item() != 0 or not factor.isfinite().all():
        raise _not_positive_definite(what, moments.shape[0])
    return torch.cholesky_inverse(factor)


def _solve(moments: Tensor, targets: Tensor, support: Tensor, what: str) -> Tensor:
    """Rows that are zero outside of their supports; those of one support together."""
    supports, index, counts = support.unique(dim=0, return_inverse=True, return_counts=True)
    order = index.argsort(stable=True)
    first_row = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    status = ops.new_status(moments.device)
    solved = ops.fit_rows(moments, targets[order], supports, first_row, status)
    if (failed := int(status.item())) >= 0:
        raise _not_positive_definite(what, int(supports[failed].sum()))
    return torch.empty_like(solved).index_copy_(0, order, solved)


def _not_positive_definite(what: str, columns: int) -> ops.NumericalError:
    message = f"{what}: the moments of {columns} inputs are not positive definite; {_REMEDY}"
    return ops.NumericalError(message, matrix=what, remedy=_REMEDY)
