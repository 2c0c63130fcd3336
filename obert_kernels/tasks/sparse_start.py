"""Models that are sparse already when they are given."""

from __future__ import annotations

from torch import Tensor, nn

from .load_classifier import is_of_head

# Share of zeros from which on a model counts as pruned; a trained matrix has hardly any.
_PRUNED = 0.01


def zeros_of(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    """Return the share of zeros in the matrices of an encoder, and where they are.

    Embeddings and the head do not count: rows of zeros are nothing unusual there.

    Returns:
        The share, 0 for a model that is not pruned, and parameter name -> bool tensor, False where
        the weight is zero; empty for a model that is not pruned.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {
        name: weight
        for name, weight in model.named_parameters()
        if weight.dim() == 2 and id(weight) not in tables and not is_of_head(model, name)
    }
    remaining = {name: weight.detach() != 0 for name, weight in matrices.items()}
    total = sum(mask.numel() for mask in remaining.values())
    zeros = total - sum(int(mask.sum()) for mask in remaining.values())
    if zeros < _PRUNED * total or not zeros:
        return 0.0, {}
    return zeros / total, remaining
