"""The oracle of :mod:`.fit`: a system at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .status import record_failure


def fit_rows(
    moments: Tensor, targets: Tensor, keep: Tensor, first_row: Tensor, status: Tensor
) -> Tensor:
    """Least squares on masks: row r minimises ``w H w^T - 2 w t_r^T`` with zeros off its support.

    ``w_S = t_S (H_SS)^-1`` for the columns S that its support keeps, ``H`` the moments of the
    inputs and ``t_r`` row r of the targets.  Rows of one support follow each other, and H_SS is
    factored once for them.  Rows of a support whose H_SS is not positive definite are zero.

    Args:
        moments: float64 ``[n, n]``, symmetric, the ridge already added.
        targets: float64 ``[m, n]``.
        keep: bool ``[supports, n]``.
        first_row: int64 ``[supports + 1]``; rows ``first_row[s]`` to ``first_row[s + 1]`` have s.
        status: the first failed support.

    Returns:
        float64 ``[m, n]``.
    """
    fitted = torch.zeros_like(targets)
    bad = torch.zeros(len(keep), dtype=torch.bool, device=keep.device)
    starts = first_row.tolist()
    for support, (start, end) in enumerate(pairwise(starts)):
        columns = keep[support].nonzero().flatten()
        if len(columns) == 0:
            continue
        system = moments[columns][:, columns]
        factor, info = torch.linalg.cholesky_ex(system)
        # Pivots that rounding alone could explain are none, as for the Fisher blocks.
        tolerance = torch.finfo(torch.float64).eps * len(columns)
        pivots = factor.diagonal().square()
        good = (pivots > tolerance * system.diagonal()) & pivots.isfinite()
        bad[support] = (info != 0) | ~good.all()
        solved = torch.cholesky_solve(targets[start:end, columns].T, factor).T
        fitted[start:end, columns] = torch.where(bad[support], 0.0, solved)
    record_failure(status, bad)
    return fitted
