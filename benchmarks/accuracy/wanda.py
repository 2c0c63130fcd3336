"""Wanda's score for the evidence table: as in docs/extending.md, norms taken once per model.

The sweep prunes one model many times, from the same weights and with the same texts.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from obert_kernels import Problem, register_saliency
from obert_kernels.tasks.precision import choose_precision, text_loss

_NORMS: weakref.WeakKeyDictionary[nn.Module, dict[str, Tensor]] = weakref.WeakKeyDictionary()


def _norms(problem: Problem) -> dict[str, Tensor]:
    """Of every input of every matrix, over all tokens of all texts."""
    squares: dict[str, Tensor] = {}
    hooks = []
    owners = {weight: name for name, weight in problem.weights.items()}
    for module in problem.model.modules():
        if (name := owners.get(getattr(module, "weight", None))) is not None:

            def add(module, inputs, output, name=name):
                values = inputs[0].flatten(0, -2).float()
                squares[name] = squares.get(name, 0) + values.square().sum(dim=0)

            hooks.append(module.register_forward_hook(add))
    try:
        with torch.no_grad():
            for batch in problem.each_batch():
                text_loss(problem.model, batch, choose_precision("auto"))
    finally:
        for hook in hooks:
            hook.remove()
    return {name: values.sqrt() for name, values in squares.items()}


@register_saliency("wanda", uses_fisher=False)
def wanda(problem: Problem) -> dict[str, Tensor]:
    """Rank of ``|W_ij| ‖X_j‖`` in its row."""
    if problem.model not in _NORMS:
        _NORMS[problem.model] = _norms(problem)
    scores = {}
    for name in problem.names():
        weight = problem.weights[name].detach().abs() * _NORMS[problem.model][name]
        rank = weight.argsort(dim=1).argsort(dim=1) / weight.shape[1]
        scores[name] = problem.grouped(rank)
    return scores
