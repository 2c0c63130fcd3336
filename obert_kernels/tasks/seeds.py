"""Random numbers that depend on a seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch


@contextmanager
def seeded(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch inside the block; put its generators, numpy's and Python's back afterwards."""
    device = torch.device(device)
    of_numpy, of_python = numpy.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            yield
    finally:
        numpy.random.set_state(of_numpy)
        random.setstate(of_python)
