"""Random Fisher problems and comparison, used by several test files."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from obert_kernels.ops import reference
from obert_kernels.ops.packing import num_blocks, pack_inverse

DAMPING = 1e-4


def gradients(k: int, n: int, scale: float = 1e-2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Correlated gradients ``[k, n]``: a shared direction and noise, as real ones have."""
    shared = torch.randn(n)
    return ((torch.randn(k, 1) * shared + torch.randn(k, n)) * scale).to(dtype)


def gram_of(g: Tensor, block_size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gram by the oracle in float64, then rounded to ``dtype``."""
    blocks = num_blocks(g.shape[1], block_size)
    gram = torch.zeros(blocks, block_size * (block_size + 1) // 2, dtype=torch.float64)
    reference.gram_accumulate(gram, g.double(), block_size)
    return gram.to(dtype)


def fresh_inverse(blocks: int, block_size: int) -> Tensor:
    """Packed ``I / damping``: the state that Woodbury updates start from."""
    return pack_inverse((torch.eye(block_size) / DAMPING).repeat(blocks, 1, 1))


def onto_nan(operator: Callable[..., Any], *args: Any) -> Any:
    """Call an operator; outputs it allocates start as NaN, so that what it leaves out shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # fills what torch.empty and its kin return
    try:
        assert torch.empty(1).isnan()
        return operator(*args)
    finally:
        torch.use_deterministic_algorithms(before)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute error over the largest expected value; NaN must not occur at all."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all() and torch.isfinite(expected).all()
    scale = expected.double().abs().max().clamp_min(1e-300)
    return float((actual.double() - expected.double()).abs().max() / scale)


def sizes(block_size: int) -> list[int]:
    """Numbers of weights: one block, several, a short last block, fewer than a block."""
    return [
        block_size,
        3 * block_size,
        2 * block_size + max(1, block_size // 3),
        max(1, block_size // 2),
    ]
