"""The interface of SparseML's ``EmpiricalBlockFisherInverse``, so that one import changes."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..gradients.buffers import gradient_buffer
from ..ops.checks import check_positive
from .gram import GramFisher

# Gradients gathered before they are added to the Gram: with more of them its triangles are read and
# written less often, but their own memory takes longer to come by than that saves.
_GATHERED = 32


class EmpiricalBlockFisherInverse:
    """Inverse of a dampened block-diagonal empirical Fisher, fed one gradient at a time.

    Gives what the reference class gives, ``F = damp I + (1/num_grads) sum g g^T`` inverted
    block by block, but gathers gradients and keeps their Gram in float64: faster, exact to
    float32 rounding, and a breakdown raises instead of turning NaN.

    Args:
        num_grads: m, the divisor, whatever number of gradients is added.
        fisher_block_size: B, 1 to 256.
        num_weights: d, weights of the matrix.
        damp: damping.
        device: where the Gram lives.

    Raises:
        ValueError: one of them is out of range, or later a gradient or vector is of another size.
    """

    def __init__(
        self,
        num_grads: int,
        fisher_block_size: int,
        num_weights: int,
        damp: float,
        device: torch.device | str = "cpu",
    ) -> None:
        check_positive("damp", damp)
        if num_grads < 1:
            raise ValueError(f"num_grads must be at least 1, got {num_grads}")
        self.m = num_grads
        self.B = fisher_block_size
        self.d = num_weights
        self.damp = damp
        self.dev = torch.device(device)
        self._fisher = GramFisher(num_weights, fisher_block_size, device=device)
        self.num_blocks = self._fisher.gram.shape[0]
        self._buffer: Tensor | None = None
        self._gathered = 0
        self._inverse: tuple[float, Tensor] | None = None  # and its damping

    def add_grad(self, g: Tensor) -> None:
        """Add a gradient of ``num_weights`` values, any shape and floating type."""
        if g.numel() != self.d:
            raise ValueError(f"the gradient must have {self.d} values, got {g.numel()}")
        if self._buffer is None or self._buffer.dtype != g.dtype:
            self._flush()
            self._buffer = gradient_buffer(_GATHERED, self.d, g.dtype, self.dev)
        self._inverse = None
        ops.copy(g.detach().reshape(-1), self._buffer[self._gathered])
        self._gathered += 1
        if self._gathered == _GATHERED:
            self._flush()

    def _flush(self) -> GramFisher:
        if self._gathered and self._buffer is not None:
            self._fisher.accumulate(self._buffer[: self._gathered])
            self._gathered = 0
        self._fisher.num_gradients = self.m
        return self._fisher

    @property
    def f_inv(self) -> Tensor:
        """``[num_blocks, B, B]`` float32, kept until a gradient is added; also as ``F_inv``, which
        some versions of SparseML call it.

        Raises:
            NumericalError: a block is not positive definite (also from the methods below).
        """
        if self._inverse is None or self._inverse[0] != self.damp:
            self._inverse = self.damp, self._flush().inverse(self.damp)
        return self._inverse[1]

    F_inv = f_inv

    def diag(self) -> Tensor:
        """Diagonal of the inverse, float32 ``[num_weights]``."""
        return self._flush().diagonal(self.damp)

    def mul(self, v: Tensor) -> Tensor:
        """Inverse times ``v``, ``[num_weights]``, in the type of ``v`` (at least float32)."""
        if v.numel() != self.d:
            raise ValueError(f"the vector must have {self.d} values, got {v.numel()}")
        return self._flush().solve(v.reshape(-1), self.damp)
