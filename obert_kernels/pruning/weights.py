"""Weights of a model: which are there, others for a while, and writing new ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..ops.status import NumericalError
from ..sparsity.patterns import Pattern


def present_masks(weights: Mapping[str, nn.Parameter], pattern: Pattern) -> dict[str, Tensor]:
    """Weights that are zero now count as pruned; flat, in the order of the pattern."""
    return {name: pattern.flat(weight.detach() != 0) for name, weight in weights.items()}


@contextmanager
def _instead(weights: Mapping[str, nn.Parameter], new: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights for a while."""
    old = {name: weights[name].data for name in new}
    try:
        for name, value in new.items():
            weights[name].data = value
        yield
    finally:
        for name, value in old.items():
            weights[name].data = value


def commit(weights: Mapping[str, nn.Parameter], new: Mapping[str, Tensor]) -> None:
    """Write all new weights, or on any interruption none."""
    for name, value in new.items():
        if not bool(torch.isfinite(value).all()):
            raise NumericalError(
                f"the update of {name} left the range of {value.dtype}; raise damping"
            )
    old: dict[str, Tensor] = {}  # in the memory of `new`, so that nothing more is needed
    in_flight: tuple[str, Tensor] | None = None
    try:
        for name, value in new.items():
            weight = weights[name].detach()
            in_flight = (name, weight.clone())
            weight.copy_(value)
            value.copy_(in_flight[1])
            old[name] = value
    except BaseException:
        if in_flight is not None:
            old[in_flight[0]] = in_flight[1]
        for name, value in old.items():
            weights[name].detach().copy_(value)
        raise
