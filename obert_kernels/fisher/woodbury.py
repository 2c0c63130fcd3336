"""The inverse block Fisher itself, updated gradient by gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..ops.checks import check_block_size, check_positive
from ..ops.packing import gram_shape, unpack_inverse
from ..sparsity.patterns import DEFAULT_BLOCK_SIZE
from .base import as_rows, is_joint, wide


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
        block_size: int = DEFAULT_BLOCK_SIZE,
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
        out = ops.inverse_scores(self.packed, wide(weight), group_size, self._status)
        self._checked()
        return out

    def update(
        self, weight: Tensor, keep: Tensor, group_size: int = 1, rule: str = "joint"
    ) -> tuple[Tensor, float]:
        """Like :meth:`GramFisher.update`."""
        new, increase = ops.inverse_update(
            self.packed, wide(weight), keep, group_size, is_joint(rule), True, self._status
        )
        self._checked()
        return new.to(weight.dtype), float(increase.sum())
