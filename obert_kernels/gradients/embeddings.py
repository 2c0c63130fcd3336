"""What gradients are taken of where a model gives embeddings: how far they move."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .losses import LossFn, random_logit_directions

POOLS = ("mean", "first")


def embedding_loss(dense: nn.Module, pool: str = "mean") -> LossFn:
    """Return a loss for models that turn texts into embeddings: no labels are needed.

    With e the embedding of a text, of length 1, its value is the mean over the texts of the cosine
    distance from the model before pruning, 1 - e . e_dense.  Of the dense model it is 0, and so is
    its gradient.  The gradients are those of u . e instead, where u is a random direction, the same
    for a text every time (see :func:`prediction_loss`): their squares by weights give the
    Gauss-Newton matrix of the distance, up to a factor.

    Args:
        dense: a copy of the model as it was, ``copy.deepcopy(model)``, on the same device.
        pool: of tokens to a text: "mean" over those that are no padding, or "first".

    Returns:
        ``loss_fn(model, batch)``; batches are mappings of the model's arguments.  Of its output
        ``last_hidden_state`` ``[texts, tokens, width]`` counts.  Padding is what
        ``attention_mask`` says; without one there is none.

    Raises:
        ValueError: there is no such pool.  The loss: it is given ``dense`` itself.
        TypeError: the loss: a model gives no ``last_hidden_state``.
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        if model is dense:
            raise ValueError(
                "embedding_loss needs a copy of the model, or it would be held against itself: "
                "embedding_loss(copy.deepcopy(model))"
            )
        with torch.no_grad():
            before = embeddings(dense.eval(), batch, pool)
        now = embeddings(model, batch, pool)
        directions = random_logit_directions(batch, now).to(now.device)
        change = (now * directions).sum(dim=1).mean()
        distance = (now.detach() - before).square().sum(dim=1).mean() / 2
        return change - change.detach() + distance

    return loss


def embeddings(model: nn.Module, batch: Any, pool: str = "mean") -> Tensor:
    """Return the embeddings of a batch's texts, float32 ``[texts, width]``, each of length 1."""
    tokens = getattr(model(**batch), "last_hidden_state", None)
    if not isinstance(tokens, Tensor) or tokens.dim() != 3:
        raise TypeError(
            f"{type(model).__name__} gives no last_hidden_state of tokens: embedding_loss is for "
            "encoders without a head, such as transformers.AutoModel"
        )
    tokens = tokens.float()
    if pool == "first":
        return nn.functional.normalize(tokens[:, 0], dim=1)
    counts = batch.get("attention_mask")
    counts = torch.ones(tokens.shape[:2]) if counts is None else counts
    counts = counts.to(tokens).unsqueeze(2)
    return nn.functional.normalize((tokens * counts).sum(1) / counts.sum(1).clamp(min=1), dim=1)
