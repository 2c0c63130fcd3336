"""Relative error of diag(F^-1) by gradient scale, for every path and for the reference.

    python -m benchmarks.kernels.numerics    # half a minute

Each path gets the same float32 gradients; the truth is computed from them in extended
precision (numpy longdouble).  "refused": the path raised NumericalError.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product

import numpy as np
import torch

from benchmarks.support.contender import ReferenceInverse
from benchmarks.support.report import made_by, new_document, table, write
from obert_kernels import GramFisher, NumericalError, WoodburyFisher

SCALES = [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]


def exact_diagonal(g: torch.Tensor, size: int, damping: float) -> np.ndarray:
    """diag(F^-1) block by block, Gauss-Jordan in extended precision."""
    parts = []
    for start in range(0, g.shape[1], size):
        x = g[:, start : start + size].numpy().astype(np.longdouble)
        n = x.shape[1]
        f = x.T @ x / x.shape[0] + np.longdouble(damping) * np.eye(n, dtype=np.longdouble)
        inverse = np.eye(n, dtype=np.longdouble)
        for i in range(n):
            inverse[i] /= f[i, i]
            f[i] /= f[i, i]
            factors = f[:, i].copy()
            factors[i] = 0
            f -= np.outer(factors, f[i])
            inverse -= np.outer(factors, inverse[i])
        parts.append(np.diag(inverse))
    return np.concatenate(parts)


def paths(size: int, damping: float) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    def gram(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
        def run(g: torch.Tensor) -> torch.Tensor:
            fisher = GramFisher(g.shape[1], size, dtype=dtype)
            fisher.accumulate(g)
            return fisher.diagonal(damping, torch.float64)

        return run

    def woodbury(g: torch.Tensor) -> torch.Tensor:
        fisher = WoodburyFisher(g.shape[1], g.shape[0], size, damping=damping)
        fisher.accumulate(g)
        return fisher.diagonal()

    def reference(g: torch.Tensor) -> torch.Tensor:
        inverse = ReferenceInverse(g.shape[0], size, g.shape[1], damping)
        for row in g:
            inverse.add_grad(row)
        return inverse.diag()

    return {
        "Gram float64": gram(torch.float64),
        "Gram float32": gram(torch.float32),
        "Woodbury float32": woodbury,
        "reference (float32)": reference,
    }


def outcome(run: Callable[[torch.Tensor], torch.Tensor], g: torch.Tensor, truth: np.ndarray) -> str:
    try:
        diagonal = run(g).double().numpy()
    except NumericalError:
        return "refused"
    if not np.isfinite(diagonal).all():
        return "NaN or infinite"
    if (diagonal <= 0).any():
        return "negative"
    return f"{float(np.abs(diagonal / truth - 1).max()):.1e}"


def markdown(document: dict) -> str:
    config, outcomes = document["config"], document["outcomes"]
    return "\n".join([
        "# Accuracy of diag(F^-1) by gradient scale",
        "",
        f"{made_by(document)[0]}.  "
        f"{config['blocks']} blocks of B = {config['block']}, damping {config['damping']:g}, "
        "gradients with a shared direction and noise of the given scale.  Largest relative error "
        "against extended precision from the same float32 gradients.",
        "",
        *table(list(outcomes[0]), [[f"{row['m']}", f"{row['scale']:g}", *list(row.values())[2:]]
                                   for row in outcomes]),
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", type=int, default=50)
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--gradients", type=int, nargs="+", default=[20, 128, 1024])
    parser.add_argument("--damping", type=float, default=1e-7)
    args = parser.parse_args()
    runs = paths(args.block, args.damping)
    document = new_document("numerics", vars(args))
    for m, scale in product(args.gradients, SCALES):
        torch.manual_seed(0)
        n = args.block * args.blocks
        g = (torch.randn(m, 1) * torch.randn(n) + torch.randn(m, n)) * scale
        truth = exact_diagonal(g, args.block, args.damping)
        errors = {name: outcome(run, g, truth) for name, run in runs.items()}
        document["outcomes"].append({"m": m, "scale": scale, **errors})
        print(document["outcomes"][-1], flush=True)
    write(document, markdown)


if __name__ == "__main__":
    main()
