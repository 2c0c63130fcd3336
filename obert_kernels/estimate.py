"""Model and batches to the block Fishers of its weight matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_block_size
from .fisher import GramFisher
from .gradients import LossFn, batch_gradients, take_batches
from .group_gradients import GroupGradients, NotServed, SplitBatches, split_batch
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

    @contextmanager
    def stage_without(self, name: str, inner: str) -> Iterator[None]:
        """Time the body, less what stage ``inner`` takes in it."""
        before = self.seconds.get(inner, 0.0)
        with self.stage(name):
            yield
        self.seconds[name] -= self.seconds.get(inner, 0.0) - before


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
        samples_per_grad: as given; None: one batch each.
    """

    fishers: dict[str, GramFisher]
    num_grads: int
    seconds: dict[str, float]
    plan: Plan
    notes: list[str]
    samples_per_grad: int | None = None


def check_counts(num_grads: int, block_size: int, samples_per_grad: int | None) -> None:
    """Raise ValueError for a number of gradients or samples or a block size out of range."""
    if num_grads < 1:
        raise ValueError(f"num_grads must be at least 1, got {num_grads}")
    if samples_per_grad is not None and samples_per_grad < 1:
        raise ValueError(f"samples_per_grad must be at least 1, or None, got {samples_per_grad}")
    check_block_size(block_size)


@dataclass
class Source:
    """Where gradients come from.

    Attributes:
        model: the model, in any mode.
        batches: iterable of batches.
        num_grads: m, gradients in all.
        loss_fn: as for :func:`prune`.
        group: samples per gradient where hooks give many gradients a batch; None: a batch gives
            one.
        notes: what the user should know about the batches.
    """

    model: nn.Module
    batches: Iterable[Any]
    num_grads: int
    loss_fn: LossFn | None
    group: int | None
    notes: list[str]

    def hold_batches(self) -> None:
        """Keep the batches, so that several passes see the same."""
        if self.group is None:
            self.batches = list(take_batches(self.batches, self.num_grads))
            return
        held, grads = [], 0
        for batch in take_batches(self.batches):
            held.append(batch)
            grads += len(split_batch(batch, self.group))
            if grads >= self.num_grads:
                break
        self.note_repetition(len(held))
        self.batches = held

    def note_repetition(self, used: int) -> None:
        """Note that ``used`` batches are more than there are."""
        self.notes += repetition_notes(self.batches, used, self.num_grads)


def open_source(
    model: nn.Module,
    batches: Iterable[Any],
    weights: Mapping[str, nn.Parameter],
    num_grads: int,
    samples_per_grad: int | None,
    loss_fn: LossFn | None,
) -> Source:
    """Find out, on the first batch, how gradients of ``samples_per_grad`` samples can be had.

    Raises:
        ValueError: batches are needed and cannot be cut into samples, or give no loss.
    """
    if samples_per_grad is None:
        notes = repetition_notes(batches, num_grads, num_grads)
        return Source(model, batches, num_grads, loss_fn, None, notes)
    if isinstance(batches, Iterator):
        first = next(take_batches(batches))
        batches = chain([first], batches)
    else:
        first = next(take_batches(batches))
    try:
        GroupGradients(model, weights, samples_per_grad, loss_fn).check(first)
    except NotServed as error:
        notes = [f"every gradient took a backward pass of its own: {error}"]
        pieces = SplitBatches(batches, samples_per_grad)
        source = iter(pieces) if isinstance(batches, Iterator) else pieces
        return Source(model, source, num_grads, loss_fn, None, notes)
    return Source(model, batches, num_grads, loss_fn, samples_per_grad, [])


def accumulate(
    source: Source,
    weights: Mapping[str, nn.Parameter],
    plan: Plan,
    *,
    block_size: int,
    dtype: torch.dtype,
    clock: Clock,
    progress: Progress,
) -> dict[str, GramFisher]:
    """Add the gradients of some matrices to their Grams."""
    fishers = {
        name: GramFisher(w.numel(), block_size, dtype=dtype, device=w.device, name=name)
        for name, w in weights.items()
    }
    # A pruned weight has no gradient: its row and column stay zero.
    dead = {name: w.detach().flatten() == 0 for name, w in weights.items() if not w.detach().all()}
    add_all = _gather if source.group is None else _stream
    progress("gradients", 0, source.num_grads)
    add_all(source, weights, plan, fishers, dead, clock, progress)
    return fishers


def _gather(
    source: Source,
    weights: Mapping[str, nn.Parameter],
    plan: Plan,
    fishers: Mapping[str, GramFisher],
    dead: Mapping[str, Tensor],
    clock: Clock,
    progress: Progress,
) -> None:
    """One gradient a batch, k of them gathered before they are added."""
    k = plan.gradients_per_update
    buffers = {
        name: gradient_buffer(k, w.numel(), w.dtype, w.device) for name, w in weights.items()
    }
    gathered = 0
    with closing(
        batch_gradients(source.model, source.batches, weights, source.num_grads, source.loss_fn)
    ) as gradients:
        for index in range(source.num_grads):
            with clock.stage("gradients"):
                for name, gradient in next(gradients).items():
                    row = buffers[name][gathered].copy_(gradient.flatten())
                    if name in dead:
                        row.masked_fill_(dead[name], 0)
            gathered += 1
            if gathered == k or index == source.num_grads - 1:
                with clock.stage("fisher"):
                    for name, fisher in fishers.items():
                        fisher.accumulate(buffers[name][:gathered])
                gathered = 0
            progress("gradients", index + 1, source.num_grads)


def _stream(
    source: Source,
    weights: Mapping[str, nn.Parameter],
    plan: Plan,
    fishers: Mapping[str, GramFisher],
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
        source.model, weights, source.group, source.loss_fn, plan.gradients_per_update
    )
    used = 0
    with (
        closing(groups.run(source.batches, source.num_grads, add)) as run,
        clock.stage_without("gradients", "fisher"),
    ):
        for done in run:
            used += 1
            progress("gradients", done, source.num_grads)
    source.note_repetition(used)


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_grads: int = 1024,
    samples_per_grad: int | None = None,
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
    check_counts(num_grads, block_size, samples_per_grad)
    weights = find_weights(model, params)
    source = open_source(model, batches, weights, num_grads, samples_per_grad, loss_fn)
    plan = plan_passes(
        weights, block_size, fisher_dtype, None, num_grads, streamed=source.group is not None
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
    )
    return FisherEstimate(fishers, num_grads, clock.seconds, plan, source.notes, samples_per_grad)


def repetition_notes(batches: Iterable[Any], used: int, num_grads: int) -> list[str]:
    """Say so when the same batches had to serve several times."""
    if isinstance(batches, Sized) and 0 < len(batches) < used:
        return [
            f"{num_grads} gradients were taken from {len(batches)} batches, gone through "
            f"{used / len(batches):.1f} times"
        ]
    return []
