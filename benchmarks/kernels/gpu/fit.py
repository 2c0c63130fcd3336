"""Least squares on masks as benchmarks/gpu.py times it, against torch in batches."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.kernels import costs
from benchmarks.kernels.gpu.kernels import Contender, Copy, Kernel
from obert_kernels import ops

TORCH = "torch cholesky_solve"
_TORCH_BYTES = 128 << 20  # of the systems that torch solves at a time


def fit_kernel(columns: int, share: float) -> Kernel:
    """Every row has a support of its own, a share of the columns; B is the number of columns."""
    support = max(1, round(share * columns))

    def build(n: int, device: torch.device) -> Copy:
        rows = n // columns
        inputs = torch.randn(columns, columns, dtype=torch.float64, device=device)
        moments = inputs @ inputs.T / columns
        moments.diagonal().add_(0.1)
        kept = torch.rand(rows, columns, device=device).topk(support).indices
        keep = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        keep.scatter_(1, kept, True)
        targets = torch.randn(rows, columns, dtype=torch.float64, device=device)
        first_row, status = torch.arange(rows + 1, device=device), ops.new_status(device)
        some = min(rows, max(1, _TORCH_BYTES // (8 * support**2)))
        theirs, wanted = kept[:some].clone(), targets[:some]

        def batch() -> Tensor:
            systems = moments[theirs[:, :, None], theirs[:, None, :]]
            factor = torch.linalg.cholesky_ex(systems).L
            return torch.cholesky_solve(wanted.gather(1, theirs)[:, :, None], factor)

        return Copy(
            lambda: ops.fit_rows(moments, targets, keep, first_row, status),
            {TORCH: Contender(batch, rows / some)},
            status,
        )

    return Kernel(
        "fit_rows",
        f"{share:.0%} of {columns} columns",
        columns,
        lambda rows: costs.fit_rows(rows, columns, support),
        # Targets, results, mask, what torch sorts; H for as many rows as columns.
        8 + 8 + 1 + 20 * share + 4 + 8,
        build,
        9 + 8 * share,
    )
