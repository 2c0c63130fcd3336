"""The sub-steps of one pruning step: Fisher -> masks -> weights, in passes over the matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from ..fisher.base import Fisher, came_back
from ..fisher.estimate import Estimation, FisherEstimate
from ..fisher.memory import MemoryPlan
from ..progress import Progress
from .fitting import Fit, Fitting
from .predictions import Calibration
from .prunings import FisherPasses, Pruning, find_damping, prune_with
from .report import DampingTrial
from .step import Changes, PruningStep
from .weights import commit, present_masks


class SubStep(NamedTuple):
    """What a sub-step did.

    Attributes:
        masks: of all matrices, flat in the order of the pattern.
        increase: predicted loss increase by matrix; None without an update.
        damping: of the Fisher, if there was one.
        trials: by which it was chosen.
        plan: memory and passes, if there was a Fisher.
        fit: of the remaining weights to what the dense model computes.
    """

    masks: dict[str, Tensor]
    increase: dict[str, float | None]
    damping: float | None = None
    trials: list[DampingTrial] = []  # noqa: RUF012  (never changed)
    plan: MemoryPlan | None = None
    fit: Fit | None = None

    @property
    def relative_damping(self) -> float | None:
        """The damping over the mean diagonal of the Fisher, if trials chose it."""
        return next((trial.relative for trial in self.trials if trial.chosen), None)


@dataclass
class DampingChoice:
    """The damping of a sub-step: a number, or what trials choose.

    Attributes:
        value: the number, once it is known.
        calibration: what trials are judged on.
        start: where their search begins, over the mean diagonal.
        trials: those done.
    """

    value: float | None
    calibration: Calibration | None = None
    start: float | None = None
    trials: list[DampingTrial] = field(default_factory=list)

    def prune(self, step: PruningStep, fishers: FisherPasses, held: int = 0) -> Pruning:
        """Prune with the damping, chosen now if it is not known yet; nothing is written."""
        known = None
        if self.value is None:
            assert self.calibration is not None
            self.value, self.trials, known = find_damping(
                step, fishers, self.calibration, self.start, held
            )
        pruning = known or prune_with(step, fishers, [self.value])[0]
        if pruning.error is not None:
            raise pruning.error
        return pruning

    def next(self, done: list[SubStep]) -> DampingChoice:
        """That of a further sub-step, whose search begins where the last one ended."""
        if self.calibration is None:
            return self
        start = done[-1].relative_damping if done else self.start
        return DampingChoice(None, self.calibration, start)


def without_fisher(step: PruningStep) -> SubStep:
    """Prune by a saliency that needs none, or nothing."""
    masks = step.masks(step.score({}, None)) if step.prunes_anything else dict(step.keep)
    return SubStep(masks, _write(step, step.update(None, masks, None)))


def _write(step: PruningStep, changes: Changes) -> dict[str, float | None]:
    """Write the new weights; return the predicted increase by matrix.  ``changes`` is used up."""
    unchanged = None if step.config.update == "none" else 0.0
    increase = {name: changes[name][1] if name in changes else unchanged for name in step.weights}
    new = {name: changes.pop(name)[0] for name in list(changes)}
    commit(step.weights, new, step.rollback)
    return increase


def _finish(
    step: PruningStep, pruning: Pruning, damping: DampingChoice, plan: MemoryPlan
) -> SubStep:
    """Write what a pruning has come to."""
    increase = _write(step, pruning.changes)
    return SubStep(pruning.masks, increase, pruning.damping, damping.trials, plan)


def from_estimate(step: PruningStep, estimate: FisherEstimate, damping: DampingChoice) -> SubStep:
    """Prune with Fishers that are all there.

    Raises:
        ValueError: weights are back that had no part in the estimate.
    """
    for name, zeros in estimate.zeros.items():
        if name in step.weights and bool((step.flat_weight(name)[zeros] != 0).any()):
            raise came_back(name)
    known = {name: estimate.fishers[name] for name in step.weights}
    fishers = FisherPasses([list(known)], lambda names: known, step.weights)
    return _finish(step, damping.prune(step, fishers), damping, estimate.plan)


def fitted(step: PruningStep, done: SubStep, fitting: Fitting | None) -> SubStep:
    """The sub-step with what remains fitted to the dense model, if it is to be."""
    return done if fitting is None else done._replace(fit=fitting.after(step, done.masks))


def in_steps(
    step: PruningStep,
    one_step: Callable[[PruningStep, list[SubStep]], SubStep],
    fitting: Fitting | None = None,
) -> list[SubStep]:
    """Prune in the sub-steps of the configuration.

    Args:
        step: the whole of it.
        one_step: prunes in one; also gets those done.
        fitting: of the remaining weights, after each.
    """
    steps = step.config.steps
    done: list[SubStep] = []
    for index, sparsity in enumerate(step.sub_sparsities()):
        here = replace(
            step,
            keep=present_masks(step.weights, step.pattern) if done else step.keep,
            sparsity=sparsity,
            progress=_numbered(step.progress, index, steps),
        )
        if here.prunes_anything:
            done.append(fitted(here, one_step(here, done), fitting))
    return done


def _numbered(progress: Progress, index: int, steps: int) -> Progress:
    if steps == 1:
        return progress
    return lambda stage, done, total: progress(f"{index + 1}/{steps} {stage}", done, total)


def with_estimate(
    step: PruningStep, estimation: Estimation, plan: MemoryPlan, damping: DampingChoice
) -> SubStep:
    """Estimate Fishers from further batches, and prune with them."""
    source = estimation.source
    held = None
    if len(plan.passes) > 1:
        held = source.hold(estimation.config.num_grads, estimation.samples)

    def estimate(names: list[str]) -> dict[str, Fisher]:
        weights = {name: step.weights[name] for name in names}
        batches = None if held is None else source.again(held)
        return estimation.accumulate(weights, plan, step.clock, step.progress, batches)

    fishers = FisherPasses(plan.passes, estimate, step.weights)
    pruning = damping.prune(step, fishers, plan.trials_held)
    if fishers.note:
        source.notes.append(fishers.note)
    return _finish(step, pruning, damping, plan)
