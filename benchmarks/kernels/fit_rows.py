"""Least squares on masks: the operator fit_rows beside torch, and beside its flops.

    python -m benchmarks.kernels.fit_rows      # about 2 minutes on 2 cores

One process, alternated, medians over rounds.  All ways fit the same rows, of which there are fewer
than in such a matrix where its systems are large: "row by row" gathers each row's system and calls
torch.linalg.solve, "batched" pads the systems to one size with an identity and calls
torch.linalg.cholesky once.  The bound: s^3 / 3 flops for each support of s columns and 2 s^2 for
each of its rows, at the rate of a float64 matrix product measured in the same rounds.  "Blocks of 4
rows" share their support; torch factors it for each of them.
"""

from __future__ import annotations

import argparse
import functools

import torch
from torch import Tensor

from benchmarks.kernels.selection import alternated, columns_of
from benchmarks.support.report import made_by, new_document, write
from obert_kernels import ops

SHAPES = [(384, 384), (384, 1536), (1536, 384), (768, 3072)]
SHARES = [0.1, 0.2, 0.5]
GROUP = 4  # rows of one support
PRODUCT = 768  # of matrices of this size
MOST_FLOPS = 4e9  # of all factorisations row by row, unless these are of two supports


def row_by_row(moments: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    fitted = torch.zeros_like(targets)
    for row, target, kept in zip(fitted, targets, keep, strict=True):
        columns = kept.nonzero().flatten()
        row[columns] = torch.linalg.solve(moments[columns][:, columns], target[columns])
    return fitted


def batched(moments: Tensor, targets: Tensor, keep: Tensor) -> Tensor:
    """Kept columns first, then others: there the system is the identity and the target zero."""
    size = int(keep.sum(1).max())
    columns = keep.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :size]
    real = keep.gather(1, columns)
    systems = moments[columns[:, :, None], columns[:, None]] * (real[:, :, None] & real[:, None])
    systems.diagonal(dim1=1, dim2=2).add_((~real).double())
    factor = torch.linalg.cholesky(systems)
    target = (targets.gather(1, columns) * real).unsqueeze(2)
    solved = torch.cholesky_solve(target, factor).squeeze(2) * real
    return torch.zeros_like(targets).scatter_(1, columns, solved)


@functools.cache
def moments_of(columns: int) -> Tensor:
    torch.manual_seed(0)
    inputs = torch.randn(2 * columns, columns, dtype=torch.float64)
    return inputs.T @ inputs / len(inputs) + 0.1 * torch.eye(columns, dtype=torch.float64)


def problem(
    rows: int, columns: int, share: float, group: int
) -> tuple[Tensor, Tensor, Tensor, float]:
    """Moments, targets, the supports, and the flops; ``group`` rows have each support."""
    moments = moments_of(columns)
    torch.manual_seed(1)
    size = share * columns
    supports = max(2, min(rows // group, round(MOST_FLOPS / (group * size**3 * 2 / 3))))
    targets = torch.randn(supports * group, columns, dtype=torch.float64)
    keep = torch.rand(supports, columns) < share
    sizes = keep.sum(1).double()
    return moments, targets, keep, float((sizes**3 / 3 + 2 * sizes**2 * group).sum())


def measured(rows: int, columns: int, share: float, group: int, rounds: int) -> dict:
    moments, targets, supports, flops = problem(rows, columns, share, group)
    keep = supports.repeat_interleave(group, 0)
    first_row = torch.arange(len(supports) + 1) * group
    status = ops.new_status()
    factor = torch.randn(PRODUCT, PRODUCT, dtype=torch.float64)
    calls = {
        "ours": lambda: ops.fit_rows(moments, targets, supports, first_row, status),
        "row_by_row": lambda: row_by_row(moments, targets, keep),
        "batched": lambda: batched(moments, targets, keep),
    }
    results = [call() for call in calls.values()]
    for result in results[1:]:
        torch.testing.assert_close(results[0], result, rtol=1e-8, atol=1e-10)
    seconds = alternated({**calls, "product": lambda: factor @ factor}, rounds)
    bound = flops / (2 * PRODUCT**3) * seconds["product"]
    return {
        "matrix": f"{rows} x {columns}", "remaining": share,
        "masks": "random" if group == 1 else f"blocks of {group} rows", "rows": len(targets),
        "ours_ms": seconds["ours"] * 1e3, "row_by_row_ms": seconds["row_by_row"] * 1e3,
        "batched_ms": seconds["batched"] * 1e3,
        "row_by_row_ratio": seconds["row_by_row"] / seconds["ours"],
        "batched_ratio": seconds["batched"] / seconds["ours"],
        "gflops": flops / seconds["ours"] / 1e9,
        "product_gflops": flops / bound / 1e9,
        "of_bound": seconds["ours"] / bound,
    }  # fmt: skip


# Column -> field and how it is written.
COLUMNS = {
    "matrix": "matrix:s", "remaining": "remaining:.0%", "masks": "masks:s", "rows": "rows:d",
    "fit_rows, ms": "ours_ms:.1f", "row by row, ms": "row_by_row_ms:.1f",
    "batched, ms": "batched_ms:.1f", "row by row : fit_rows": "row_by_row_ratio:.1f",
    "batched : fit_rows": "batched_ratio:.1f", "Gflop/s": "gflops:.1f",
    "of a matrix product": "product_gflops:.1f", "times the bound": "of_bound:.1f",
}  # fmt: skip


def markdown(document: dict) -> str:
    return "\n".join([
        "# Least squares on masks on the CPU",
        "",
        f"{made_by(document)[0]}; medians of {document['config']['rounds']} alternated rounds.  "
        "Every way fits the rows in the column of that name.  The bound is the flops at the rate "
        "of a float64 matrix product.",
        "",
        *columns_of(document["outcomes"], COLUMNS),
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    document = new_document("fit_rows", vars(args))
    for rows, columns in SHAPES:
        for share in SHARES:
            for group in (1, GROUP):
                document["outcomes"].append(measured(rows, columns, share, group, args.rounds))
    print(write(document, markdown).read_text())


if __name__ == "__main__":
    main()
