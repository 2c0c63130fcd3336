"""Parts for :class:`transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from .masks import MaskedWeights


class KeepPrunedAtZero(TrainerCallback):
    """Sets pruned weights to zero at the start and after each optimizer step.

    At no other place: gradients are clipped before, and a checkpoint may be written after.

    Args:
        masks: see :class:`~obert_kernels.training.masks.MaskedWeights`, which raises at the start
            of training what it raises.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self.masks = masks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the weights."""
        self._weights = MaskedWeights(kwargs["model"], self.masks)
        self._weights.zero_pruned()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Undo what the optimizer did to pruned weights."""
        self._weights.zero_pruned()
