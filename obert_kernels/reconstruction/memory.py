"""What a reconstruction needs in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..gradients.batches import samples_in, spread_out
from .structure import Structure


def planned_bytes(weights: Mapping[str, Tensor]) -> int:
    """Return what is needed whatever the batches are.

    Two copies of the weights, dense and before the fit; for the largest layer, in float64, second
    moments of the samples to fit and of those held back, as sums and as means, and the systems.
    """
    copies = sum(2 * weight.nbytes for weight in weights.values())
    of_layers = [5 * n * n + 8 * m * n for m, n in (weight.shape for weight in weights.values())]
    return copies + 8 * max(of_layers, default=0)


def that_fit(
    batches: list[Any],
    held_back: list[Any],
    room: int,
    per_sample: float,
    structure: Structure,
) -> list[Any]:
    """Return as many samples of the batches as there is room for, from all of them alike.

    Args:
        batches: samples to fit.
        held_back: others, all of which are needed.
        room: bytes.
        per_sample: tokens of one, where no attention mask tells them, padding included.
        structure: of the model.
    """
    width = _bytes_per_row(structure)
    needed, taken = (
        width * sum(_rows(batch, per_sample) for batch in some) for some in (batches, held_back)
    )
    if needed + taken <= room:
        return batches
    samples = sum(samples_in(batch) or 1 for batch in batches)
    return spread_out(batches, max(1, int(samples * (room - taken) / needed)))


def _rows(batch: Any, per_sample: float) -> float:
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.dim() > 1:
        return float(mask.shape[0] * mask.shape[-1])
    return per_sample * (samples_in(batch) or 1)


def _bytes_per_row(structure: Structure) -> int:
    """What is kept of a token while a block is fitted: what the dense model computes in its
    layers, and the pruned one where blocks run alone, and what both hand on to it; float32."""
    widths = [
        (1 if unit.chain is None else 2)
        * sum(layer.outputs for group in unit.groups for layer in group)
        + 2 * max(layer.inputs for group in unit.groups for layer in group)
        for unit in structure.units
    ]
    return 4 * max(widths, default=0)
