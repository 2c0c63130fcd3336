"""Parts for :class:`transformers.Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from .masks import MaskedWeights, present_zeros


class KeepPrunedAtZero(TrainerCallback):
    """Sets pruned weights to zero at the start, after each optimizer step, and at the end.

    Gradients are clipped before that, and checkpoints are written after it.  At the end the Trainer
    may have loaded its best checkpoint.

    Args:
        masks: see :class:`~obert_kernels.training.masks.MaskedWeights`, which raises at the start
            of training what it raises.  None: what is zero when training starts in the linear
            layers of the encoder.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        self.masks = masks

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the weights."""
        model = kwargs["model"]
        masks = present_zeros(model) if self.masks is None else self.masks
        self._weights = MaskedWeights(model, masks)
        self._weights.zero_pruned()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Undo what the optimizer did to pruned weights."""
        self._weights.zero_pruned()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Undo what a best checkpoint, loaded at the end, may have brought back."""
        self._weights.zero_pruned()
