"""What gradients are taken of: the model's own loss, or its predictions."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .batches import samples_in, tensors_in

LossFn = Callable[[nn.Module, Any], Tensor]

# Of labels that are left out of a loss, as in torch and Hugging Face models.
_LEFT_OUT = -100


def model_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return ``model(**batch).loss``: the task loss of a Hugging Face model.

    Raises:
        TypeError: the batch is not a mapping, or the model returned no loss.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"a batch of type {type(batch).__name__} needs loss_fn=lambda model, batch: loss; "
            "without it batches must be mappings of model arguments with labels"
        )
    return _own_loss(model, batch, model(**batch))


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return :func:`prediction_loss` where a model gives each sample one of several classes, and
    its own loss, :func:`model_loss`, anywhere else."""
    if not isinstance(batch, Mapping):
        return model_loss(model, batch)  # raises, with the remedy
    output = model(**batch)
    logits = class_logits(model, output)
    if logits is None or logits.dim() != 2:
        return _own_loss(model, batch, output)
    return _of_predictions(output, logits, batch, math.inf)


def prediction_loss(model: nn.Module, batch: Any, temperature: float = math.inf) -> Tensor:
    """Return a loss whose gradients are those of the model's predictions: no labels are needed.

    The gradient by the logits z of a sample is a random u with mean 0, and the mean of u u^T is
    the second derivative of how far its predictions move, so that the squares of gradients by
    weights give a Fisher matrix of the predictions where those of given labels give the
    "empirical" one (Kunstner, Balles, Hennig: Limitations of the empirical Fisher approximation,
    2019).  A gradient of g samples stands for 1/g of the mean of their g Fishers.

    How far predictions move is T^2 times the divergence of softened ones (the loss of
    distillation), p = softmax(z / T) and its second derivative diag(p) - p p^T.  For T without
    end, the default, that is half the variance of the change of the logits over the C classes:
    every sample and every class count the same.  A fitted model is sure of most of its training
    texts; with T = 1 these say next to nothing about the weights, though pruning changes what the
    model makes of them as well (benchmarks/results/temperature.md).

    The value is the model's own loss where batches have labels, else 0.  The same sample gets
    the same u every time, and torch's own random state is left alone.

    Args:
        model: returns an output with ``.logits`` of classes in its last dimension, as Hugging
            Face classifiers, taggers and masked language models do.
        batch: mapping of its arguments.  Samples whose ``labels`` are -100 are left out.
        temperature: T, positive; 1 for the Fisher of the predictions as they are.  Of a vocabulary,
            where few classes matter, a small T looks at these.

    Raises:
        TypeError: the batch is not a mapping, or the model gives no classes.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"prediction_loss needs batches that are mappings of model arguments, got a "
            f"{type(batch).__name__}"
        )
    output = model(**batch)
    logits = class_logits(model, output)
    if logits is None:
        raise TypeError(
            f"{type(model).__name__} gives no logits of classes: take gradients of its loss, "
            "loss_fn=obert_kernels.model_loss"
        )
    return _of_predictions(output, logits, batch, temperature)


def class_logits(model: nn.Module, output: Any) -> Tensor | None:
    """Return the logits ``[..., classes]`` that a model gave, None if they are something else."""
    # Set by Hugging Face models whose logits are no classes to choose one from.
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind in ("regression", "multi_label_classification"):
        return None
    logits = _part(output, "logits")
    if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.shape[-1] < 2:
        return None
    return logits


def _part(output: Any, name: str) -> Any:
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _own_loss(model: nn.Module, batch: Mapping[str, Any], output: Any) -> Tensor:
    loss = _part(output, "loss")
    if loss is None:
        raise TypeError(
            f"{type(model).__name__} returned no loss for a batch with the keys "
            f"{sorted(map(str, batch))}; add labels to the batches or pass loss_fn"
        )
    return loss


def _of_predictions(
    output: Any, logits: Tensor, batch: Mapping[str, Any], temperature: float
) -> Tensor:
    signs = _signs(batch, logits).flatten(0, -2).to(logits.device)
    logits = logits.flatten(0, -2).float()
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.numel() == len(logits):
        counted = labels.flatten() != _LEFT_OUT
        logits, signs = logits[counted], signs[counted]
    direction = _root_of_fisher((logits.detach() / temperature).softmax(dim=1), signs)
    change = (logits * direction).sum(dim=1).mean()
    own = _part(output, "loss")
    return change - change.detach() + (0.0 if own is None else own.detach())


def _root_of_fisher(p: Tensor, signs: Tensor) -> Tensor:
    """Return u ``[samples, classes]`` with mean 0 and mean of u u^T = diag(p) - p p^T.

    That is R R^T for R = (diag(sqrt p) - p sqrt(p)^T) Q with Q any orthonormal basis; sqrt p
    itself is mapped to zero.  Q here is the reflection of the likeliest class k to -sqrt p, whose
    column k can be left out: u = sqrt(p) * (r - w (w, r) / (1 + sqrt p_k)), w = sqrt(p) + e_k,
    for signs r with r_k = 0.  With two classes u u^T is exact, whatever the signs.
    """
    root = p.sqrt()
    likeliest = p.argmax(dim=1, keepdim=True)
    signs = signs.to(p.dtype).scatter(1, likeliest, 0.0)
    most = root.gather(1, likeliest)
    along = root.scatter_add(1, likeliest, torch.ones_like(most))
    return root * (signs - along * (root * signs).sum(dim=1, keepdim=True) / (1 + most))


def _signs(batch: Mapping[str, Any], logits: Tensor) -> Tensor:
    """Random -1 and 1 in the shape of the logits, int8 on the CPU.

    Those of a sample are decided by what its rows of the batch hold, so that it has the same ones
    in every pass, and alone or in company (a gradient of a group is held against that).  Where
    not all of a batch is by rows, their position counts as well: no two are to be the same.
    """
    if len(logits) == 0:
        return torch.empty(logits.shape, dtype=torch.int8)
    seeds = list(range(len(logits))) if samples_in(batch) != len(logits) else [0] * len(logits)
    for tensor in tensors_in(batch):
        if tensor.dim() > 0 and len(tensor) == len(seeds):
            rows = tensor.detach().cpu().contiguous().view(len(seeds), -1).view(torch.uint8)
            seeds = [zlib.crc32(row, seed) for row, seed in zip(rows.numpy(), seeds, strict=True)]
    generators = (torch.Generator().manual_seed(seed) for seed in seeds)
    drawn = [
        torch.randint(0, 2, logits.shape[1:], generator=generator, dtype=torch.int8)
        for generator in generators
    ]
    return torch.stack(drawn).mul_(2).sub_(1)
