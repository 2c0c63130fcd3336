"""What a matrix must be to be pruned; and other values in its place for a while."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_values(weights: Mapping[str, nn.Parameter]) -> None:
    """Raise an error that names the matrix, and the remedy.

    Args:
        weights: name to matrix.

    Raises:
        TypeError: one is of a type, or stored in a way, that cannot be worked with.
        ValueError: one holds NaN or infinity, can have no gradients, or shares its memory.
    """
    places: dict[tuple[torch.device, int], str] = {}
    for name, weight in weights.items():
        if weight.dtype not in _TYPES:
            raise TypeError(
                f"{name} has type {weight.dtype}; only floating types of 16 bits and more can be "
                "pruned: prune a model before it is quantised"
            )
        if weight.layout != torch.strided:
            raise TypeError(f"{name} is stored as {weight.layout}: make it dense, .to_dense()")
        if weight.is_inference():
            raise ValueError(
                f"{name} was made inside torch.inference_mode() and can have no gradients: load "
                "the model outside of it"
            )
        if not torch.isfinite(weight.detach()).all():
            raise ValueError(f"{name} holds NaN or infinite weights; load the model again")
        if any(s == 0 and n > 1 for s, n in zip(weight.stride(), weight.shape, strict=True)):
            raise ValueError(f"{name} is an expanded view; give it memory of its own, .clone()")
        first = places.setdefault((weight.device, weight.data_ptr()), name)
        if first != name and weight.numel():
            raise ValueError(
                f"{first} and {name} share their memory: make them one parameter, or leave one out "
                "with params"
            )


@contextmanager
def replaced(weights: Mapping[str, nn.Parameter], new: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights inside the block; nothing is copied."""
    old = {name: weights[name].data for name in new}
    try:
        for name, value in new.items():
            weights[name].data = value
        yield
    finally:
        for name, value in old.items():
            weights[name].data = value
