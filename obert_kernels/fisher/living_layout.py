"""Where the remaining weights of a matrix stand in a Fisher of them alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.checks import MAX_BLOCK_SIZE
from .gram import gram_bytes

# Sizes that blocks are rounded up to; each is one more call of every operator but the sum.
_SIZES = (4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224)
# Of a place: its weight twice, by part and by block (int32), and whether there is one (bool).
PLACE_BYTES = 9
# Of a block: where its Gram and its places begin (int64).
BLOCK_BYTES = 16


@dataclass
class RemainingLayout:
    """The remaining weights of a matrix and the blocks that have any.

    A group of c weights takes c places of its block, also where weights of it are pruned or lie
    in the next block, so that groups stay groups.
    """

    weight: Tensor  # [remaining], in order
    block: Tensor  # [remaining], counted among the blocks with any
    place: Tensor  # [remaining], in what is left of its block
    needed: Tensor  # [blocks with any], places


def _changes(x: Tensor) -> Tensor:
    """True at the first element and wherever one differs from that before it."""
    return torch.cat([x.new_ones(min(1, len(x)), dtype=torch.bool), x[1:] != x[:-1]])


def layout_of(remaining: Tensor, block_size: int, group_size: int) -> RemainingLayout:
    """Find a place for each remaining weight, bool ``[n]``, in what is left of its block."""
    weight = remaining.flatten().nonzero().flatten()
    new_block = _changes(weight // block_size)
    new_group = new_block | _changes(weight // group_size)
    block = torch.cumsum(new_block, 0) - 1
    group = torch.cumsum(new_group, 0) - 1
    groups = torch.bincount(block[new_group])
    first_group = torch.cumsum(groups, 0) - groups
    place = (group - first_group[block]) * group_size + weight % group_size
    return RemainingLayout(weight, block, place, groups * group_size)


def _sizes(needed: Tensor, group_size: int) -> list[int]:
    """The sizes to use, multiples of the group, up to what the fullest block needs."""
    most = int(needed.max()) if len(needed) else 0
    rounded = {-(-size // group_size) * group_size for size in _SIZES}
    return sorted({size for size in rounded if size < most} | {most})


def places_by_size(needed: Tensor, group_size: int) -> dict[int, int]:
    """How many places there are in blocks of each size."""
    sizes = torch.tensor(_sizes(needed, group_size), device=needed.device)
    blocks = torch.bincount(torch.searchsorted(sizes, needed), minlength=len(sizes))
    return {size: size * count for size, count in zip(sizes.tolist(), blocks.tolist(), strict=True)}


def layout_bytes(layout: RemainingLayout, group_size: int, dtype: torch.dtype) -> float:
    """Memory of Grams and tables; infinite if a block is larger than there can be."""
    places = places_by_size(layout.needed, group_size)
    if max(places) > MAX_BLOCK_SIZE:  # whole groups make it larger than the block they come from
        return math.inf
    return sum(
        gram_bytes(p, size, dtype) + PLACE_BYTES * p + BLOCK_BYTES * (p // size)
        for size, p in places.items()
        if p
    )
