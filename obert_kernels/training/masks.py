"""Pruned weights that stay zero while the others are trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class MaskedWeights:
    """The weights of a model that have masks.

    An optimizer moves pruned weights too: their gradients are not zero, and neither are its own
    moments.  Call :meth:`zero_pruned` after each of its steps.

    Args:
        model: what is trained.
        masks: parameter name -> bool tensor of its shape, True = remains.

    Raises:
        ValueError: a mask names no parameter of the model, or has another shape.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        parameters = dict(model.named_parameters())
        unknown = sorted(masks.keys() - parameters.keys())
        if unknown:
            raise ValueError(f"masks name parameters the model does not have: {', '.join(unknown)}")
        for name, mask in masks.items():
            if mask.shape != parameters[name].shape:
                raise ValueError(
                    f"the mask of {name} has shape {list(mask.shape)}, the parameter has "
                    f"{list(parameters[name].shape)}"
                )
        self._pruned = [
            (parameters[name], ~mask.to(parameters[name].device)) for name, mask in masks.items()
        ]

    @torch.no_grad()
    def zero_pruned(self) -> None:
        """Set all pruned weights to zero."""
        for parameter, pruned in self._pruned:
            parameter.masked_fill_(pruned, 0.0)
