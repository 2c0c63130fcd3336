"""One pruning call: Fisher -> damping -> scores -> masks -> new weights, and writing them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from .damping import Trial, choose_damping, mean_diagonal
from .estimate import Clock, Progress, silent
from .fisher import GramFisher
from .gradients import LossFn, mean_loss
from .masks import magnitude_scores, prunes_anything, select_masks
from .memory import Plan

Changes = dict[str, tuple[Tensor, float | None]]


def present_masks(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Weights that are zero now count as pruned."""
    return {name: weight.detach() != 0 for name, weight in weights.items()}


@dataclass
class Job:
    """Everything the stages of one call share."""

    model: nn.Module
    weights: dict[str, nn.Parameter]
    keep: dict[str, Tensor]
    sparsity: float | dict[str, float]
    group_size: int
    damping: float  # set by settle_damping() if there are calibration batches
    selection: str
    update: str
    scope: str
    clock: Clock
    progress: Progress
    calibration: Sequence[Any] = ()
    loss_fn: LossFn | None = None
    trials: list[Trial] = field(default_factory=list)

    def masks(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose the survivors among the matrices scored."""
        with self.clock.stage("masks"):
            return select_masks(scores, self.keep, self.sparsity, self.group_size, self.scope)

    @property
    def ranks_each_layer_alone(self) -> bool:
        """Does the mask of a matrix depend on no other matrix?"""
        return self.scope == "layer" or isinstance(self.sparsity, dict)

    @property
    def prunes_anything(self) -> bool:
        """Is any target above the present sparsity?  Otherwise there is nothing to estimate."""
        return prunes_anything(self.keep, self.sparsity, self.group_size, self.scope)

    def score(self, fishers: Mapping[str, GramFisher]) -> dict[str, Tensor]:
        """Saliencies of the matrices given."""
        if self.selection == "magnitude":
            return {name: magnitude_scores(self.weights[name], self.group_size) for name in fishers}
        scores = {}
        with self.clock.stage("scores"):
            for index, (name, fisher) in enumerate(fishers.items()):
                weight = self.weights[name].detach().flatten()
                if self.selection == "greedy":
                    keep = self.keep[name].flatten()
                    found = fisher.greedy_scores(weight, keep, self.damping, self.group_size)
                else:
                    found = fisher.scores(weight, self.damping, self.group_size)
                scores[name] = found
                self.progress("scores", index + 1, len(fishers))
        return scores

    def apply(
        self, fishers: Mapping[str, GramFisher] | None, masks: Mapping[str, Tensor]
    ) -> Changes:
        """New weights and predicted increase of the matrices with a Fisher (or with a mask)."""
        new: Changes = {}
        names = list(masks if fishers is None else fishers)
        with self.clock.stage("update"):
            for index, name in enumerate(names):
                weight = self.weights[name].detach()
                if fishers is None or self.update == "none":
                    new[name] = (weight * masks[name], None)
                else:
                    flat, increase = fishers[name].update(
                        weight.flatten(),
                        masks[name].flatten(),
                        self.damping,
                        self.group_size,
                        self.update,
                    )
                    new[name] = (flat.view(weight.shape), increase)
                self.progress("update", index + 1, len(names))
        return new

    def settle_damping(self, fishers: Mapping[str, GramFisher]) -> None:
        """Choose the damping by trial prunings of the matrices given; weights are restored.

        Once for a call, on the first matrices, and only if there are calibration batches.
        """
        if not self.calibration or self.trials:
            return

        def loss_after(damping: float) -> float:
            trial = replace(self, damping=damping, clock=Clock(), progress=silent)
            masks = trial.masks(trial.score(fishers))
            new = {name: value for name, (value, _) in trial.apply(fishers, masks).items()}
            with _instead(self.weights, new):
                return mean_loss(self.model, self.calibration, self.loss_fn)

        def tried(count: int) -> None:
            self.progress("damping", count, count + 1)

        with self.clock.stage("damping"):
            scale = mean_diagonal(fishers, self.keep)
            self.damping, self.trials = choose_damping(scale, loss_after, tried)
        self.progress("damping", len(self.trials), len(self.trials))


@contextmanager
def _instead(weights: Mapping[str, nn.Parameter], new: Mapping[str, Tensor]) -> Iterator[None]:
    """The model with other weights for a while."""
    old = {name: weights[name].data for name in new}
    try:
        for name, value in new.items():
            weights[name].data = value
        yield
    finally:
        for name, value in old.items():
            weights[name].data = value


def commit(weights: Mapping[str, nn.Parameter], new: Mapping[str, Tensor]) -> None:
    """Write all new weights, or on any interruption none."""
    for name, value in new.items():
        if not bool(torch.isfinite(value).all()):
            raise ArithmeticError(
                f"the update of {name} left the range of {value.dtype}; raise damping"
            )
    old: dict[str, Tensor] = {}  # in the memory of `new`, so that nothing more is needed
    in_flight: tuple[str, Tensor] | None = None
    try:
        for name, value in new.items():
            weight = weights[name].detach()
            in_flight = (name, weight.clone())
            weight.copy_(value)
            value.copy_(in_flight[1])
            old[name] = value
    except BaseException:
        if in_flight is not None:
            old[in_flight[0]] = in_flight[1]
        for name, value in old.items():
            weights[name].detach().copy_(value)
        raise


def from_estimate(job: Job, fishers: Mapping[str, GramFisher]) -> tuple[dict[str, Tensor], Changes]:
    """Damping, masks and new weights from Fishers that are all there."""
    job.settle_damping(fishers)
    masks = job.masks(job.score(fishers))
    return masks, job.apply(fishers, masks)


def in_passes(
    job: Job,
    plan: Plan,
    estimate: Callable[[list[str]], dict[str, GramFisher]],
) -> tuple[dict[str, Tensor], Changes]:
    """Score and update pass by pass, holding the Grams of one pass at a time.

    One ranking over all matrices needs every score before the first update, so the passes
    are run again for the updates, all but the last, whose Grams are still there.
    """
    masks: dict[str, Tensor] = {}
    changes: Changes = {}
    if job.ranks_each_layer_alone:
        for names in plan.passes:
            fishers = estimate(names)
            job.settle_damping(fishers)
            found = job.masks(job.score(fishers))
            masks |= found
            changes |= job.apply(fishers, found)
            del fishers
        return masks, changes
    scores: dict[str, Tensor] = {}
    fishers = {}
    for names in plan.passes:
        fishers.clear()  # frees the Grams of the pass before
        fishers.update(estimate(names))
        job.settle_damping(fishers)
        scores |= job.score(fishers)
    masks = job.masks(scores)
    scores.clear()
    for index, names in enumerate(reversed(plan.passes)):
        if index > 0 and job.update != "none":
            fishers.clear()
            fishers.update(estimate(names))
        part = {name: masks[name] for name in names}
        changes |= job.apply(None if job.update == "none" else fishers, part)
    return masks, {name: changes[name] for name in job.weights}
