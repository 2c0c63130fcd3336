"""Block Fisher of one weight matrix: the Gram of its gradients, or the inverse directly.

``F = damping I + (1/m) sum_i g_i g_i^T`` on blocks of B consecutive weights (oBERT, EMNLP
2022, section 3).  :class:`GramFisher` keeps the sum and factors it when asked, in float64;
it is additive over data and processes.  :class:`WoodburyFisher` keeps ``F^-1`` in float32 and
updates it gradient by gradient.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from . import ops
from ._checks import check_block_size, check_positive
from .masks import n_of_m_mask
from .reference import gram_shape, unpack_inverse


def gram_bytes(num_weights: int, block_size: int, dtype: torch.dtype = torch.float64) -> int:
    """Memory of the Gram of one matrix, in bytes."""
    return math.prod(gram_shape(num_weights, block_size)) * dtype.itemsize


def as_rows(gradients: Tensor, num_weights: int) -> Tensor:
    """``[n]`` or ``[k, n]`` to ``[k, n]``."""
    rows = gradients.unsqueeze(0) if gradients.dim() == 1 else gradients
    if rows.dim() != 2 or rows.shape[1] != num_weights:
        raise ValueError(
            f"gradients must be [n] or [k, n] with n = {num_weights}, got {tuple(gradients.shape)}"
        )
    return rows


def _is_joint(rule: str) -> bool:
    if rule not in ("sum", "joint"):
        raise ValueError(f"update rule must be 'sum' or 'joint', got {rule!r}")
    return rule == "joint"


def _wide(weight: Tensor) -> Tensor:
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

    Args:
        alive: bool ``[n]``, the weights that are left.  Others are never asked for.
        block_size: B.
        group_size: consecutive weights that belong together in some way.
        dtype: the Gram's, or whatever is wide enough for sums over gradients.
        name: used in error messages.
    """

    num_weights: int  # n; set by __init__
    num_gradients: float  # m, gradients seen so far
    # Gradients of pruned weights are set to zero before it gets them.
    looks_at_pruned = True

    @abstractmethod
    def __init__(
        self,
        alive: Tensor,
        block_size: int,
        group_size: int,
        *,
        dtype: torch.dtype,
        name: str,
    ) -> None: ...

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
        block_size: int = 50,
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
        self.num_weights = num_weights
        self.block_size = block_size
        self.name = name
        self.num_gradients: float = 0
        self.gram = torch.zeros(gram_shape(num_weights, block_size), dtype=dtype, device=device)

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
            remedy = "its gradients hold NaN or infinity"
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
        out = ops.gram_solve(self.gram, _wide(vector), *problem)
        self._checked(problem[-1], damping)
        return out

    def scores(self, weight: Tensor, damping: float, group_size: int = 1) -> Tensor:
        """OBS saliencies, float32 ``[n / group_size]``.

        ``1/2 w_Q^T ([F^-1]_QQ)^-1 w_Q`` for every group Q of ``group_size`` consecutive
        weights: the loss increase when Q alone is removed and the rest of its block adapts.
        """
        problem = self._problem(damping)
        out = ops.gram_scores(self.gram, _wide(weight), group_size, *problem)
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
        out = ops.gram_greedy_scores(self.gram, _wide(weight), keep, group_size, *problem)
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
            kept: N.
            group: M, at most 16; the block size is a multiple of it.

        Returns:
            ``[n]`` bool.
        """
        problem = self._problem(damping)
        out = ops.gram_n_of_m(self.gram, _wide(weight), keep, kept, group, *problem)
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
            keep: ``[n]`` bool, True for the survivors; a zero among them may move.
            damping: of F.
            group_size: weights removed together under the sum rule.
            rule: "sum" adds the updates of all groups as if each were removed alone (oBERT);
                "joint" is exact inside a block: ``w_S += F_SS^-1 F_SP w_P``.
        """
        problem = self._problem(damping)
        new, increase = ops.gram_update(
            self.gram, _wide(weight), keep, group_size, _is_joint(rule), *problem
        )
        self._checked(problem[-1], damping)
        return new.to(weight.dtype), float(increase.sum())


class WoodburyFisher:
    """Inverse block Fisher in float32, updated by one rank-1 Woodbury step per gradient.

    ``v = F^-1 g``, ``F^-1 -= v v^T / (m + g^T v)`` from ``F^-1 = I / damping``.  Needs no
    float64, but loses positive definiteness when gradients are large against the damping;
    that is reported, never passed on.

    Args:
        num_weights: number of weights n, flattened row-major.
        num_gradients: m, how many gradients there will be.
        block_size: B, 1 to 256.
        damping: of F.
        device: where it lives.
        name: used in error messages.

    Attributes:
        packed: ``F^-1`` as float32 ``[blocks, B(B+1)/2]``: of each block the diagonal, then the
            rows below it.
    """

    def __init__(
        self,
        num_weights: int,
        num_gradients: int,
        block_size: int = 50,
        *,
        damping: float = 1e-7,
        device: torch.device | str = "cpu",
        name: str = "weights",
    ) -> None:
        check_block_size(block_size)
        check_positive("damping", damping)
        self.num_weights = num_weights
        self.num_gradients = num_gradients
        self.damping = damping
        self.name = name
        self._status = ops.new_status(device)
        self.block_size = block_size
        self.packed = torch.zeros(gram_shape(num_weights, block_size), device=device)
        self.packed[:, :block_size] = 1.0 / damping

    def _checked(self) -> None:
        ops.raise_for_status(
            self._status,
            self.name,
            f"float32 Woodbury updates broke down at damping {self.damping:g}: raise damping or "
            "use a float64 Gram (GramFisher)",
        )

    def accumulate(self, gradients: Tensor) -> None:
        """Apply gradients ``[n]`` or ``[k, n]``; many at once are cheaper.

        Raises:
            NumericalError: a denominator was not positive, or the diagonal is not any more.
        """
        rows = as_rows(gradients, self.num_weights)
        ops.woodbury_update(self.packed, rows, float(self.num_gradients), self._status)
        self._checked()

    def diagonal(self) -> Tensor:
        """Diagonal of ``F^-1``, ``[n]``."""
        return self.packed[:, : self.block_size].flatten()[: self.num_weights].clone()

    def inverse(self) -> Tensor:
        """``F^-1`` as dense ``[blocks, B, B]``."""
        return unpack_inverse(self.packed)

    def scores(self, weight: Tensor, group_size: int = 1) -> Tensor:
        """Like :meth:`GramFisher.scores`."""
        out = ops.inverse_scores(self.packed, _wide(weight), group_size, self._status)
        self._checked()
        return out

    def update(
        self, weight: Tensor, keep: Tensor, group_size: int = 1, rule: str = "joint"
    ) -> tuple[Tensor, float]:
        """Like :meth:`GramFisher.update`."""
        new, increase = ops.inverse_update(
            self.packed, _wide(weight), keep, group_size, _is_joint(rule), True, self._status
        )
        self._checked()
        return new.to(weight.dtype), float(increase.sum())
