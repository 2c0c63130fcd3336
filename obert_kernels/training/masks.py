"""Pruned weights that stay zero while the others are trained."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..sparsity.layers import find_weights
from ..sparsity.masks import masked_parameters


class MaskedWeights:
    """The weights of a model that have masks.

    An optimizer moves pruned weights too: their gradients are not zero, and neither are its own
    moments.  Call :meth:`zero_pruned` after each of its steps.

    Args:
        model: what is trained, inside a wrapper (``DistributedDataParallel``, ``torch.compile``)
            or not.
        masks: parameter name -> bool tensor of its shape, True = remains; on any device.

    Raises:
        TypeError: masks are no mapping from name to tensor.
        ValueError: there is no mask, one names no parameter of the model, has another shape, or
            holds something else than 0 and 1.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor]) -> None:
        self._model = model
        self.masks = masks  # copied there

    @property
    def masks(self) -> dict[str, Tensor]:
        """Those that are kept; set others when more has been pruned."""
        return dict(self._masks)

    @masks.setter
    def masks(self, masks: Mapping[str, Tensor]) -> None:
        masked_parameters(self._model, masks)
        if not masks:
            raise ValueError("masks are empty, so nothing would be kept: give those of prune")
        self._masks = dict(masks)
        self._pruned = {name: ~mask.bool() for name, mask in masks.items()}

    @torch.no_grad()
    def zero_pruned(self, moved: Iterable[Tensor] | None = None) -> None:
        """Set all pruned weights to zero.

        They are looked up by name each time, as others may stand in the model by now.

        Args:
            moved: parameters that an optimizer has moved, the only ones that are looked at; None:
                all.

        Raises:
            ValueError: one is not in the model any more.
        """
        looked_at = None if moved is None else set(map(id, moved))
        for name, parameter in masked_parameters(self._model, self._masks).items():
            if looked_at is not None and id(parameter) not in looked_at:
                continue
            if self._pruned[name].device != parameter.device:
                self._pruned[name] = self._pruned[name].to(parameter.device)
            parameter.masked_fill_(self._pruned[name], 0.0)


def present_zeros(model: nn.Module, params: str | Iterable[str] | None = None) -> dict[str, Tensor]:
    """Return masks of the weights that are not zero now, of the matrices that ``params`` names.

    Raises:
        ValueError: none is zero, or as for :func:`obert_kernels.find_weights`.
    """
    masks = {name: weight.detach() != 0 for name, weight in find_weights(model, params).items()}
    if all(bool(mask.all()) for mask in masks.values()):
        raise ValueError(
            f"no weight of the {len(masks)} matrices looked at is zero: prune the model first, or "
            "pass masks (load_masks reads those of a checkpoint)"
        )
    return masks


@contextmanager
def pruned_weights_kept(
    model: nn.Module,
    masks: Mapping[str, Tensor] | None = None,
    *,
    params: str | Iterable[str] | None = None,
) -> Iterator[MaskedWeights]:
    """Keep pruned weights at zero inside the block, whatever trains the model.

    They are set to zero at the start, after every step of a torch optimizer that moves them (a hook
    on all optimizers, removed at the end), and at the end, also after an exception.  So weight
    decay, moments, several optimizers, gradients added up over batches, ``GradScaler`` and
    :class:`transformers.Trainer` need nothing else.  What is no ``torch.optim.Optimizer`` needs a
    call of :meth:`~obert_kernels.training.masks.MaskedWeights.zero_pruned` after its steps.

    Args:
        model: what is trained, inside a wrapper or not.  Its parameters may be moved or replaced.
        masks: parameter name -> bool tensor of its shape, True = remains, such as those of
            :func:`obert_kernels.prune` or :func:`obert_kernels.load_masks`.  None: what is zero
            at the start in the matrices that ``params`` names.
        params: as for :func:`obert_kernels.prune`, where there are no masks; None: linear layers
            of the encoder.

    Yields:
        The weights, whose ``masks`` may be set anew when more has been pruned.

    Raises:
        TypeError, ValueError: as for :class:`~obert_kernels.training.masks.MaskedWeights`; or,
            without masks, nothing is zero.
    """
    if masks is not None and params is not None:
        raise ValueError("give masks or params, not both: masks name their matrices themselves")
    weights = MaskedWeights(model, present_zeros(model, params) if masks is None else masks)

    def after_step(optimizer: Optimizer, *_: object) -> None:
        # No others: a backward pass under way, with an optimizer for each, still needs them.
        weights.zero_pruned(p for group in optimizer.param_groups for p in group["params"])

    hook = register_optimizer_step_post_hook(after_step)
    try:
        weights.zero_pruned()
        yield weights
    finally:
        hook.remove()
        weights.zero_pruned()
