"""Choosing the damping by what a trial pruning does to the model.

The best damping moves with the number of gradients, the samples in each, the model and the
sparsity, by orders of magnitude; a few batches that the Fisher has not seen say which it is.  The
search starts from the scale of the Fisher itself.

What counts is how far the predictions have moved (:mod:`obert_kernels.pruning.predictions`),
which is what the Fisher predicts.  The loss follows it only where pruning does damage: before that
it is lowered by whatever makes a model less sure of its mistakes, and too large a damping does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from torch import Tensor

from ..ops.status import NumericalError
from .report import DampingTrial

# Damping over the mean diagonal of the Fisher: where to start, and the ends of the search.
_START = 1e-2
_LEAST, _MOST = 1e-6, 1e2


def mean_diagonal(mean_squares: Mapping[str, float], keep: Mapping[str, Tensor]) -> float:
    """Mean square of a weight's gradients, over all weights that are left.

    Args:
        mean_squares: of each matrix, :meth:`Fisher.mean_squares`.
        keep: name to present mask.
    """
    remaining = sum(int(keep[name].sum()) for name in mean_squares)
    return sum(mean_squares.values()) / max(1, remaining)


def choose_damping(
    scale: float,
    change_after: Callable[[float], tuple[float, float | None]],
    tried: Callable[[int], object],
    start: float | None = None,
    *,
    at_once: int = 1,
    prepare: Callable[[list[float]], object] = lambda dampings: None,
) -> tuple[float, list[DampingTrial]]:
    """Find the damping with the least cost, downhill in steps of the root of 10.

    The divergence has one minimum there (seen on TREC, 60 to 90 % sparsity), for gradients of
    predictions within two steps of the start: three to five trials.

    Args:
        scale: :func:`mean_diagonal` of the Fisher.
        change_after: loss and divergence after pruning with a damping.
        tried: called with the number of trials so far.
        start: damping over ``scale`` to begin with.
        at_once: dampings that are cheaper to prepare together.
        prepare: called with the next one and up to ``at_once - 1`` of those that may follow it.

    Returns:
        The best damping and all trials, by damping.  They do not depend on ``at_once``.

    Raises:
        NumericalError: the Fisher was never positive definite, or the model's output never finite.
    """
    scale = scale if 0 < scale < math.inf else 1.0
    start = min(max(start or _START, _LEAST), _MOST)
    trials: dict[int, DampingTrial] = {}  # by half-decades from the start
    prepared: list[int] = []
    last_error: NumericalError | None = None

    def relative(step: int) -> float:
        return start * 10 ** (step / 2)

    def inside(step: int) -> bool:
        return _LEAST / 1.001 <= relative(step) <= _MOST * 1.001

    def with_followers(step: int) -> list[int]:
        if not trials:
            likely = [step, step - 1, step + 1]
        else:
            ahead = 1 if step - 1 in trials else -1
            likely = [step + ahead * further for further in range(at_once)]
        return [near for near in likely if inside(near) and near not in trials][:at_once]

    def cost_at(step: int) -> float:
        nonlocal last_error, prepared
        if step not in trials:
            if step not in prepared:
                prepared = with_followers(step)
                prepare([relative(near) * scale for near in prepared])
            damping = relative(step) * scale
            try:
                change = change_after(damping)
            except NumericalError as error:
                change, last_error = (math.inf, None), error
            loss, moved = change
            moved = None if moved is None else _or_infinite(moved)
            trials[step] = DampingTrial(damping, relative(step), _or_infinite(loss), moved)
            tried(len(trials))
        return trials[step].cost

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


def _or_infinite(value: float) -> float:
    return value if math.isfinite(value) else math.inf
