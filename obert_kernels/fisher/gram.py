"""Block Fisher of one weight matrix: the Gram of its gradients, or the inverse directly.

``F = damping I + (1/m) sum_i g_i g_i^T`` on blocks of B consecutive weights (oBERT, EMNLP
2022, section 3).  :class:`GramFisher` keeps the sum and factors it when asked, in float64;
it is additive over data and processes.  :class:`WoodburyFisher` keeps ``F^-1`` in float32 and
updates it gradient by gradient.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..ops.checks import check_block_size
from ..ops.packing import gram_shape, unpack_inverse
from ..sparsity.patterns import DEFAULT_BLOCK_SIZE
from .base import Fisher, as_rows, is_joint, wide


def gram_bytes(num_weights: int, block_size: int, dtype: torch.dtype = torch.float64) -> int:
    """Memory of the Gram of one matrix, in bytes."""
    return math.prod(gram_shape(num_weights, block_size)) * dtype.itemsize


class GramFisher(Fisher):
    """Block Fisher of ``num_weights`` weights as the Gram of their gradients.

    Args:
        num_weights: number of weights n, flattened row-major.
        block_size: B, 1 to 256.
        dtype: type of the Gram, float64 (as good as the data) or float32 (half the memory;
            needs a damping well above ``1e-7`` times the squared gradients).
        device: where it lives.
        name: used in error messages.

    Attributes:
        gram: ``[blocks, B(B+1)/2]``, packed lower triangles.
        num_gradients: m, gradients seen so far; may be set to give the sum another weight.
    """

    def __init__(
        self,
        num_weights: int,
        block_size: int = DEFAULT_BLOCK_SIZE,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        name: str = "weights",
    ) -> None:
        if num_weights < 1:
            raise ValueError(f"num_weights must be at least 1, got {num_weights}")
        check_block_size(block_size)
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"dtype must be float32 or float64, got {dtype}")
        gram = torch.zeros(gram_shape(num_weights, block_size), dtype=dtype, device=device)
        self._hold(gram, num_weights, block_size, 0, name)

    def _hold(
        self, gram: Tensor, num_weights: int, block_size: int, num_gradients: float, name: str
    ) -> None:
        self.gram = gram
        self.num_weights = num_weights
        self.block_size = block_size
        self.num_gradients = num_gradients
        self.name = name

    @classmethod
    def on(
        cls, gram: Tensor, num_weights: int, block_size: int, num_gradients: float, name: str
    ) -> GramFisher:
        """Return a Fisher on a Gram that is there, ``[blocks, B(B+1)/2]``; it is not copied."""
        fisher = cls.__new__(cls)
        fisher._hold(gram, num_weights, block_size, num_gradients, name)
        return fisher

    def accumulate(self, gradients: Tensor) -> None:
        """Add gradients ``[n]`` or ``[k, n]``, any floating type; many at once are cheaper."""
        rows = as_rows(gradients, self.num_weights)
        ops.gram_accumulate(self.gram, rows, self.block_size)
        self.num_gradients += rows.shape[0]

    def merge(self, other: GramFisher) -> None:
        """Add the gradients another process or run has seen."""
        if (other.num_weights, other.block_size) != (self.num_weights, self.block_size):
            raise ValueError(
                f"cannot merge {other.num_weights} weights in blocks of {other.block_size} into "
                f"{self.num_weights} in blocks of {self.block_size}"
            )
        self.gram += other.gram.to(self.gram)
        self.num_gradients += other.num_gradients

    @property
    def num_bytes(self) -> int:
        """Memory it takes."""
        return self.gram.nbytes

    def mean_squares(self) -> float:
        """Sum over the weights of the mean square of their gradients."""
        i = torch.arange(self.block_size, device=self.gram.device)
        total = self.gram[:, i * (i + 3) // 2].sum(dtype=torch.float64)
        return float(total) / (self.num_gradients or 1)

    def _checked(self, status: Tensor, damping: float) -> None:
        if int(status.item()) < 0:
            return
        if not bool(torch.isfinite(self.gram).all()):
            remedy = (
                "its gradients hold NaN or infinity, or their squares left the range of "
                f"{self.gram.dtype}"
            )
        else:
            remedy = (
                f"damping {damping:g} is lost in the rounding of a {self.gram.dtype} Gram of "
                "gradients this large: raise damping"
            )
            if self.gram.dtype == torch.float32:
                remedy += " or use a float64 Gram"
        ops.raise_for_status(status, self.name, remedy)

    def _problem(self, damping: float) -> tuple[int, float, float, Tensor]:
        # No gradients yet: F = damping I, whatever m is.
        return self.block_size, self.num_gradients or 1.0, damping, ops.new_status(self.gram.device)

    def inverse(self, damping: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """``F^-1`` as dense ``[blocks, B, B]``; ``1/damping`` on the diagonal past a short block.

        Raises:
            NumericalError: a block is not positive definite (also from the methods below).
        """
        size, m, damping, status = self._problem(damping)
        out = ops.gram_inverse(self.gram, self.num_weights, size, m, damping, dtype, status)
        self._checked(status, damping)
        return unpack_inverse(out)

    def diagonal(self, damping: float, dtype: torch.dtype = torch.float32) -> Tensor:
        """Diagonal of ``F^-1``, ``[n]``."""
        size, m, damping, status = self._problem(damping)
        out = ops.gram_diagonal(self.gram, self.num_weights, size, m, damping, dtype, status)
        self._checked(status, damping)
        return out

    def solve(self, vector: Tensor, damping: float) -> Tensor:
        """``F^-1 v`` for ``v`` of ``[n]``."""
        problem = self._problem(damping)
        out = ops.gram_solve(self.gram, wide(vector), *problem)
        self._checked(problem[-1], damping)
        return out

    def scores(self, weight: Tensor, damping: float, group_size: int = 1) -> Tensor:
        """OBS saliencies, float32 ``[n / group_size]``.

        ``1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q`` for every group Q of ``group_size`` consecutive
        weights: the loss increase when Q alone is removed and the rest of its block adapts.
        """
        problem = self._problem(damping)
        out = ops.gram_scores(self.gram, wide(weight), group_size, *problem)
        self._checked(problem[-1], damping)
        return out

    def greedy_scores(
        self, weight: Tensor, keep: Tensor, damping: float, group_size: int = 1
    ) -> Tensor:
        """Saliencies in the order in which exact removals take the groups of a block.

        In each block the group goes whose removal costs least, ``1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q``,
        the rest adapts, the next is chosen; the saliency of a group is the largest cost up to
        its own.  Float32 ``[n / group_size]``, zero for groups gone already.

        Args:
            weight: ``[n]``.
            keep: ``[n]`` bool, False for weights that are gone already.
            damping: of F.
            group_size: c, consecutive weights that go together.
        """
        problem = self._problem(damping)
        out = ops.gram_greedy_scores(self.gram, wide(weight), keep, group_size, *problem)
        self._checked(problem[-1], damping)
        return out

    def n_of_m(self, weight: Tensor, keep: Tensor, damping: float, kept: int, group: int) -> Tensor:
        """Return a mask with at most ``kept`` of every ``group`` consecutive weights.

        Groups take their turn in each block; of each the set Q goes whose removal costs least,
        ``1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q``, and the rest of the block adapts.

        Args:
            weight: ``[n]``.
            keep: ``[n]`` bool, False for weights that are gone already.
            damping: of F.
            kept: N, weights that stay of each group.
            group: M, at most 16; the block size is a multiple of it.

        Returns:
            ``[n]`` bool.
        """
        problem = self._problem(damping)
        out = ops.gram_n_of_m(self.gram, wide(weight), keep, kept, group, *problem)
        self._checked(problem[-1], damping)
        return out

    def update(
        self,
        weight: Tensor,
        keep: Tensor,
        damping: float,
        group_size: int = 1,
        rule: str = "joint",
    ) -> tuple[Tensor, float]:
        """Return the weights after pruning and the predicted loss increase ``1/2 d^T F d``.

        Args:
            weight: ``[n]``.
            keep: ``[n]`` bool, True for weights that remain; a zero among them may move.
            damping: of F.
            group_size: weights removed together under the sum rule.
            rule: "sum" adds the updates of all groups as if each were removed alone (oBERT);
                "joint" is exact inside a block: ``w_S += F_SS^-1 F_SP w_P``.
        """
        problem = self._problem(damping)
        new, increase = ops.gram_update(
            self.gram, wide(weight), keep, group_size, is_joint(rule), *problem
        )
        self._checked(problem[-1], damping)
        return new.to(weight.dtype), float(increase.sum())
