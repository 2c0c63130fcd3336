"""The sub-steps of one pruning call: Fisher -> masks -> weights, in passes over the matrices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..fisher.base import Fisher, came_back
from ..fisher.estimate import FisherEstimate, accumulate
from ..fisher.estimators import Estimator
from ..fisher.memory import Plan, plan_passes
from ..gradients.source import Source
from ..progress import Progress
from .report import Trial
from .step import Changes, Job
from .weights import commit, present_masks


class Step(NamedTuple):
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
    damping: float | None
    trials: list[Trial]
    plan: Plan | None


@dataclass(frozen=True)
class Limits:
    """Kind, size and type of the Fisher, the memory it may take (None: what is free), and whether
    the weights of before are kept."""

    estimator: Estimator
    block_size: int
    dtype: torch.dtype
    max_memory: int | None
    keeps_weights: bool = False


def _finish(job: Job, masks: dict[str, Tensor], changes: Changes, plan: Plan | None) -> Step:
    """Write the new weights."""
    commit(job.weights, {name: new for name, (new, _) in changes.items()})
    increase = {name: predicted for name, (_, predicted) in changes.items()}
    damping = None if plan is None else job.damping
    return Step(masks, increase, damping, job.trials, plan)


def without_fisher(job: Job) -> Step:
    """Prune by a saliency that needs none, or nothing."""
    masks = job.masks(job.score({})) if job.prunes_anything else dict(job.keep)
    return _finish(job, masks, job.apply(None, masks), None)


def from_estimate(job: Job, estimate: FisherEstimate) -> Step:
    """Prune with Fishers that are all there.

    Raises:
        ValueError: weights are back that had no part in the estimate.
    """
    for name, dead in estimate.dead.items():
        if name in job.weights and bool((job.flat_weight(name)[dead] != 0).any()):
            raise came_back(name)
    fishers = {name: estimate.fishers[name] for name in job.weights}
    return _finish(job, *_select_and_update(job, fishers), estimate.plan)


def _select_and_update(
    job: Job, fishers: Mapping[str, Fisher]
) -> tuple[dict[str, Tensor], Changes]:
    """Damping, masks and new weights of matrices that are ranked by themselves."""
    job.settle_damping(fishers)
    masks = job.masks(job.score(fishers))
    return masks, job.apply(fishers, masks)


def in_steps(job: Job, steps: int, schedule: str, one_step: Callable[[Job], Step]) -> list[Step]:
    """Prune ``steps`` times; a failure in any leaves the weights of before all."""
    before = {name: w.detach().clone() for name, w in job.weights.items()} if steps > 1 else {}
    done: list[Step] = []
    try:
        for index, sparsity in enumerate(job.sub_sparsities(steps, schedule)):
            here = replace(
                job,
                keep=present_masks(job.weights, job.pattern) if done else job.keep,
                sparsity=sparsity,
                progress=_numbered(job.progress, index, steps),
                start=_relative_damping(done),
                trials=[],
            )
            if here.prunes_anything:
                done.append(one_step(here))
    except BaseException:
        for name, weight in before.items():
            job.weights[name].detach().copy_(weight)
        raise
    return done


def _numbered(progress: Progress, index: int, steps: int) -> Progress:
    if steps == 1:
        return progress
    return lambda stage, done, total: progress(f"{index + 1}/{steps} {stage}", done, total)


def _relative_damping(done: list[Step]) -> float | None:
    """The damping chosen last, over the mean diagonal."""
    for trial in done[-1].trials if done else ():
        if trial.chosen:
            return trial.relative
    return None


def with_estimate(job: Job, source: Source, limits: Limits) -> Step:
    """Estimate Fishers from further batches, and prune with them."""
    plan = plan_passes(
        job.weights,
        limits.block_size,
        limits.dtype,
        limits.max_memory,
        source.num_grads,
        pattern=job.pattern,
        estimator=limits.estimator,
        streamed=source.group is not None,
        keeps_weights=limits.keeps_weights,
    )
    if len(plan.passes) > 1:
        source = source.with_held_batches()

    def estimate(names: list[str]) -> dict[str, Fisher]:
        return accumulate(
            source,
            {name: job.weights[name] for name in names},
            plan,
            block_size=limits.block_size,
            dtype=limits.dtype,
            clock=job.clock,
            progress=job.progress,
            estimator=limits.estimator,
        )

    return _finish(job, *_in_passes(job, plan, estimate), plan)


def _in_passes(
    job: Job,
    plan: Plan,
    estimate: Callable[[list[str]], dict[str, Fisher]],
) -> tuple[dict[str, Tensor], Changes]:
    """Score and update pass by pass, holding the Grams of one pass at a time.

    One ranking over all matrices needs every score before the first update, so the passes
    are run again for the updates, all but the last, whose Grams are still there.
    """
    masks: dict[str, Tensor] = {}
    changes: Changes = {}
    if job.ranks_each_layer_alone:
        for names in plan.passes:
            part = job.part(names)
            if not part.prunes_anything:  # nor is there anything to choose a damping by
                masks |= part.keep
                changes |= {
                    name: (weight.detach().clone(), None if job.update == "none" else 0.0)
                    for name, weight in part.weights.items()
                }
                continue
            found, changed = _select_and_update(job, estimate(names))
            masks |= found
            changes |= changed
        return masks, changes
    scores: dict[str, Tensor] = {}
    fishers: dict[str, Fisher] = {}
    # The damping is chosen on the first, which must not be pruned enough already.
    passes = sorted(plan.passes, key=lambda names: not job.part(names).prunes_anything)
    for names in passes:
        fishers.clear()  # frees the Grams of the pass before
        fishers.update(estimate(names))
        job.settle_damping(fishers)
        scores |= job.score(fishers)
    masks = job.masks(scores)
    scores.clear()
    for index, names in enumerate(reversed(passes)):
        if index > 0 and job.update != "none":
            fishers.clear()
            fishers.update(estimate(names))
        part = {name: masks[name] for name in names}
        changes |= job.apply(None if job.update == "none" else fishers, part)
    return masks, {name: changes[name] for name in job.weights}
