"""Choosing the damping by what a trial pruning does to the model.

The best damping moves with the number of gradients, the samples in each, the model and the
sparsity, by orders of magnitude; a few batches that the Fisher has not seen say which it is.  The
search starts from the scale of the Fisher itself.

What counts is how far the predictions have moved (:mod:`obert_kernels.predictions`), which is what
the Fisher predicts.  The loss follows it only where pruning does damage: before that it is lowered
by whatever makes a model less sure of its mistakes, and too large a damping does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .batches import how_many, samples_in, take_batches, tensors_in
from .fisher import Fisher
from .ops import NumericalError

# Damping over the mean diagonal of the Fisher: where to start, and the ends of the search.
_START = 1e-2
_LEAST, _MOST = 1e-6, 1e2
# Samples that a trial is judged on, unless the batches given are fewer than four times that.
_SAMPLES = 256


class Trial(NamedTuple):
    """One trial pruning.

    Attributes:
        damping: tried.
        relative: damping over the mean diagonal of the Fisher.
        loss: mean loss of the calibration batches afterwards; infinite if the Fisher was not
            positive definite.
        divergence: of the predictions from those of before, in nats a sample; None where the
            model does not classify, and the loss decides.
        step: 1 for the first sub-step.
        chosen: it is the one.
    """

    damping: float
    relative: float
    loss: float
    divergence: float | None = None
    step: int = 1
    chosen: bool = False

    @property
    def cost(self) -> float:
        """What the chosen one has the least of."""
        return self.loss if self.divergence is None else self.divergence


def mean_diagonal(fishers: Mapping[str, Fisher], keep: Mapping[str, Tensor]) -> float:
    """Mean square of a weight's gradients, over all weights that are left."""
    living = sum(int(keep[name].sum()) for name in fishers)
    return sum(fisher.mean_squares() for fisher in fishers.values()) / max(1, living)


def choose_damping(
    scale: float,
    change_after: Callable[[float], tuple[float, float | None]],
    tried: Callable[[int], object],
    start: float | None = None,
) -> tuple[float, list[Trial]]:
    """Find the damping with the least cost, downhill in steps of the root of 10.

    The divergence has one minimum there (seen on TREC, 60 to 90 % sparsity), for gradients of
    predictions within two steps of the start: three to five trials.

    Args:
        scale: :func:`mean_diagonal` of the Fisher.
        change_after: loss and divergence after pruning with a damping.
        tried: called with the number of trials so far.
        start: damping over ``scale`` to begin with.

    Returns:
        The best damping and all trials, by damping.

    Raises:
        NumericalError: the Fisher was never positive definite, or the model's output never finite.
    """
    scale = scale if 0 < scale < math.inf else 1.0
    start = min(max(start or _START, _LEAST), _MOST)
    trials: dict[int, Trial] = {}  # by half-decades from the start
    last_error: NumericalError | None = None

    def cost_at(step: int) -> float:
        nonlocal last_error
        relative = start * 10 ** (step / 2)
        if step not in trials:
            try:
                change = change_after(relative * scale)
            except NumericalError as error:
                change, last_error = (math.inf, None), error
            trials[step] = Trial(relative * scale, relative, *map(_or_infinite, change))
            tried(len(trials))
        return trials[step].cost

    def inside(step: int) -> bool:
        return _LEAST / 1.001 <= start * 10 ** (step / 2) <= _MOST * 1.001

    best = 0
    while not math.isfinite(cost_at(best)) and inside(best + 1):
        best += 1  # not positive definite: too little
    while True:
        neighbours = filter(inside, (best - 1, best + 1))
        better = min([best, *neighbours], key=cost_at)
        if better == best:
            break
        best = better
    if not math.isfinite(cost_at(best)):
        raise last_error or NumericalError(
            f"no damping from {_LEAST:g} to {_MOST:g} times the mean diagonal of the Fisher keeps "
            "the model's output finite: prune less, or pass a number as damping"
        )
    trials[best] = trials[best]._replace(chosen=True)
    return trials[best].damping, [trials[step] for step in sorted(trials)]


def _or_infinite(value: float | None) -> float | None:
    return value if value is None or math.isfinite(value) else math.inf


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
