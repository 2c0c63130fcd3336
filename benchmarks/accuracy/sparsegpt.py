"""SparseGPT in plain torch, written from its formulas: a contender for the evidence table.

E. Frantar, D. Alistarh, *SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot*,
ICML 2023, arXiv 2301.00774, algorithm 1.  Every matrix goes to the same sparsity.  As the authors
do it, the matrices of an encoder block are pruned together, by the inputs they have when all blocks
before it are pruned.  Labels and biases play no part.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from obert_kernels import PruneReport, PruneResult, find_weights
from obert_kernels.gradients.backward import evaluation, removed
from obert_kernels.pruning.report import LayerReport
from obert_kernels.sparsity.masks import check_sparsity, n_of_m_mask
from obert_kernels.sparsity.patterns import NofM, find_pattern

# Columns whose mask is chosen together; what they change in later columns is added up first.
WINDOW = 128
DAMPING = 0.01  # of the mean diagonal of the Hessian

_BLOCK = re.compile(r"(.*?\blayers?\.\d+)\.")


# ---- one matrix --------------------------------------------------------------------


def sweep(
    weight: Tensor, hessian: Tensor, sparsity: float | None, pattern: str = "unstructured"
) -> tuple[Tensor, Tensor]:
    """Prune a matrix column by column; the columns to the right make up for each weight.

    Args:
        weight: ``[m, n]``.
        hessian: ``X^T X``, ``[n, n]``, of inputs ``[tokens, n]``, in the type to compute in.
        sparsity: of the matrix, exact to a weight; None for N:M.
        pattern: "unstructured" or N:M.

    Returns:
        New weights ``[m, n]`` in the Hessian's type, and bool ``[m, n]``, True where one remains.

    Raises:
        ValueError: another pattern, or one that does not divide the columns.
        torch.linalg.LinAlgError: no input was ever other than 0.
    """
    chosen_by = _chooser(weight, sparsity, pattern)
    span = find_pattern(pattern).span
    together = span if span > 1 else WINDOW
    window = WINDOW // span * span
    columns = weight.shape[1]
    upper = _factor(hessian)
    new = weight.to(hessian.dtype, copy=True)
    keep = torch.ones_like(new, dtype=torch.bool)
    for start in range(0, columns, window):
        end = min(start + window, columns)
        errors = torch.zeros_like(new[:, start:end])
        for j in range(start, end):
            if (j - start) % together == 0:
                here = slice(j, min(j + together, end))
                keep[:, here] = chosen_by((new[:, here] / upper.diagonal()[here]).square(), j)
            error = torch.where(keep[:, j], 0, new[:, j] / upper[j, j])
            new[:, j:end] -= error.outer(upper[j, j:end])
            errors[:, j - start] = error
        new[:, end:] -= errors @ upper[start:end, end:]
    return new.masked_fill(~keep, 0), keep


def _factor(hessian: Tensor) -> Tensor:
    """Return U, upper triangular, of ``(H + damping I)^-1 = U^T U``.

    The inverse Hessian of the columns from j on is ``U[j:, j:]^T U[j:, j:]``: its first row is
    ``U[j, j] U[j, j:]``, what the optimal brain surgeon needs to remove column j.
    """
    damped = hessian.clone()
    damped.diagonal().add_(DAMPING * hessian.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _chooser(
    weight: Tensor, sparsity: float | None, pattern: str
) -> Callable[[Tensor, int], Tensor]:
    """Return what makes a mask of the costs of some columns and the number of the first."""
    shape = find_pattern(pattern)
    shape.check("a matrix", weight)
    share = check_sparsity(shape.target_sparsity(sparsity))
    if isinstance(shape, NofM):
        return lambda costs, first: n_of_m_mask(
            costs.flatten(), torch.ones_like(costs, dtype=torch.bool).flatten(),
            shape.kept, shape.span,
        ).view_as(costs)  # fmt: skip
    if pattern != "unstructured":
        raise ValueError(f"SparseGPT prunes unstructured or N:M, got pattern {pattern!r}")

    def smallest_go(costs: Tensor, first: int) -> Tensor:
        rows, columns = costs.shape
        before, after = (round(share * rows * count) for count in (first, first + columns))
        keep = torch.ones_like(costs, dtype=torch.bool).flatten()
        keep[costs.flatten().topk(after - before, largest=False).indices] = False
        return keep.view_as(costs)

    return smallest_go


# ---- a model -----------------------------------------------------------------------


class Call(NamedTuple):
    """What a block of the encoder is called with.

    Attributes:
        hidden: float ``[texts, tokens, size]``.
        args, kwargs: the rest, the same for all blocks.
        real: bool ``[texts, tokens]``, False for padding.
    """

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    real: Tensor


def prune_as_sparsegpt(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    sparsity: float | None,
    pattern: str = "unstructured",
    dtype: torch.dtype = torch.float32,
) -> PruneResult:
    """Prune the encoder's linear layers in place.

    Args:
        model: an encoder whose blocks get the hidden states first, such as BERT and MPNet.
        batches: with ``attention_mask``.
        sparsity, pattern: as for :func:`sweep`.
        dtype: of the Hessians and the sweep.

    Raises:
        ValueError: as :func:`sweep`.
    """
    seconds: Counter[str] = Counter()
    masks: dict[str, Tensor] = {}
    weights = find_weights(model)
    for weight in weights.values():  # what cannot be done is refused before anything changes
        _chooser(weight, sparsity, pattern)
    modules = dict(model.named_modules())
    blocks = [modules[name] for name in dict.fromkeys(_BLOCK.match(name)[1] for name in weights)]
    names = {modules[name.removesuffix(".weight")]: name for name in weights}
    with evaluation(model), torch.no_grad():
        start = time.perf_counter()
        calls = _first_calls(model, blocks[0], batches)
        for block in blocks:
            hessians = _hessians(block, calls, names.keys(), dtype)
            middle = time.perf_counter()
            for module, hessian in hessians.items():
                new, masks[names[module]] = sweep(module.weight, hessian, sparsity, pattern)
                module.weight.copy_(new)
            seconds["fisher"] += middle - start
            start = time.perf_counter()
            seconds["update"] += start - middle
            calls = [call._replace(hidden=_output(block, call)) for call in calls]
        seconds["fisher"] += time.perf_counter() - start
    layers = [
        LayerReport(name, list(weight.shape), weight.numel(), int((~masks[name]).sum()), None)
        for name, weight in weights.items()
    ]
    settings = {"selection": "sparsegpt", "pattern": pattern, "sparsity": sparsity}
    return PruneResult(model, masks, PruneReport(layers, settings, dict(seconds), {}))


def _first_calls(
    model: nn.Module, block: nn.Module, batches: Iterable[Mapping[str, Tensor]]
) -> list[Call]:
    calls: list[Call] = []
    for batch in batches:
        real = batch["attention_mask"].bool()

        def note(block, args, kwargs, real=real):
            calls.append(Call(args[0], args[1:], kwargs, real))

        with removed(block.register_forward_pre_hook(note, with_kwargs=True)):
            model(**batch)
    return calls


def _output(block: nn.Module, call: Call) -> Tensor:
    found = block(call.hidden, *call.args, **call.kwargs)
    return found if isinstance(found, Tensor) else found[0]


def _hessians(
    block: nn.Module, calls: list[Call], linear: Collection[nn.Module], dtype: torch.dtype
) -> dict[nn.Module, Tensor]:
    """``X^T X`` of the inputs of the block's linear layers, at all tokens that are no padding."""
    size = {m: m.weight.shape[1] for m in block.modules() if m in linear}
    hessians = {m: m.weight.new_zeros(n, n, dtype=dtype) for m, n in size.items()}
    for call in calls:

        def add(module, inputs, real=call.real):
            inputs = inputs[0][real].to(dtype)
            hessians[module].addmm_(inputs.T, inputs)

        with ExitStack() as hooks:
            for module in hessians:
                hooks.enter_context(removed(module.register_forward_pre_hook(add)))
            _output(block, call)
    return hessians
