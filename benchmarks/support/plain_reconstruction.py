"""The reconstruction of a BERT written out plainly: whole forward passes, one row at a time.

An oracle for tests, and what a first implementation costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Pair = tuple[nn.Linear, nn.Module | None]  # a layer, and the norm that its residual sum goes into


@torch.no_grad()
def reconstruct_plainly(
    dense: nn.Module,
    pruned: nn.Module,
    masks: Mapping[str, Tensor],
    batches: Iterable[Any],
    ridge: float,
) -> None:
    """Fit the remaining weights of a pruned BERT in place, in float64.

    Args:
        dense: as it was before, ``BertForSequenceClassification``; in eval mode, as ``pruned``.
        pruned: the model to fit.
        masks: parameter name to mask.
        batches: with an attention mask.
        ridge: over the mean square of an input.
    """
    batches = list(batches)
    names = {id(parameter): name for name, parameter in pruned.named_parameters()}
    for theirs, ours in zip(_groups(dense), _groups(pruned), strict=True):
        values = [
            (_values(dense, there, batches), _values(pruned, here, batches))
            for there, here in zip(theirs, ours, strict=True)
        ]
        for (layer, _), (there, here) in zip(ours, values, strict=True):
            target = there["y"]
            if "sum" in here:
                target = target + (there["sum"] - there["y"]) - (here["sum"] - here["y"])
            _fit(layer, masks[names[id(layer.weight)]], here["x"], target, ridge)


def _groups(model: Any) -> Iterator[list[Pair]]:
    """Layers that share their inputs, in the order of the forward pass."""
    for block in model.bert.encoder.layer:
        attention = block.attention
        inside = attention.self
        yield [(inside.query, None), (inside.key, None), (inside.value, None)]
        yield [(attention.output.dense, attention.output.LayerNorm)]
        yield [(block.intermediate.dense, None)]
        yield [(block.output.dense, block.output.LayerNorm)]


def _values(model: nn.Module, pair: Pair, batches: list[Any]) -> dict[str, Tensor]:
    """Inputs and outputs of a layer and what goes into the norm, of all tokens but padding."""
    layer, norm = pair
    found: dict[str, list[Tensor]] = {"x": [], "y": [], "sum": []}
    keep = torch.empty(0)

    def note(module: nn.Module, args: tuple, output: Tensor) -> None:
        found["x"].append(args[0][keep])
        found["y"].append(output[keep])

    hooks = [layer.register_forward_hook(note)]
    if norm is not None:
        hooks.append(
            norm.register_forward_pre_hook(lambda m, args: found["sum"].append(args[0][keep]))
        )
    for batch in batches:
        keep = batch["attention_mask"].bool()
        model(**batch)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts).double() for name, parts in found.items() if parts}


def _fit(layer: nn.Linear, mask: Tensor, x: Tensor, target: Tensor, ridge: float) -> None:
    centred, wanted = x - x.mean(0), target - target.mean(0)
    moments, crossed = centred.mT @ centred / len(x), wanted.mT @ centred / len(x)
    r = ridge * moments.diagonal().mean()
    weight = layer.weight.double()
    new = torch.zeros_like(weight)
    for i, row in enumerate(mask):
        s = row.nonzero()[:, 0]
        system = moments[s][:, s] + r * torch.eye(len(s), dtype=x.dtype)
        new[i, s] = torch.linalg.solve(system, crossed[i, s] + r * weight[i, s])
    layer.weight.copy_(new)
    layer.bias.copy_(target.mean(0) - new @ x.mean(0))
