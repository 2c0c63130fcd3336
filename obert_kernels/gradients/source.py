"""Where gradients come from: batches with a position, some of them kept back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from ..sparsity.patterns import UNSTRUCTURED, Pattern
from .batches import SplitBatches, how_many, samples_in, split_batch, take_batches, tensors_in
from .losses import LossFn
from .per_samples import GroupGradients, NotServed

# Batches, to find one with several samples.
_LOOKED_AT = 16


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


# Samples that a trial is judged on, unless the batches given are fewer than four times that.
_SAMPLES = 256


class _Rest(Iterator[Any]):
    """The batches after those held out, without end: first what is left of the pass that these came
    from, as a loader that shuffles has another order in the next.

    Attributes:
        reordered: it had.
    """

    def __init__(
        self, batches: Iterable[Any], under_way: Iterator[Any], held: Sequence[Any]
    ) -> None:
        self._batches, self._held = batches, held
        self._next = self._go_on(under_way)
        self.reordered = False

    def _go_on(self, under_way: Iterator[Any]) -> Iterator[Any]:
        yield from under_way
        while True:
            some = False
            for index, batch in enumerate(self._batches):
                if index == 0:
                    self.reordered |= not _are_equal(batch, self._held[0])
                if index >= len(self._held):
                    some = True
                    yield batch
            if not some:
                return

    def __next__(self) -> Any:
        return next(self._next)

    def __len__(self) -> int:
        """Of one pass; raises TypeError where the batches have no length."""
        return len(self._batches) - len(self._held)  # type: ignore[arg-type]


def _are_equal(first: Any, second: Any) -> bool:
    ours, theirs = tensors_in(first), tensors_in(second)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def hold_out(batches: Iterable[Any]) -> tuple[list[Any], Iterable[Any], list[str]]:
    """Take the first batches, some 256 samples or a quarter, from those for the gradients.

    Returns:
        The batches held out, the rest, and notes.

    Raises:
        ValueError: there are no batches, or none would be left.
    """
    count = how_many(batches)
    most = _SAMPLES if count is None else max(1, count // 4)
    source = iter(batches)
    held: list[Any] = []
    samples = 0
    for batch in source:
        held.append(batch)
        samples += samples_in(batch) or 1
        if samples >= _SAMPLES or len(held) >= most:
            break
    if not held:
        next(take_batches(batches))  # raises, with the reason
    if isinstance(batches, Sequence):
        if len(batches) > len(held):
            return held, batches[len(held) :], []
    elif (first := next(source, None)) is not None:
        under_way = chain([first], source)
        is_used_up = isinstance(batches, Iterator)
        return held, under_way if is_used_up else _Rest(batches, under_way, held), []
    elif isinstance(batches, Iterator):
        raise ValueError(
            f"all {len(held)} batches ({samples} samples) were kept back to choose the damping on, "
            "and none is left for gradients: pass more batches, calibration= or a number as damping"
        )
    return held, batches, ["the damping was chosen on the batches the Fisher was estimated from"]
