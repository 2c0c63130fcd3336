"""Model and batches to the block Fishers of its weight matrices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..gradients.buffers import gradient_buffers
from ..gradients.losses import LossFn, default_loss
from ..gradients.per_batch import batch_gradients
from ..gradients.per_samples import GroupGradients
from ..gradients.source import Source, open_source
from ..ops.checks import WIDE
from ..progress import Clock, Progress, silent
from ..sparsity.layers import find_weights
from ..sparsity.patterns import UNSTRUCTURED, Pattern, find_pattern
from .base import Fisher
from .estimators import Estimator, estimators
from .memory import Plan, plan_passes


@dataclass
class FisherEstimate:
    """Block Fisher of several matrices, reusable for any sparsity, damping and rule.

    Attributes:
        fishers: parameter name to its block Fisher.
        num_grads: m.
        seconds: "gradients" and "fisher".
        plan: memory and passes.
        notes: what the user should know about the batches.
        samples_per_grad: as given; None: one batch each.
        pattern: the order of the weights in a block, and the groups that can be scored.
        block_size: B.
        dead: weights that were zero then, flat in the order of the pattern, of matrices that had
            some; a Fisher of the living weights alone knows itself.
    """

    fishers: dict[str, Fisher]
    num_grads: int
    seconds: dict[str, float]
    plan: Plan
    notes: list[str]
    samples_per_grad: int | None = None
    pattern: Pattern = UNSTRUCTURED
    block_size: int = 50
    dead: dict[str, Tensor] = field(default_factory=dict)


def check_request(
    batches: Any, num_grads: int, samples_per_grad: int | None, fisher_dtype: torch.dtype
) -> None:
    """Find fault with what is asked of an estimate.

    Raises:
        ValueError: a number of gradients or samples is out of range.
        TypeError: one batch in place of several, or no type a Gram can have.
    """
    if isinstance(batches, Mapping):
        raise TypeError("batches must be an iterable of batches, got a mapping: pass [batch]")
    if fisher_dtype not in WIDE:
        raise TypeError(
            f"fisher_dtype must be torch.float64 or torch.float32, got {fisher_dtype!r}"
        )
    if num_grads < 1:
        raise ValueError(f"num_grads must be at least 1, got {num_grads}")
    if samples_per_grad is not None and samples_per_grad < 1:
        raise ValueError(f"samples_per_grad must be at least 1, or None, got {samples_per_grad}")


def accumulate(
    source: Source,
    weights: Mapping[str, nn.Parameter],
    plan: Plan,
    *,
    block_size: int,
    dtype: torch.dtype,
    clock: Clock,
    progress: Progress,
    estimator: Estimator,
) -> dict[str, Fisher]:
    """Add the gradients of some matrices to Fishers of the weights that are left in them."""
    fishers: dict[str, Fisher] = {}
    for name, weight in weights.items():
        alive = source.pattern.flat(weight.detach() != 0)
        fishers[name] = estimator.create(
            alive, block_size, source.pattern.span, dtype=dtype, name=name
        )
    dead = _dead(fishers, weights, source.pattern)  # no gradient: rows and columns stay zero
    add_all = _gather if source.group is None else _stream
    progress("gradients", 0, source.num_grads)
    add_all(source, weights, plan, fishers, dead, clock, progress)
    return fishers


def _dead(
    fishers: Mapping[str, Fisher], weights: Mapping[str, nn.Parameter], pattern: Pattern
) -> dict[str, Tensor]:
    """Weights that are zero, where there are some and the Fisher would look at them."""
    looked_at = (name for name, fisher in fishers.items() if fisher.looks_at_pruned)
    zero = ((name, pattern.flat(weights[name].detach() == 0)) for name in looked_at)
    return {name: dead for name, dead in zero if bool(dead.any())}


def _gather(
    source: Source,
    weights: Mapping[str, nn.Parameter],
    plan: Plan,
    fishers: Mapping[str, Fisher],
    dead: Mapping[str, Tensor],
    clock: Clock,
    progress: Progress,
) -> None:
    """One gradient a batch, k of them gathered before they are added."""
    k = plan.gradients_per_update
    buffers = gradient_buffers(k, weights)
    gathered = 0
    with closing(
        batch_gradients(
            source.model,
            source.batches,
            weights,
            source.num_grads,
            source.loss_fn,
            first=source.next_batch,
            unit=source.unit,
            is_part=len(plan.passes) > 1,
        )
    ) as gradients:
        for index in range(source.num_grads):
            with clock.stage("gradients"):
                for name, gradient in next(gradients).items():
                    row = buffers[name][gathered].copy_(source.pattern.flat(gradient))
                    if name in dead:
                        row.masked_fill_(dead[name], 0)
            gathered += 1
            if gathered == k or index == source.num_grads - 1:
                with clock.stage("fisher"):
                    for name, fisher in fishers.items():
                        fisher.accumulate(buffers[name][:gathered])
                gathered = 0
            progress("gradients", index + 1, source.num_grads)
    if not source.held:
        source.used += source.num_grads


def _stream(
    source: Source,
    weights: Mapping[str, nn.Parameter],
    plan: Plan,
    fishers: Mapping[str, Fisher],
    dead: Mapping[str, Tensor],
    clock: Clock,
    progress: Progress,
) -> None:
    """Many gradients a batch, added matrix by matrix while its backward pass runs."""

    def add(name: str, gradients: Tensor) -> None:
        if name in dead:
            gradients.masked_fill_(dead[name], 0)
        with clock.stage("fisher"):
            fishers[name].accumulate(gradients)

    assert source.group is not None
    groups = GroupGradients(
        source.model,
        weights,
        source.group,
        source.loss_fn,
        plan.gradients_per_update,
        source.pattern,
        is_part=len(plan.passes) > 1,
    )
    run = groups.run(source.batches, source.num_grads, add, first=source.next_batch)
    with closing(run), clock.stage_without("gradients", "fisher"):
        for done in run:
            source.used += not source.held
            progress("gradients", done, source.num_grads)
    if groups.split:
        source.notes.append(
            "some batches took a backward pass for every gradient: samples are left out of the "
            "loss, or cannot be told apart in the input of a layer"
        )
    if groups.largest < source.group:
        source.notes.append(
            f"the batches have fewer than {source.group} samples, and gradients are of so many: "
            "pass larger ones"
        )


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_grads: int = 1024,
    samples_per_grad: int | None = None,
    block_size: int | None = None,
    params: str | Iterable[str] | None = None,
    loss_fn: LossFn | None = None,
    fisher_dtype: torch.dtype = torch.float64,
    pattern: str = "unstructured",
    estimator: str = "gram",
    progress: Progress | None = None,
) -> FisherEstimate:
    """Estimate the block Fisher of a model's weight matrices from mini-batch gradients.

    The result serves :func:`prune` for several sparsities, dampings and rules; that of a dense
    model also for all patterns whose groups run along the same dimension (N:M ones if
    ``block_size`` is a multiple of M).

    Args: as for :func:`prune`.

    Raises:
        ValueError, TypeError, MemoryError: as for :func:`prune`.
    """
    loss_fn = loss_fn or default_loss
    check_request(batches, num_grads, samples_per_grad, fisher_dtype)
    shape = find_pattern(pattern)
    block_size = shape.block_size(block_size)
    kind = estimators.find(estimator)
    weights = find_weights(model, params)
    source = open_source(model, batches, weights, num_grads, samples_per_grad, loss_fn, shape)
    plan = plan_passes(
        weights,
        block_size,
        fisher_dtype,
        None,
        num_grads,
        pattern=shape,
        estimator=kind,
        streamed=source.group is not None,
        can_split=False,
    )
    clock = Clock()
    fishers = accumulate(
        source,
        weights,
        plan,
        block_size=block_size,
        dtype=fisher_dtype,
        clock=clock,
        progress=progress or silent,
        estimator=kind,
    )
    return FisherEstimate(
        fishers, num_grads, clock.seconds, plan, source.all_notes(), samples_per_grad, shape,
        block_size, _dead(fishers, weights, shape),
    )  # fmt: skip
