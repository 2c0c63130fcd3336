"""Memory that gradients are gathered in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

# Gradients gathered before one call of the native core.  More of them amortise reading and
# writing the Gram, but all matrices of a pass are gathered at once: 16 float32 gradients are
# a third of a float64 Gram at B = 50.
GRADIENTS_PER_UPDATE = 16
# Gradients of one matrix that are made and added together where they are streamed: only the
# matrix at hand is held, so there can be more.
STREAMED_PER_UPDATE = 32

_PAGE = 4096


def row_bytes(num_weights: int, itemsize: int) -> int:
    """Distance of two gathered gradients: an odd number of pages and five cache lines."""
    size = num_weights * itemsize
    if size < 64 * _PAGE:
        return size
    pages = -(-(size - 320) // _PAGE) | 1
    return pages * _PAGE + 320


def gradient_buffer(
    count: int,
    num_weights: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uninitialised ``[count, num_weights]`` to gather gradients in.

    The kernels read a few weights of all gradients at a time.  Rows of, say, 768 x 3072
    float32 values back to back would begin a large power of two apart and fall into the same
    sets of the caches and of the table of pages; these lie an odd number of pages apart, which
    makes the Gram a quarter faster.
    """
    distance = row_bytes(num_weights, dtype.itemsize) // dtype.itemsize
    return torch.empty((count, distance), dtype=dtype, device=device)[:, :num_weights]


def gradient_buffers(count: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a :func:`gradient_buffer` for each matrix, in one piece of memory of its device.

    The C library gives that back to the system as soon as it is freed; of many pieces of some ten
    MiB it keeps a part.
    """
    buffers = {}
    for device in dict.fromkeys(w.device for w in weights.values()):
        here = {name: w for name, w in weights.items() if w.device == device}
        sizes = [count * row_bytes(w.numel(), w.itemsize) for w in here.values()]
        pages = [-(-size // _PAGE) * _PAGE for size in sizes]
        room = torch.empty(sum(pages), dtype=torch.uint8, device=device)
        for (name, w), piece, size in zip(here.items(), room.split(pages), sizes, strict=True):
            buffers[name] = piece[:size].view(w.dtype).view(count, -1)[:, : w.numel()]
    return buffers
