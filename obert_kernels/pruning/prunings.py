"""Masks and new weights at one damping or several, in passes over the matrices.

A pass holds the Fishers of some of the matrices.  Estimating them takes most of the time, so that
several dampings share each pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..fisher.base import Fisher
from ..fisher.estimate import note_on_zero_gradients
from ..ops.status import NumericalError
from ..progress import Clock, silent
from ..sparsity.values import replaced
from .damping import choose_damping, mean_diagonal
from .predictions import Calibration
from .report import DampingTrial
from .step import Changes, PruningStep


class FisherPasses:
    """Fishers of all matrices; those of one pass exist at a time.

    Args:
        passes: names of the matrices of each.
        estimate: returns the Fishers of a pass.
        weights: name to matrix.

    Attributes:
        mean_squares: of each matrix that has been estimated, :meth:`Fisher.mean_squares`.
        note: what the user should know about them.
    """

    def __init__(
        self,
        passes: list[list[str]],
        estimate: Callable[[list[str]], dict[str, Fisher]],
        weights: Mapping[str, nn.Parameter],
    ) -> None:
        self.note: str | None = None
        self._weights = weights
        self._passes = list(passes)
        self._estimate = estimate
        self._at_hand: dict[str, Fisher] = {}
        self.mean_squares: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._passes)

    def sweep(
        self, is_wanted: Callable[[list[str]], bool] = lambda names: True
    ) -> Iterator[Mapping[str, Fisher]]:
        """Go through the passes, beginning with the one at hand.

        Raises:
            ValueError: at the end, if no gradient of any matrix was other than zero.
        """
        for names in filter(is_wanted, self._passes):
            if list(self._at_hand) != names:
                self._at_hand.clear()  # frees the Grams of the pass before
                self._at_hand.update(self._estimate(names))
            for name in names:
                if name not in self.mean_squares:
                    self.mean_squares[name] = self._at_hand[name].mean_squares()
            yield self._at_hand
        self._passes.reverse()
        self.note = note_on_zero_gradients(self.mean_squares, self._weights)


@dataclass
class Pruning:
    """What pruning with a damping comes to; nothing is written yet.

    Attributes:
        damping: of the Fishers.
        masks: of all matrices, flat in the order of the pattern.
        changes: of the matrices that anything is pruned in.
        error: why it came to nothing.
    """

    damping: float
    masks: dict[str, Tensor] = field(default_factory=dict)
    changes: Changes = field(default_factory=dict)
    error: NumericalError | None = None

    def go_on(self, work: Callable[..., object], *arguments: object) -> None:
        """Do some of the work, unless an earlier part of it has failed."""
        if self.error is not None:
            return
        try:
            work(self, *arguments)
        except NumericalError as error:
            self.error = error.with_traceback(None)  # which would hold on to a Gram
            self.masks.clear()
            self.changes.clear()


def prune_with(step: PruningStep, fishers: FisherPasses, dampings: list[float]) -> list[Pruning]:
    """Prune with each of the dampings, all of them in the same passes."""
    found = [Pruning(damping) for damping in dampings]
    if step.ranks_each_layer_alone:
        _each_alone(step, fishers, found)
    else:
        _all_together(step, fishers, found)
    return found


def _each_alone(step: PruningStep, fishers: FisherPasses, found: list[Pruning]) -> None:
    """Score, select and update matrix by matrix; passes with nothing to prune are left out."""

    def prune(one: Pruning, here: Mapping[str, Fisher]) -> None:
        part = step.part(here)
        masks = part.masks(part.score(here, one.damping))
        one.masks |= masks
        one.changes |= part.update(here, masks, one.damping)

    for one in found:
        one.masks |= step.keep
    for here in fishers.sweep(lambda names: step.part(names).prunes_anything):
        for one in found:
            one.go_on(prune, here)
        if all(one.error for one in found):
            return


def _all_together(step: PruningStep, fishers: FisherPasses, found: list[Pruning]) -> None:
    """One ranking over all matrices needs every score before the first update: two sweeps."""
    scores: dict[float, dict[str, Tensor]] = {one.damping: {} for one in found}

    def score(one: Pruning, here: Mapping[str, Fisher]) -> None:
        scores[one.damping] |= step.score(here, one.damping)

    def select(one: Pruning) -> None:
        one.masks = step.masks(scores.pop(one.damping))

    def update(one: Pruning, here: Mapping[str, Fisher]) -> None:
        masks = {name: one.masks[name] for name in here}
        one.changes |= step.update(here, masks, one.damping)

    def leave_out(one: Pruning) -> None:
        one.changes |= step.update(None, one.masks, one.damping)

    for here in fishers.sweep():
        for one in found:
            one.go_on(score, here)
        if all(one.error for one in found):
            return
    for one in found:
        one.go_on(select)
    if step.config.update == "none":
        for one in found:
            one.go_on(leave_out)
        return
    for here in fishers.sweep():
        for one in found:
            one.go_on(update, here)
        if all(one.error for one in found):
            return


def find_damping(
    step: PruningStep,
    fishers: FisherPasses,
    calibration: Calibration,
    start: float | None,
    held: int,
) -> tuple[float, list[DampingTrial], Pruning | None]:
    """Choose the damping by trial prunings of all matrices; weights are put back after each.

    Args:
        step: what is to be pruned.
        fishers: of its matrices.
        calibration: what the trials are judged on.
        start: where the search begins, over the mean diagonal of the Fisher.
        held: where there are several passes, trials there is room for: the best so far, and those
            that are made in the same passes as the one at work.

    Returns:
        The damping, all trials, and what pruning with it comes to where it would take several
        passes to have that again, and there was room to keep it.
    """
    trial = replace(step, clock=Clock(), progress=silent)
    held = held if len(fishers) > 1 else 0
    made: dict[float, Pruning] = {}
    best: list[tuple[float, Pruning]] = []  # with its cost; one or none

    def prepare(dampings: list[float]) -> None:
        made.clear()
        made.update((one.damping, one) for one in prune_with(trial, fishers, dampings))

    def change_after(damping: float) -> tuple[float, float | None]:
        one = made.pop(damping)
        if one.error is not None:
            raise one.error
        new = {name: value for name, (value, _) in one.changes.items()}
        with replaced(step.weights, new):
            loss, moved = calibration.change()
        cost = loss if moved is None else moved
        if held and math.isfinite(cost) and (not best or cost < best[0][0]):
            best[:] = [(cost, one)]
        return loss, moved

    def tried(count: int) -> None:
        step.progress("damping", count, count + 1)

    with step.clock.stage("damping"):
        _ = calibration.before  # of the model as it is, before the first trial
        for _ in fishers.sweep():
            pass  # the scale is that of all matrices
        squares = {name: fishers.mean_squares[name] for name in step.weights}  # in model order
        scale = mean_diagonal(squares, step.keep)
        chosen, trials = choose_damping(
            scale, change_after, tried, start, at_once=max(1, held), prepare=prepare
        )
    step.progress("damping", len(trials), len(trials))
    kept = next((one for _, one in best if one.damping == chosen), None)
    return chosen, trials, kept
