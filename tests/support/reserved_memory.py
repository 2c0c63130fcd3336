"""Tensors larger than the machine's memory: addresses are reserved, pages come when written to."""

from __future__ import annotations

import mmap

import pytest
import torch

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # without a name before Python 3.11


def reserved(count: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor of zeros; only the pages that something touches take memory."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    try:
        memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    except (OSError, ValueError) as error:
        pytest.skip(f"{count * dtype.itemsize} bytes of addresses cannot be reserved: {error}")
    return torch.frombuffer(memory, dtype=dtype, count=count)
