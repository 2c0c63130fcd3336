"""What gradients are taken of: the model's own loss, or its predictions."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..sparsity.wrappers import unwrapped
from .batches import samples_in, tensors_in
from .ignored_labels import IGNORED

LossFn = Callable[[nn.Module, Any], Tensor]


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
    return _own_loss(model, batch, _output(model, batch))


def default_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return :func:`prediction_loss` where a model gives each sample one of several classes, and
    its own loss, :func:`model_loss`, anywhere else."""
    if not isinstance(batch, Mapping):
        return model_loss(model, batch)  # raises, with the remedy
    output = _output(model, batch)
    logits = class_logits(model, output)
    if logits is None or logits.dim() != 2:
        return _own_loss(model, batch, output)
    return _of_predictions(_part(model, output, "loss"), logits, batch)


# What a configuration's ``gradients_of`` stands for.
LOSSES: dict[str, LossFn] = {"predictions": default_loss, "labels": model_loss}


def prediction_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss whose gradients are those of the model's predictions: no labels are needed.

    The gradient by the C logits of a sample is a random u: half of the classes are pushed up and
    half down (of an odd number one is left alone), all by the same amount.  Its mean is 0 and that
    of u u^T is (I - 1 1^T / C) / C, the second derivative of half the variance, over the classes,
    of the logits' change.  So the squares of gradients by weights give the Gauss-Newton matrix of
    how far a pruning moves what the model makes of a sample, where those of given labels give the
    "empirical Fisher" (Kunstner, Balles, Hennig: Limitations of the empirical Fisher
    approximation, 2019).  A gradient of g samples stands for 1/g of the mean of their g matrices.

    It is the Fisher matrix of predictions in the limit of infinite temperature, as in distillation.
    That of the predictions themselves is almost insensitive to samples the model is sure of, which
    are most of those it was fitted to; pruning moves them as well.

    The value is the model's own loss where batches have labels, else 0.  The same sample gets
    the same u every time, and torch's own random state is left alone.

    Args:
        model: returns an output with ``.logits`` of classes in its last dimension, as Hugging
            Face classifiers and taggers do.
        batch: mapping of its arguments.  Samples whose ``labels`` are -100 are left out.

    Raises:
        TypeError: the batch is not a mapping, or the model gives no classes.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"prediction_loss needs batches that are mappings of model arguments, got a "
            f"{type(batch).__name__}"
        )
    output = _output(model, batch)
    logits = class_logits(model, output)
    if logits is None:
        raise TypeError(
            f"{type(model).__name__} gives no logits of classes: take gradients of its loss, "
            "loss_fn=obert_kernels.model_loss"
        )
    return _of_predictions(_part(model, output, "loss"), logits, batch)


def class_logits(model: nn.Module, output: Any) -> Tensor | None:
    """Return the logits ``[..., classes]`` that a model gave, None if they are something else."""
    # Set by Hugging Face models whose logits are no classes to choose one from.
    kind = getattr(getattr(unwrapped(model), "config", None), "problem_type", None)
    if kind in ("regression", "multi_label_classification"):
        return None
    logits = _part(model, output, "logits")
    if not isinstance(logits, Tensor) or logits.dim() < 2 or logits.shape[-1] < 2:
        return None
    return logits


def _output(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    """What the model makes of a batch; what holds no samples, one without a dimension for them, or
    numbers that are no tensors, is refused."""
    tensors = tensors_in(batch)
    if arrays := [key for key, value in batch.items() if type(value).__module__ == "numpy"]:
        raise TypeError(
            f"a batch holds numpy arrays ({', '.join(map(str, arrays))}): make them tensors, "
            "torch.as_tensor, or set the data set's format to torch"
        )
    if samples_in(batch) == 0:
        raise ValueError("a batch holds no samples: leave it out")
    if not tensors and any(map(_is_list_of_numbers, batch.values())):
        raise TypeError(
            f"a batch with the keys {sorted(map(str, batch))} holds no tensors: tokenise with "
            "return_tensors='pt', or pass loss_fn"
        )
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.dim() == 0 and max(x.dim() for x in tensors) < 2:
        raise ValueError(
            "a batch holds a single sample without a dimension for samples: pass batches, such as "
            "a DataLoader gives, not the data set"
        )
    return model(**batch)


def _is_list_of_numbers(value: Any) -> bool:
    while isinstance(value, list) and value:
        value = value[0]
        if isinstance(value, int | float):
            return True
    return False


def _part(model: nn.Module, output: Any, name: str) -> Any:
    """Return the loss or the logits among a model's outputs, None if they are not there."""
    if isinstance(output, tuple) and _returns_tuples(model):
        tensors = [part for part in output if isinstance(part, Tensor)]
        loss = tensors.pop(0) if tensors and tensors[0].dim() == 0 else None
        if name == "loss":
            return loss
        return tensors[0] if len(tensors) == 1 else None  # two: of begin and end of an answer, say
    return output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)


def _returns_tuples(model: nn.Module) -> bool:
    """Return whether a Hugging Face configuration asks for outputs without names: the loss, where
    there are labels, then the logits."""
    config = getattr(model, "config", None)
    named = getattr(config, "return_dict", None)
    return named is False or bool(getattr(config, "torchscript", False))


def _own_loss(model: nn.Module, batch: Mapping[str, Any], output: Any) -> Tensor:
    loss = _part(model, output, "loss")
    if loss is None:
        raise TypeError(
            f"{type(model).__name__} returned no loss for a batch with the keys "
            f"{sorted(map(str, batch))}; add labels to the batches or pass loss_fn"
        )
    return loss


def _of_predictions(own: Tensor | None, logits: Tensor, batch: Mapping[str, Any]) -> Tensor:
    pushes = random_logit_directions(batch, logits).flatten(0, -2).to(logits.device)
    logits = logits.flatten(0, -2).float()
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.numel() == len(logits):
        counts = (labels.flatten() != IGNORED).to(logits.device)
        logits, pushes = logits[counts], pushes[counts]
    change = (logits * pushes).sum(dim=1).mean()
    return change - change.detach() + (0.0 if own is None else own.detach())


def random_logit_directions(batch: Mapping[str, Any], logits: Tensor) -> Tensor:
    """Return u for every sample, in the shape of the logits, float32 on the CPU.

    Those of a sample are decided by what its rows of the batch hold, so that it has the same ones
    in every pass, and alone or in company (a gradient of a group is held against that).  Where
    not all of a batch is by rows, their position counts as well: no two are to be the same.
    """
    classes = logits.shape[-1]
    half = classes // 2
    signs = [1.0] * half + [-1.0] * half + [0.0] * (classes % 2)
    push = torch.tensor(signs, dtype=torch.float32, device="cpu")
    push *= ((classes - 1) / (2 * half * classes)) ** 0.5  # to the trace of (I - 1 1^T / C) / C
    seeds = list(range(len(logits))) if samples_in(batch) != len(logits) else [0] * len(logits)
    for tensor in tensors_in(batch):
        if tensor.dim() > 0 and len(tensor) == len(seeds) > 0:
            # Not .contiguous(), which leaves the stride of a dimension of size 1 as it is.
            own = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            rows = own.view(len(seeds), -1).view(torch.uint8)
            seeds = [zlib.crc32(row, seed) for row, seed in zip(rows.numpy(), seeds, strict=True)]
    drawn = torch.empty(logits.shape, dtype=torch.float32, device="cpu")
    for row, seed in zip(drawn, seeds, strict=True):
        row.uniform_(generator=torch.Generator().manual_seed(seed))
    return push[drawn.argsort(dim=-1)]
