"""Model and batches to the block Fishers of its weight matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ._checks import check_block_size
from .fisher import GramFisher
from .gradients import LossFn, batch_gradients
from .layers import find_weights
from .memory import Plan, gradient_buffer, plan_passes

Progress = Callable[[str, int, int], None]


class Clock:
    """Adds up wall-clock seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body of a ``with`` statement."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


@dataclass
class FisherEstimate:
    """Block Fisher of several matrices, reusable for any sparsity, damping and rule.

    Attributes:
        fishers: parameter name to its block Fisher.
        num_grads: m.
        seconds: "gradients" and "fisher".
        plan: memory and passes.
        notes: what the user should know about the batches.
    """

    fishers: dict[str, GramFisher]
    num_grads: int
    seconds: dict[str, float]
    plan: Plan
    notes: list[str]


def check_counts(num_grads: int, block_size: int) -> None:
    """Raise ValueError for a number of gradients or a block size out of range."""
    if num_grads < 1:
        raise ValueError(f"num_grads must be at least 1, got {num_grads}")
    check_block_size(block_size)


def accumulate(
    model: nn.Module,
    batches: Iterable[Any],
    weights: Mapping[str, nn.Parameter],
    plan: Plan,
    *,
    num_grads: int,
    block_size: int,
    dtype: torch.dtype,
    loss_fn: LossFn | None,
    clock: Clock,
    progress: Progress,
) -> dict[str, GramFisher]:
    """Gather gradients of some matrices k at a time and add them to their Grams."""
    fishers = {
        name: GramFisher(w.numel(), block_size, dtype=dtype, device=w.device, name=name)
        for name, w in weights.items()
    }
    k = plan.gradients_per_update
    buffers = {
        name: gradient_buffer(k, w.numel(), w.dtype, w.device) for name, w in weights.items()
    }
    # A pruned weight has no gradient: its row and column stay zero.
    dead = {name: w.detach() == 0 for name, w in weights.items() if not w.detach().all()}
    gathered = 0

    def flush() -> None:
        with clock.stage("fisher"):
            for name, fisher in fishers.items():
                fisher.accumulate(buffers[name][:gathered])

    progress("gradients", 0, num_grads)
    with closing(batch_gradients(model, batches, weights, num_grads, loss_fn)) as source:
        for index in range(num_grads):
            with clock.stage("gradients"):
                for name, gradient in next(source).items():
                    row = buffers[name][gathered].view_as(gradient).copy_(gradient)
                    if name in dead:
                        row.masked_fill_(dead[name], 0)
            gathered += 1
            if gathered == k or index == num_grads - 1:
                flush()
                gathered = 0
            progress("gradients", index + 1, num_grads)
    return fishers


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_grads: int = 1024,
    block_size: int = 50,
    params: str | Iterable[str] | None = None,
    loss_fn: LossFn | None = None,
    fisher_dtype: torch.dtype = torch.float64,
    progress: Progress | None = None,
) -> FisherEstimate:
    """Estimate the block Fisher of a model's weight matrices from mini-batch gradients.

    The result serves :func:`prune` for several sparsities, dampings and rules.

    Args: as for :func:`prune`.

    Raises:
        ValueError, TypeError, MemoryError: as for :func:`prune`.
    """
    check_counts(num_grads, block_size)
    weights = find_weights(model, params)
    plan = plan_passes(weights, block_size, fisher_dtype, None, num_grads)
    clock = Clock()
    fishers = accumulate(
        model,
        batches,
        weights,
        plan,
        num_grads=num_grads,
        block_size=block_size,
        dtype=fisher_dtype,
        loss_fn=loss_fn,
        clock=clock,
        progress=progress or silent,
    )
    return FisherEstimate(
        fishers, num_grads, clock.seconds, plan, repetition_notes(batches, num_grads)
    )


def repetition_notes(batches: Iterable[Any] | None, num_grads: int) -> list[str]:
    """Say so when the same batches had to serve several times."""
    if isinstance(batches, Sized) and 0 < len(batches) < num_grads:
        return [
            f"{num_grads} gradients were taken from {len(batches)} batches, gone through "
            f"{num_grads / len(batches):.1f} times"
        ]
    return []
