"""The stages of a sub-step: Fisher -> damping -> scores -> masks -> new weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from ..fisher.base import Fisher
from ..gradients.backward import evaluation
from ..gradients.losses import LossFn
from ..progress import Clock, Progress
from ..sparsity.masks import remaining_groups
from ..sparsity.patterns import Pattern
from ..sparsity.schedules import sub_targets
from .config import PruningConfig
from .rollback import Rollback
from .saliencies import ScoringInputs, saliencies
from .score_cache import ScoreCache

# Of each matrix its new weights and the predicted increase of the loss (None without an update).
Changes = dict[str, tuple[Tensor, float | None]]


@dataclass(frozen=True)
class PruningStep:
    """What a sub-step starts from, and its stages.

    Masks and scores are flat, in the order of the pattern; new weights have their shapes.

    Attributes:
        config: how to prune.
        model: the model, in any mode.
        weights: name to matrix.
        keep: name to present mask.
        sparsity: to be reached, over all matrices or of each.
        loss_fn: what gradients are taken of.
        batches: for saliencies that look at them.
        rollback: what the model goes back to after a failure.
        clock, progress: of all stages.
        scores: known from an earlier step with the same weights and Fisher.
    """

    config: PruningConfig
    model: nn.Module
    weights: dict[str, nn.Parameter]
    keep: dict[str, Tensor]
    sparsity: float | dict[str, float]
    loss_fn: LossFn
    batches: Iterable[Any] | None
    rollback: Rollback
    clock: Clock
    progress: Progress
    scores: ScoreCache | None = None

    @property
    def pattern(self) -> Pattern:
        """Of the masks."""
        return self.config.shape

    @property
    def ranks_each_layer_alone(self) -> bool:
        """Does the mask of a matrix depend on no other matrix?"""
        by_name = isinstance(self.sparsity, dict)
        return self.config.scope == "layer" or by_name or self.pattern.ranks_alone

    @property
    def prunes_anything(self) -> bool:
        """Is any target above the present sparsity?  Otherwise there is nothing to estimate."""
        return self.pattern.prunes_anything(self.keep, self.sparsity, self.config.scope)

    def part(self, names: Iterable[str]) -> PruningStep:
        """The same for some of the matrices."""
        return replace(
            self,
            weights={name: self.weights[name] for name in names},
            keep={name: self.keep[name] for name in names},
        )

    def flat_weight(self, name: str) -> Tensor:
        """A matrix in the order of the pattern."""
        return self.pattern.flat(self.weights[name].detach())

    def sub_sparsities(self) -> list[float | dict[str, float]]:
        """Targets of each sub-step, from what is pruned now to the step's own."""
        steps, schedule = self.config.steps, self.config.schedule
        c = self.pattern.group_size
        remaining = {name: remaining_groups(keep, c) for name, keep in self.keep.items()}
        if not self.ranks_each_layer_alone:
            assert isinstance(self.sparsity, float)
            groups = sum(a.numel() for a in remaining.values())
            present = 1 - sum(int(a.sum()) for a in remaining.values()) / groups
            return list(sub_targets(present, self.sparsity, steps, schedule))
        by_name = {
            name: sub_targets(
                1 - float(a.double().mean()),
                self.sparsity[name] if isinstance(self.sparsity, dict) else self.sparsity,
                steps,
                schedule,
            )
            for name, a in remaining.items()
        }
        return [{name: found[i] for name, found in by_name.items()} for i in range(steps)]

    def score(self, fishers: Mapping[str, Fisher], damping: float | None) -> dict[str, Tensor]:
        """Saliencies of the matrices with a Fisher, or of all where none has any."""
        names = list(fishers) or list(self.weights)

        def compute() -> dict[str, Tensor]:
            inputs = ScoringInputs(
                model=self.model,
                weights={name: self.weights[name] for name in names},
                keep=self.keep,
                pattern=self.pattern,
                fishers=fishers,
                damping=math.nan if damping is None else damping,
                batches=self.batches,
                loss_fn=self.loss_fn,
                progress=self.progress,
            )
            with self.clock.stage("scores"), evaluation(self.model):
                return saliencies.find(self.config.selection).scores(inputs)

        key = self.config.pattern, self.config.selection, damping, *names
        scores = compute() if self.scores is None else self.scores.once(key, compute)
        for name in names:
            groups = self.keep[name].numel() // self.pattern.group_size
            if name not in scores or scores[name].shape != (groups,):
                raise ValueError(
                    f"selection {self.config.selection!r} must give {groups} scores of {name}, one "
                    f"for each group, got {scores[name].shape if name in scores else 'none'}"
                )
        return scores

    def masks(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Choose the masks of the matrices scored."""
        with self.clock.stage("masks"):
            return self.pattern.select(scores, self.keep, self.sparsity, self.config.scope)

    def update(
        self,
        fishers: Mapping[str, Fisher] | None,
        masks: Mapping[str, Tensor],
        damping: float | None,
    ) -> Changes:
        """New weights and predicted increase of the matrices with a Fisher (or with a mask)."""
        new: Changes = {}
        names = list(masks if fishers is None else fishers)
        c, rule = self.pattern.group_size, self.config.update
        with self.clock.stage("update"):
            for index, name in enumerate(names):
                weight, increase = self.flat_weight(name), None
                if fishers is None or damping is None or rule in (None, "none"):
                    flat = weight * masks[name]
                else:
                    flat, increase = fishers[name].update(weight, masks[name], damping, c, rule)
                new[name] = (self.pattern.matrix(flat, self.weights[name]), increase)
                self.progress("update", index + 1, len(names))
        return new
