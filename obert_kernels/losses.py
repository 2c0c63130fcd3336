"""The loss that gradients are taken of: the model's own, or that of labels it draws itself."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
    loss = _part(model(**batch), "loss")
    if loss is None:
        raise TypeError(
            f"{type(model).__name__} returned no loss for a batch with the keys "
            f"{sorted(map(str, batch))}; add labels to the batches or pass loss_fn"
        )
    return loss


def sampled_loss(model: nn.Module, batch: Any) -> Tensor:
    """Return the mean cross entropy of labels drawn from the model's own predictions.

    Its gradients give the Fisher information matrix, which is the second derivative of the
    predictions' divergence, where those of given labels give the "empirical" one (Kunstner,
    Balles, Hennig: Limitations of the empirical Fisher approximation, 2019).  A gradient of g
    samples then stands for 1/g of the mean of their g Fishers, whatever g.

    The same batch gets the same labels every time, and torch's own random state is left alone.

    Args:
        model: returns an output with ``.logits`` of classes in its last dimension, as Hugging
            Face classifiers, taggers and masked language models do.
        batch: mapping of its arguments.  Of ``labels``, if there are any, only those of -100
            matter: what they mark is left out.

    Raises:
        TypeError: the batch is not a mapping, or the model gives no classes.
    """
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"sampled_loss needs batches that are mappings of model arguments, got a "
            f"{type(batch).__name__}"
        )
    logits = class_logits(model, model(**{k: v for k, v in batch.items() if k != "labels"}))
    if logits is None:
        raise TypeError(
            f"{type(model).__name__} gives no logits of classes to draw labels from: use the "
            "given labels (leave sampled_loss out)"
        )
    logits = logits.flatten(0, -2).float()
    labels = _draw(logits.detach().softmax(dim=1), _seed(batch))
    given = batch.get("labels")
    if isinstance(given, Tensor) and given.numel() == labels.numel():
        labels = labels.masked_fill(given.flatten() == _LEFT_OUT, _LEFT_OUT)
    return nn.functional.cross_entropy(logits, labels, ignore_index=_LEFT_OUT)


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


def _draw(probabilities: Tensor, seed: int) -> Tensor:
    """A class for each row of ``[samples, classes]``; any, where they are no numbers, which shows
    in the loss."""
    generator = torch.Generator().manual_seed(seed)
    usable = torch.where(probabilities.isfinite(), probabilities, 1.0).cpu()
    return torch.multinomial(usable, 1, generator=generator)[:, 0].to(probabilities.device)


def _seed(batch: Mapping[str, Any]) -> int:
    """A number made of what is in a batch."""
    seed = 0
    for tensor in _tensors(batch):
        plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
        seed = zlib.crc32(plain.numpy().tobytes(), seed)
    return seed


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
