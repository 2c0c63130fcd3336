"""Fitting one layer: the ridge that held-back batches choose, and their veto."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.status import NumericalError
from .least_squares import fit_on_masks
from .moments import Normal

RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
_SAMPLE_ROWS = 24  # that a ridge is chosen on


class LayerFit(NamedTuple):
    """What the fit of a layer came to.

    Attributes:
        name: of the matrix.
        ridge: over the mean square of an input.
        before, after: mean square error on held-back batches against the dense layer's outputs,
            over their variance.
        is_kept: it is smaller, and the fit was kept.
    """

    name: str
    ridge: float
    before: float
    after: float
    is_kept: bool


class Fitted(NamedTuple):
    """Weights ``[m, n]`` and bias ``[m]``, float64, and what they came to."""

    weight: Tensor
    bias: Tensor | None
    report: LayerFit


def fit_layer(
    name: str,
    weight: Tensor,
    bias: Tensor | None,
    keep: Tensor,
    seen: Normal,
    held_back: Normal,
    ridge: float | str,
) -> Fitted:
    """Fit the remaining weights of a layer.

    Row i with remaining inputs S becomes ``(C_i + r w_i)_S (H_SS + r I)^-1``, where H are the
    second moments of its inputs, C those of its targets with them, r the ridge times the mean of
    H's diagonal and w the row as it is.

    Args:
        name: of the matrix.
        weight: ``[m, n]``, zero where pruned.
        bias: ``[m]``, if there is one.
        keep: mask, bool ``[m, n]``.
        seen: equations of the batches to fit.
        held_back: of others.
        ridge: a number, or "auto".

    Raises:
        NumericalError: the moments are not finite, or not positive definite with the ridge.
    """
    weight = weight.double()
    bias = None if bias is None else bias.double()
    scale = float(seen.inputs.diagonal().mean())
    if not all(torch.isfinite(part.sum()) for part in (*seen, *held_back)):
        raise NumericalError(
            f"{name}: inputs or outputs of its layer are not finite; compute in float32 without "
            "autocast, or leave the reconstruction out"
        )

    def solve(ridge: float, rows: Tensor | slice) -> Tensor:
        if not scale > 0:  # the inputs are constant
            return weight[rows]
        r = ridge * scale
        moments = seen.inputs.clone()
        moments.diagonal().add_(r)
        return fit_on_masks(moments, seen.targets[rows] + r * weight[rows], keep[rows], name)

    def cost(ridge: float, rows: Tensor) -> float:
        try:
            fitted = solve(ridge, rows)
        except NumericalError:  # too small a ridge for these inputs
            return math.inf
        own = None if bias is None else seen.part(rows).bias(fitted)
        return float(held_back.part(rows).errors(fitted, own).sum())

    if ridge == "auto":
        count = min(_SAMPLE_ROWS, len(weight))
        rows = torch.linspace(0, len(weight) - 1, count, device=weight.device).long()
        ridge = min(RIDGES, key=lambda one: cost(one, rows))
    assert isinstance(ridge, float | int)
    fitted = solve(ridge, slice(None))
    new_bias = None if bias is None else seen.bias(fitted)
    before = float(held_back.errors(weight, bias).sum())
    after = float(held_back.errors(fitted, new_bias).sum())
    whole = float(held_back.target_square.sum()) or 1.0
    is_kept = after < before
    report = LayerFit(name, float(ridge), before / whole, after / whole, is_kept)
    return Fitted(fitted, new_bias, report) if is_kept else Fitted(weight, bias, report)
