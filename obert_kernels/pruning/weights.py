"""Weights of a model: which are there, and writing new ones."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ops.status import NumericalError
from ..sparsity.patterns import Pattern
from .rollback import Rollback


def present_masks(weights: Mapping[str, nn.Parameter], pattern: Pattern) -> dict[str, Tensor]:
    """Weights that are zero now count as pruned; flat, in the order of the pattern."""
    return {name: pattern.flat(weight.detach() != 0) for name, weight in weights.items()}


def commit(weights: Mapping[str, nn.Parameter], new: dict[str, Tensor], rollback: Rollback) -> None:
    """Write new weights in place of the old, which the rollback keeps; ``new`` is used up.

    Raises:
        NumericalError: one is NaN or infinite; then nothing is written.
    """
    for name, value in new.items():
        if not bool(torch.isfinite(value).all()):
            raise NumericalError(
                f"the update of {name} left the range of {value.dtype}; raise damping"
            )
    for name in list(new):
        weight = weights[name].detach()
        rollback.keep(name, weight.clone())
        weight.copy_(new.pop(name))  # which frees its memory for the next one's copy
