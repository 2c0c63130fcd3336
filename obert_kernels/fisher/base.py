"""The interface of a Fisher of one weight matrix."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..sparsity.masks import n_of_m_mask


def as_rows(gradients: Tensor, num_weights: int) -> Tensor:
    """``[n]`` or ``[k, n]`` to ``[k, n]``."""
    rows = gradients.unsqueeze(0) if gradients.dim() == 1 else gradients
    if rows.dim() != 2 or rows.shape[1] != num_weights:
        raise ValueError(
            f"gradients must be [n] or [k, n] with n = {num_weights}, got {tuple(gradients.shape)}"
        )
    return rows


def is_joint(rule: str) -> bool:
    """Return whether an update rule is "joint"; raise ValueError for what is none."""
    if rule not in ("sum", "joint"):
        raise ValueError(f"update rule must be 'sum' or 'joint', got {rule!r}")
    return rule == "joint"


def wide(weight: Tensor) -> Tensor:
    """Half-precision weights as float32; the operators take float32 and float64."""
    weight = weight.detach()
    return weight if weight.dtype in (torch.float32, torch.float64) else weight.float()


def came_back(name: str) -> ValueError:
    """The error of a matrix with weights that its Fisher knows nothing of."""
    return ValueError(
        f"{name} has weights that were pruned when its Fisher was estimated; estimate it anew"
    )


class Fisher(ABC):
    """An estimate of the Fisher of one weight matrix; :func:`register_fisher` takes others.

    Weights, masks and gradients are flat, in the order of the mask's pattern.  Weights come in the
    type of the matrix, gradients as well, or under autocast in that of its products; scores are
    float32, new weights have the type of the old ones.

    One is made by the factory that :func:`register_fisher` was given, which may be the class:
    ``factory(remaining, block_size, group_size, dtype=, name=)`` with

    - ``remaining``: bool ``[n]``, the remaining weights; others are never asked for;
    - ``block_size``: B; ``group_size``: consecutive weights that belong together in some way;
    - ``dtype``: of the Gram, or whatever is wide enough for sums over gradients;
    - ``name``: used in error messages.

    Attributes:
        num_weights: n, weights of the matrix.
        num_gradients: m, gradients seen so far.
        looks_at_pruned: gradients of pruned weights are set to zero before it gets them.
    """

    num_weights: int
    num_gradients: float
    looks_at_pruned = True

    @abstractmethod
    def accumulate(self, gradients: Tensor) -> None:
        """Add gradients ``[k, n]``; their memory is used again for the next ones."""

    @abstractmethod
    def mean_squares(self) -> float:
        """Sum over the weights of the mean square of their gradients; damping starts there."""

    @abstractmethod
    def scores(self, weight: Tensor, damping: float, group_size: int = 1) -> Tensor:
        """Saliency of each group as if it went alone, ``[n / group_size]``."""

    @abstractmethod
    def update(
        self, weight: Tensor, keep: Tensor, damping: float, group_size: int = 1, rule: str = "joint"
    ) -> tuple[Tensor, float]:
        """New weights under a mask, and the predicted loss increase."""

    def greedy_scores(
        self, weight: Tensor, keep: Tensor, damping: float, group_size: int = 1
    ) -> Tensor:
        """Saliencies in the order of exact removals; here, of removals that do not interact."""
        return self.scores(weight, damping, group_size) * keep.view(-1, group_size).any(dim=1)

    def n_of_m(self, weight: Tensor, keep: Tensor, damping: float, kept: int, group: int) -> Tensor:
        """Mask with at most ``kept`` of every ``group`` weights; here, the best single ones."""
        return n_of_m_mask(self.scores(weight, damping), keep, kept, group)
