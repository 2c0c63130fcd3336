"""Model and batches to the block Fishers of its weight matrices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import WIDE
from .batches import SplitBatches, how_many, samples_in, split_batch, take_batches
from .estimators import Estimator, estimators
from .fisher import Fisher
from .gradients import batch_gradients
from .group_gradients import GroupGradients, NotServed
from .layers import find_weights
from .losses import LossFn, default_loss
from .memory import Plan, gradient_buffers, plan_passes
from .patterns import UNSTRUCTURED, Pattern, find_pattern

# Batches, to find one with several samples.
_LOOKED_AT = 16

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


@dataclass
class Source:
    """Where gradients come from.

    Attributes:
        model: the model, in any mode.
        batches: iterable of batches.
        num_grads: m, gradients in all.
        loss_fn: as for :func:`prune`.
        pattern: the order of the weights in a gradient.
        group: samples per gradient where hooks give many gradients a batch; None: a batch gives
            one.
        notes: what the user should know about the batches.
        origin: the batches as they were given.
        used: batches taken so far.
        held: the batches are kept for several passes, and counted.
        kept_back: batches before them, which the damping is chosen on.
        unit: what messages call a batch.
    """

    model: nn.Module
    batches: Iterable[Any]
    num_grads: int
    loss_fn: LossFn | None
    pattern: Pattern
    group: int | None
    notes: list[str]
    origin: Iterable[Any]
    used: int = 0
    held: bool = False
    kept_back: int = 0
    unit: str = "batch"
    given: Iterable[Any] = field(init=False)

    def __post_init__(self) -> None:
        self.given = self.origin  # which is the pieces of the batches later, if they are cut

    def with_held_batches(self) -> Source:
        """The same for several passes, which see the same batches."""
        held: list[Any] = []
        grads = 0
        for batch in take_batches(self.batches):
            held.append(batch)
            grads += 1 if self.group is None else len(split_batch(batch, self.group))
            if grads >= self.num_grads:
                break
        self.used += len(held)
        return replace(self, batches=held, held=True)

    @property
    def next_batch(self) -> int:
        """Number of the batch that comes next, for messages."""
        taken = self.used
        if self.held and isinstance(self.batches, list):
            taken -= len(self.batches)
        return self.kept_back + taken

    def all_notes(self, estimates: int = 1) -> list[str]:
        """Notes, also on batches that had to serve several times, after so many estimates."""
        notes = list(dict.fromkeys(self.notes))
        if getattr(self.given, "reordered", False):
            notes.append(
                "the batches come in another order every time, so that the Fisher has seen those "
                "kept back for the damping: pass calibration, or a smaller num_grads"
            )
        count = how_many(self.origin)
        if not count or self.used <= count:
            return notes
        return [
            *notes,
            f"{self.num_grads * estimates} gradients were taken from {count} batches, gone through "
            f"{self.used / count:.1f} times",
        ]


def open_source(
    model: nn.Module,
    batches: Iterable[Any],
    weights: Mapping[str, nn.Parameter],
    num_grads: int,
    samples_per_grad: int | None,
    loss_fn: LossFn | None,
    pattern: Pattern = UNSTRUCTURED,
    *,
    goes_on: bool = False,
    kept_back: int = 0,
) -> Source:
    """Find out, on a batch, how gradients of ``samples_per_grad`` samples can be had.

    Args:
        model, batches, weights, num_grads, samples_per_grad, loss_fn: as for :func:`prune`.
        pattern: the order of the weights in a gradient.
        goes_on: there will be several estimates, each of which takes up the batches where the
            one before it left them.
        kept_back: batches before them, which are not for the Fisher.

    Raises:
        ValueError: batches are needed and cannot be cut into samples, or give no loss.
    """
    origin, seen = batches, []
    if samples_per_grad is not None:
        seen = _up_to_several_samples(batches)
        if isinstance(batches, Iterator):
            batches = chain(seen, batches)
    batches = take_batches(batches) if goes_on else batches
    source = Source(
        model, batches, num_grads, loss_fn, pattern, samples_per_grad, [], origin,
        kept_back=kept_back,
    )  # fmt: skip
    if samples_per_grad is None:
        return source
    try:
        groups = GroupGradients(model, weights, samples_per_grad, loss_fn, pattern=pattern)
        groups.check(seen[-1], f"batch {kept_back + len(seen) - 1}")
    except NotServed as error:
        source.notes.append(f"every gradient took a backward pass of its own: {error}")
        pieces = SplitBatches(source.batches, samples_per_grad)
        source.batches = iter(pieces) if isinstance(batches, Iterator) else pieces
        source.origin = pieces
        source.group = None
        source.unit, source.kept_back = f"{samples_per_grad} samples for the Fisher, number", 0
    return source


def _up_to_several_samples(batches: Iterable[Any]) -> list[Any]:
    """The first batches, up to one of several samples: of one alone nothing is to be told apart."""
    seen: list[Any] = []
    for batch in islice(batches, min(_LOOKED_AT, how_many(batches) or _LOOKED_AT)):
        seen.append(batch)
        if (samples_in(batch) or 2) > 1:
            break
    return seen or [next(take_batches(batches))]  # which raises


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
