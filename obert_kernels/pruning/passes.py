"""The sub-steps of one pruning step: Fisher -> masks -> weights, in passes over the matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor

from ..fisher.base import Fisher, came_back
from ..fisher.estimate import Estimation, FisherEstimate
from ..fisher.memory import MemoryPlan
from ..progress import Progress
from .predictions import Calibration
from .report import DampingTrial
from .step import Changes, PruningStep
from .weights import commit, present_masks, restored


class SubStep(NamedTuple):
    """What a sub-step did.

    Attributes:
        masks: of all matrices, flat in the order of the pattern.
        increase: predicted loss increase by matrix; None without an update.
        damping: of the Fisher, if there was one.
        trials: by which it was chosen.
        plan: memory and passes, if there was a Fisher.
    """

    masks: dict[str, Tensor]
    increase: dict[str, float | None]
    damping: float | None = None
    trials: list[DampingTrial] = []  # noqa: RUF012  (never changed)
    plan: MemoryPlan | None = None

    @property
    def relative_damping(self) -> float | None:
        """The damping over the mean diagonal of the Fisher, if trials chose it."""
        return next((trial.relative for trial in self.trials if trial.chosen), None)


@dataclass
class DampingChoice:
    """The damping of a sub-step: a number, or what trials on its first matrices choose.

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

    def settle(self, step: PruningStep, fishers: Mapping[str, Fisher]) -> float:
        """Return the damping, chosen now if it is not known yet."""
        if self.value is None:
            assert self.calibration is not None
            self.value, self.trials = step.find_damping(fishers, self.calibration, self.start)
        return self.value

    def next(self, done: list[SubStep]) -> DampingChoice:
        """That of a further sub-step, whose search begins where the last one ended."""
        if self.calibration is None:
            return self
        start = done[-1].relative_damping if done else self.start
        return DampingChoice(None, self.calibration, start)


def _finish(
    step: PruningStep,
    masks: dict[str, Tensor],
    changes: Changes,
    damping: DampingChoice | None = None,
    plan: MemoryPlan | None = None,
) -> SubStep:
    """Write the new weights."""
    commit(step.weights, {name: new for name, (new, _) in changes.items()})
    increase = {name: predicted for name, (_, predicted) in changes.items()}
    if damping is None:
        return SubStep(masks, increase)
    return SubStep(masks, increase, damping.value, damping.trials, plan)


def without_fisher(step: PruningStep) -> SubStep:
    """Prune by a saliency that needs none, or nothing."""
    masks = step.masks(step.score({}, None)) if step.prunes_anything else dict(step.keep)
    return _finish(step, masks, step.update(None, masks, None))


def from_estimate(step: PruningStep, estimate: FisherEstimate, damping: DampingChoice) -> SubStep:
    """Prune with Fishers that are all there.

    Raises:
        ValueError: weights are back that had no part in the estimate.
    """
    for name, zeros in estimate.zeros.items():
        if name in step.weights and bool((step.flat_weight(name)[zeros] != 0).any()):
            raise came_back(name)
    fishers = {name: estimate.fishers[name] for name in step.weights}
    return _finish(step, *_select_and_update(step, fishers, damping), damping, estimate.plan)


def _select_and_update(
    step: PruningStep, fishers: Mapping[str, Fisher], damping: DampingChoice
) -> tuple[dict[str, Tensor], Changes]:
    """Damping, masks and new weights of matrices that are ranked by themselves."""
    value = damping.settle(step, fishers)
    masks = step.masks(step.score(fishers, value))
    return masks, step.update(fishers, masks, value)


def in_steps(
    step: PruningStep, one_step: Callable[[PruningStep, list[SubStep]], SubStep]
) -> list[SubStep]:
    """Prune in the sub-steps of the configuration; a failure in any leaves the weights as before
    all of them.

    Args:
        step: the whole of it.
        one_step: prunes in one; also gets those done.
    """
    steps = step.config.steps
    done: list[SubStep] = []
    # The last thing a single sub-step does is writing its weights, all or none.
    guard = restored(step.weights, after_errors_only=True) if steps > 1 else nullcontext()
    with guard:
        for index, sparsity in enumerate(step.sub_sparsities()):
            here = replace(
                step,
                keep=present_masks(step.weights, step.pattern) if done else step.keep,
                sparsity=sparsity,
                progress=_numbered(step.progress, index, steps),
            )
            if here.prunes_anything:
                done.append(one_step(here, done))
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

    return _finish(step, *_in_passes(step, plan, estimate, damping), damping, plan)


def _in_passes(
    step: PruningStep,
    plan: MemoryPlan,
    estimate: Callable[[list[str]], dict[str, Fisher]],
    damping: DampingChoice,
) -> tuple[dict[str, Tensor], Changes]:
    """Score and update pass by pass, holding the Grams of one pass at a time.

    One ranking over all matrices needs every score before the first update, so the passes
    are run again for the updates, all but the last, whose Grams are still there.
    """
    masks: dict[str, Tensor] = {}
    changes: Changes = {}
    has_update = step.config.update != "none"
    if step.ranks_each_layer_alone:
        for names in plan.passes:
            part = step.part(names)
            if not part.prunes_anything:  # nor is there anything to choose a damping by
                masks |= part.keep
                changes |= {
                    name: (weight.detach().clone(), 0.0 if has_update else None)
                    for name, weight in part.weights.items()
                }
                continue
            found, changed = _select_and_update(part, estimate(names), damping)
            masks |= found
            changes |= changed
        return masks, changes
    scores: dict[str, Tensor] = {}
    fishers: dict[str, Fisher] = {}
    value = None
    # The damping is chosen on the first, which must not be pruned enough already.
    passes = sorted(plan.passes, key=lambda names: not step.part(names).prunes_anything)
    for names in passes:
        fishers.clear()  # frees the Grams of the pass before
        fishers.update(estimate(names))
        value = damping.settle(step, fishers)
        scores |= step.score(fishers, value)
    masks = step.masks(scores)
    scores.clear()
    for index, names in enumerate(reversed(passes)):
        if index > 0 and has_update:
            fishers.clear()
            fishers.update(estimate(names))
        part_masks = {name: masks[name] for name in names}
        changes |= step.update(fishers if has_update else None, part_masks, value)
    return masks, {name: changes[name] for name in step.weights}
