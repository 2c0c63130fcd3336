"""One pruning call: Fisher -> damping -> scores -> masks -> new weights, and writing them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..fisher.base import Fisher
from ..gradients.backward import evaluation
from ..gradients.losses import LossFn
from ..progress import Clock, Progress, silent
from ..sparsity.masks import alive_groups, check_scores, n_of_m_mask, prunes_anything, select_masks
from ..sparsity.patterns import Pattern
from ..sparsity.schedules import sub_targets
from .damping import choose_damping, mean_diagonal
from .predictions import Predictions, divergence, predict
from .report import Trial
from .saliencies import Problem, saliencies
from .weights import _instead

Changes = dict[str, tuple[Tensor, float | None]]


@dataclass
class Job:
    """Everything the stages of one call share.

    Masks and scores are flat, in the order of the pattern; new weights have their shapes.
    """

    model: nn.Module
    weights: dict[str, nn.Parameter]
    keep: dict[str, Tensor]
    sparsity: float | dict[str, float]
    pattern: Pattern
    damping: float  # set by settle_damping() if there are calibration batches
    selection: str
    update: str
    scope: str
    clock: Clock
    progress: Progress
    calibration: Sequence[Any] = ()
    batches: Iterable[Any] | None = None  # for saliencies that look at them
    loss_fn: LossFn | None = None
    start: float | None = None  # where the search for a damping begins, over the mean diagonal
    trials: list[Trial] = field(default_factory=list)
    # Of the model as it was given, once they are known; all sub-steps share the list.
    before: list[Predictions] = field(default_factory=list)

    def masks(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose the survivors among the matrices scored."""
        with self.clock.stage("masks"):
            if (kept := self.pattern.kept) is not None:
                for name, found in scores.items():
                    check_scores(found, name)
                return {
                    name: n_of_m_mask(found, self.keep[name], kept, self.pattern.span)
                    for name, found in scores.items()
                }
            return select_masks(
                scores, self.keep, self.sparsity, self.pattern.group_size, self.scope
            )

    @property
    def ranks_each_layer_alone(self) -> bool:
        """Does the mask of a matrix depend on no other matrix?"""
        by_name = isinstance(self.sparsity, dict)
        return self.scope == "layer" or by_name or self.pattern.kept is not None

    @property
    def prunes_anything(self) -> bool:
        """Is any target above the present sparsity?  Otherwise there is nothing to estimate."""
        if (kept := self.pattern.kept) is not None:
            groups = (mask.view(-1, self.pattern.span) for mask in self.keep.values())
            return any(bool((group.sum(dim=1) > kept).any()) for group in groups)
        return prunes_anything(self.keep, self.sparsity, self.pattern.group_size, self.scope)

    def part(self, names: Iterable[str]) -> Job:
        """The same for some of the matrices."""
        return replace(
            self,
            weights={name: self.weights[name] for name in names},
            keep={name: self.keep[name] for name in names},
        )

    def score(self, fishers: Mapping[str, Fisher]) -> dict[str, Tensor]:
        """Saliencies of the matrices with a Fisher, or of all where none has any."""
        names = list(fishers) or list(self.weights)
        problem = Problem(
            model=self.model,
            weights={name: self.weights[name] for name in names},
            keep=self.keep,
            pattern=self.pattern,
            fishers=fishers,
            damping=self.damping,
            batches=self.batches,
            loss_fn=self.loss_fn,
            progress=self.progress,
        )
        with self.clock.stage("scores"), evaluation(self.model):
            scores = saliencies.find(self.selection).scores(problem)
        for name in names:
            groups = self.keep[name].numel() // self.pattern.group_size
            if name not in scores or scores[name].shape != (groups,):
                raise ValueError(
                    f"selection {self.selection!r} must give {groups} scores of {name}, one for "
                    f"each group, got {scores[name].shape if name in scores else 'none'}"
                )
        return scores

    def sub_sparsities(self, steps: int, schedule: str) -> list[float | dict[str, float]]:
        """Targets of each sub-step, from what is pruned now to the job's own.

        Raises:
            ValueError: no such steps.
        """
        self.pattern.check_steps(steps)
        c = self.pattern.group_size
        alive = {name: alive_groups(keep, c) for name, keep in self.keep.items()}
        if not self.ranks_each_layer_alone:
            assert isinstance(self.sparsity, float)
            groups = sum(a.numel() for a in alive.values())
            present = 1 - sum(int(a.sum()) for a in alive.values()) / groups
            return list(sub_targets(present, self.sparsity, steps, schedule))
        by_name = {
            name: sub_targets(
                1 - float(a.double().mean()),
                self.sparsity[name] if isinstance(self.sparsity, dict) else self.sparsity,
                steps,
                schedule,
            )
            for name, a in alive.items()
        }
        return [{name: found[i] for name, found in by_name.items()} for i in range(steps)]

    def flat_weight(self, name: str) -> Tensor:
        """A matrix in the order of the pattern."""
        return self.pattern.flat(self.weights[name].detach())

    def apply(self, fishers: Mapping[str, Fisher] | None, masks: Mapping[str, Tensor]) -> Changes:
        """New weights and predicted increase of the matrices with a Fisher (or with a mask)."""
        new: Changes = {}
        names = list(masks if fishers is None else fishers)
        with self.clock.stage("update"):
            for index, name in enumerate(names):
                weight, increase = self.flat_weight(name), None
                if fishers is None or self.update == "none":
                    flat = weight * masks[name]
                else:
                    flat, increase = fishers[name].update(
                        weight, masks[name], self.damping, self.pattern.group_size, self.update
                    )
                new[name] = (self.pattern.matrix(flat, self.weights[name]), increase)
                self.progress("update", index + 1, len(names))
        return new

    def settle_damping(self, fishers: Mapping[str, Fisher]) -> None:
        """Choose the damping by trial prunings of the matrices given; weights are restored.

        Once for a sub-step, on the first matrices, and only if there are calibration batches.
        """
        if not self.calibration or self.trials:
            return

        def change_after(damping: float) -> tuple[float, float | None]:
            trial = replace(self, damping=damping, clock=Clock(), progress=silent)
            masks = trial.masks(trial.score(fishers))
            new = {name: value for name, (value, _) in trial.apply(fishers, masks).items()}
            with _instead(self.weights, new):
                after = predict(self.model, self.calibration, self.loss_fn)
            return after.loss, divergence(self.before[0], after)

        def tried(count: int) -> None:
            self.progress("damping", count, count + 1)

        with self.clock.stage("damping"):
            if not self.before:  # of the model as it was given, for all sub-steps
                self.before.append(self._predict_before())
            scale = mean_diagonal(fishers, self.keep)
            self.damping, self.trials = choose_damping(scale, change_after, tried, self.start)
        self.progress("damping", len(self.trials), len(self.trials))

    def _predict_before(self) -> Predictions:
        before = predict(self.model, self.calibration, self.loss_fn)
        if before.broken is not None:
            raise ValueError(
                f"batch {before.broken} of those that the damping is chosen on gives "
                f"{'a loss' if before.log_probabilities is None else 'logits'} with NaN or "
                "infinity before anything is pruned: leave it out, or pass calibration="
            )
        return before
