"""The reference algorithm of oBERT in plain torch, written from its published formulas.

It is what people ran before: a dense float32 inverse per block, one einsum and one baddbmm
per gradient; scores w^2 / (2 diag + eps); 4 x 4 solves for 4-blocks; update by bmm.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from obert_kernels import find_weights
from obert_kernels.gradients.losses import LossFn

BLOCK_SIZE = 50
EPS = torch.finfo(torch.float32).eps


class ReferenceInverse:
    """Inverse block Fisher of ``d`` weights; ``f_inv`` is ``[blocks, B, B]`` float32."""

    def __init__(
        self, m: int, block_size: int, d: int, damping: float, device: torch.device | str = "cpu"
    ) -> None:
        self.m, self.size, self.d = m, block_size, d
        self.blocks = -(-d // block_size)
        self.f_inv = (torch.eye(block_size, device=device) / damping).repeat(self.blocks, 1, 1)

    def _padded(self, v: Tensor) -> Tensor:
        missing = self.blocks * self.size - self.d
        if missing:
            v = torch.cat([v, v.new_zeros(missing)])
        return v.view(self.blocks, self.size)

    def add_grad(self, g: Tensor) -> None:
        g = self._padded(g)
        fg = torch.einsum("bij,bj->bi", self.f_inv, g)
        alpha = (self.m + torch.einsum("bi,bi->b", g, fg)).sqrt().unsqueeze(1)
        fg /= alpha
        self.f_inv.baddbmm_(fg.unsqueeze(2), fg.unsqueeze(1), alpha=-1)

    def diag(self) -> Tensor:
        return self.f_inv.diagonal(dim1=1, dim2=2).flatten()[: self.d]

    def mul(self, v: Tensor) -> Tensor:
        return torch.bmm(self.f_inv, self._padded(v).unsqueeze(2)).flatten()[: self.d]

    def scores(self, w: Tensor) -> Tensor:
        return w**2 / (2.0 * self.diag() + EPS)

    def update(self, w: Tensor, keep: Tensor) -> Tensor:
        return (w - self.mul(w * ~keep / (self.diag() + EPS))) * keep

    def _groups(self, c: int) -> Tensor:
        """``[groups, c, c]`` diagonal blocks of the inverse; c divides B."""
        split = self.f_inv.view(self.blocks, self.size // c, c, self.size // c, c)
        return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, c, c)[: self.d // c]

    def group_scores(self, w: Tensor, c: int) -> Tensor:
        q = w.view(-1, c, 1)
        return 0.5 * (q.mT @ torch.linalg.solve(self._groups(c), q)).flatten()

    def group_update(self, w: Tensor, keep: Tensor, c: int) -> Tensor:
        q = (w * ~keep).view(-1, c, 1)
        return (w - self.mul(torch.linalg.solve(self._groups(c), q).flatten())) * keep


def prune_as_reference(
    model: nn.Module, batches: list[Any], loss_fn: LossFn, sparsity: float, damping: float
) -> dict[str, float]:
    """Diagonal scores, one global ranking, sum update; returns seconds by stage."""
    model.eval()
    weights = find_weights(model)
    fishers = {
        name: ReferenceInverse(len(batches), BLOCK_SIZE, weight.numel(), damping, weight.device)
        for name, weight in weights.items()
    }
    seconds = {"gradients": 0.0, "fisher": 0.0}
    for batch in batches:
        start = time.perf_counter()
        model.zero_grad()
        loss_fn(model, batch).backward()
        middle = time.perf_counter()
        for name, weight in weights.items():
            fishers[name].add_grad(weight.grad.flatten())
        seconds["gradients"] += middle - start
        seconds["fisher"] += time.perf_counter() - middle
    start = time.perf_counter()
    with torch.no_grad():
        scores = torch.cat([fishers[name].scores(w.flatten()) for name, w in weights.items()])
        removed = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
        removed[scores.topk(round(sparsity * len(scores)), largest=False).indices] = True
        parts = removed.split([weight.numel() for weight in weights.values()])
        for (name, weight), part in zip(weights.items(), parts, strict=True):
            new = fishers[name].update(weight.flatten(), ~part)
            weight.copy_(new.view_as(weight))
    return {**seconds, "update": time.perf_counter() - start}
