"""How blocks are packed: Grams and inverses as one lower triangle a block."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def num_blocks(num_weights: int, block_size: int) -> int:
    """Number of blocks of ``block_size`` that hold ``num_weights`` weights."""
    return -(-num_weights // block_size)


def gram_shape(num_weights: int, block_size: int) -> tuple[int, int]:
    """Shape of the Gram, and of an inverse: one packed lower triangle a block."""
    return num_blocks(num_weights, block_size), block_size * (block_size + 1) // 2


def to_blocks(vector: Tensor, block_size: int) -> Tensor:
    """View ``[..., n]`` as ``[..., blocks, B]``, zeros after the last weight."""
    blocks = num_blocks(vector.shape[-1], block_size)
    padded = pad(vector, (0, blocks * block_size - vector.shape[-1]))
    return padded.unflatten(-1, (blocks, block_size))


def block_size_of(triangles: Tensor) -> int:
    """Return B of ``[blocks, B(B+1)/2]``, for other widths the B of the next smaller triangle."""
    return (math.isqrt(8 * triangles.shape[1] + 1) - 1) // 2


def _inverse_places(block_size: int, device: torch.device) -> Tensor:
    """Where entry (i, j) of a dense block stands in a packed inverse, ``[B, B]``."""
    i = torch.arange(block_size, device=device)
    row, column = torch.maximum(i[:, None], i), torch.minimum(i[:, None], i)
    below = block_size + row * (row - 1) // 2 + column
    return torch.where(row == column, row, below)


def unpack_inverse(inverse: Tensor) -> Tensor:
    """Dense blocks ``[blocks, B, B]`` of a packed inverse ``[blocks, B(B+1)/2]``.

    A packed block is its diagonal (B values) and then the rows below it: entry (i, j), j < i,
    stands at ``B + i(i-1)/2 + j``.
    """
    size = block_size_of(inverse)
    places = _inverse_places(size, inverse.device).flatten()
    return inverse[:, places].view(inverse.shape[0], size, size)


def pack_inverse(dense: Tensor) -> Tensor:
    """Undo :func:`unpack_inverse`; reads the lower triangles."""
    size = dense.shape[-1]
    row, column = torch.tril_indices(size, size, device=dense.device)
    packed = dense.new_empty((dense.shape[0], row.numel()))
    packed[:, _inverse_places(size, dense.device)[row, column]] = dense[:, row, column]
    return packed
