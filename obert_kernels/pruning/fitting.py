"""The reconstruction of a pruning step: on which batches, and whether its result is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..gradients.batches import split_off, spread_out
from ..gradients.source import BatchSource
from ..reconstruction.config import ReconstructionConfig
from ..reconstruction.stage import reconstruct
from ..sparsity.values import replaced
from .predictions import Calibration
from .report import FitReport
from .step import PruningStep

# One sample of the fit in so many judges it, or batches that are kept back.
_HELD_BACK = 4
_LEAST_HELD_BACK = 64
_UNDONE = (
    "the fit of the remaining weights to the dense model was undone: on held-back batches it moved "
    "the predictions further; more batches may help"
)
_SAME_BATCHES = "the fit of the remaining weights was judged on the batches it was made from"


class Fit(NamedTuple):
    """What the fit of a sub-step came to.

    Attributes:
        config: how.
        report: in figures.
        notes: what the user should know.
    """

    config: ReconstructionConfig
    report: FitReport
    notes: list[str]


@dataclass
class Fitting:
    """Fits the remaining weights after every sub-step.

    Attributes:
        config: how.
        biases: of the layers, by the names that the rollback has for them.
        source: has remembered batches.
        calibration: batches the fit does not see; None: some of the source's are kept from it.
        max_memory: bytes on top of the model.
    """

    config: ReconstructionConfig
    biases: Mapping[str, nn.Parameter]
    source: BatchSource
    calibration: Calibration | None
    max_memory: int | None = None

    def __post_init__(self) -> None:
        self.source.remember(self.config.num_samples)

    @cached_property
    def _batches(self) -> tuple[list[Any], list[Any]]:
        seen = spread_out(self.source.look_back(), self.config.num_samples)
        if self.calibration is not None:
            count = max(_LEAST_HELD_BACK, self.config.num_samples // _HELD_BACK)
            return seen, spread_out(self.calibration.batches, count)
        return split_off(seen, _HELD_BACK)

    def after(self, step: PruningStep, flat_masks: Mapping[str, Tensor]) -> Fit:
        """Fit what a sub-step has left, unless that moves the predictions further.

        Raises:
            NumericalError: what a layer computes is not finite.
        """
        parameters = {**step.weights, **self.biases}
        dense = step.rollback.keep_all().values
        masks = {name: step.pattern.matrix(flat_masks[name], w) for name, w in step.weights.items()}
        with step.clock.stage("reconstruction"):
            seen, held_back = self._batches
            judge = self.calibration or Calibration(
                step.model, held_back, step.loss_fn, "the fit is judged"
            )
            with replaced(parameters, {name: dense[name] for name in parameters}):
                _ = judge.before
            before, pruned = _cost(judge), _copies(parameters)
            found = reconstruct(
                step.model, step.weights, masks, dense, seen, held_back, step.loss_fn, self.config,
                step.progress, self.max_memory,
            )  # fmt: skip
            after = _cost(judge)
            is_kept = math.isfinite(after) and not after >= before
            if not is_kept:
                _write(parameters, pruned)
            if not is_kept and any(layer.is_kept for layer in found.layers):
                found.notes.append(_UNDONE)
            if any(one is other for one in seen for other in held_back):
                found.notes.append(_SAME_BATCHES)
        report = FitReport(1, before, after, is_kept, found.layers)
        return Fit(self.config, report, found.notes)


def _cost(judge: Calibration) -> float:
    loss, moved = judge.change()
    return loss if moved is None else moved


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in parameters.items()}


@torch.no_grad()
def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(values[name])
