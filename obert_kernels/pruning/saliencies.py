"""Scores by which weights, or groups of them, are ranked: the smallest go first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..fisher.base import Fisher
from ..gradients.batches import to_device
from ..gradients.losses import LossFn
from ..plugins import Registry
from ..progress import Progress
from ..sparsity.masks import magnitude_scores
from ..sparsity.patterns import NofM, Pattern


@dataclass
class ScoringInputs:
    """What a saliency may look at.

    Attributes:
        model: in eval mode.
        weights: name to matrix, those to be scored now.
        keep: name to present mask, bool ``[n]`` in the order of the pattern.
        pattern: which weights belong together, and the order of flat tensors.
        fishers: name to Fisher, if the saliency uses one.
        damping: of the Fishers; NaN without any.
        batches: as given to :func:`obert_kernels.prune`; None if none were.
        loss_fn: as given, or the default.
        progress: called as ``progress(stage, done, total)``.
    """

    model: nn.Module
    weights: Mapping[str, nn.Parameter]
    keep: Mapping[str, Tensor]
    pattern: Pattern
    fishers: Mapping[str, Fisher]
    damping: float
    batches: Iterable[Any] | None
    loss_fn: LossFn | None
    progress: Progress

    def names(self) -> Iterator[str]:
        """Go through the matrices, telling ``progress``."""
        for index, name in enumerate(self.weights):
            yield name
            self.progress("scores", index + 1, len(self.weights))

    def each_batch(self) -> Iterator[Any]:
        """Go through the batches, on the model's device.

        Raises:
            ValueError: :func:`obert_kernels.prune` was given none, or an iterator that is used up.
        """
        if self.batches is None:
            raise ValueError("batches is needed: this selection looks at an iterable of batches")
        device = next(iter(self.weights.values())).device
        is_empty = True
        for batch in self.batches:
            is_empty = False
            yield to_device(batch, device)
        if is_empty:
            raise ValueError(
                "batches is empty or was used up before: this selection needs them, too; "
                "pass a list or a DataLoader"
            )

    def flat(self, name: str) -> Tensor:
        """Weights of a matrix, ``[n]``."""
        return self.pattern.flat(self.weights[name].detach())

    def grouped(self, matrix: Tensor) -> Tensor:
        """Scores of single weights, in the shape of their matrix, to scores of the groups."""
        return self.pattern.flat(matrix).view(-1, self.pattern.group_size).sum(dim=1)


Problem = ScoringInputs  # its first name

Saliency = Callable[[ScoringInputs], dict[str, Tensor]]


@dataclass(frozen=True)
class _Entry:
    scores: Saliency
    uses_fisher: bool


saliencies: Registry[_Entry] = Registry("selection")


def register_saliency(name: str, *, uses_fisher: bool = True) -> Callable[[Saliency], Saliency]:
    """Register a function by the name that ``selection=`` takes.

    It gets a :class:`ScoringInputs` and returns, for each name in ``problem.weights``, non-negative
    scores ``[n / group_size]`` in the order of the pattern.  Trials at several sparsities, from the
    same weights with the same Fisher and damping, ask for them once.

    Args:
        name: of the saliency.
        uses_fisher: False if it does without; then none is estimated unless an update is asked
            for.

    Raises:
        ValueError: the name is empty or no string.
    """

    def register(function: Saliency) -> Saliency:
        saliencies.add(name, _Entry(function, uses_fisher))
        return function

    return register


def uses_fisher(selection: str, update: str) -> bool:
    """Return whether a way to prune needs a Fisher."""
    return saliencies.find(selection).uses_fisher or update != "none"


def default_update(selection: str) -> str:
    """Return the default update: what oBERT does with its scores, else the exact one."""
    if not uses_fisher(selection, "none"):
        return "none"
    return "sum" if selection == "diagonal" else "joint"


@register_saliency("greedy")
def greedy(problem: ScoringInputs) -> dict[str, Tensor]:
    """Cost of exact removals one after the other; for N:M 1 for what remains, else 0."""
    pattern, scores = problem.pattern, {}
    for name in problem.names():
        fisher, given = problem.fishers[name], (problem.flat(name), problem.keep[name])
        if isinstance(pattern, NofM):
            found = fisher.n_of_m(*given, problem.damping, pattern.kept, pattern.span).float()
        else:
            found = fisher.greedy_scores(*given, problem.damping, pattern.group_size)
        scores[name] = found
    return scores


@register_saliency("diagonal")
def diagonal(problem: ScoringInputs) -> dict[str, Tensor]:
    """OBS saliency of each weight or group as if it went alone (oBERT's)."""
    c = problem.pattern.group_size
    return {
        name: problem.fishers[name].scores(problem.flat(name), problem.damping, c)
        for name in problem.names()
    }


@register_saliency("magnitude", uses_fisher=False)
def magnitude(problem: ScoringInputs) -> dict[str, Tensor]:
    """Sum of squares."""
    c = problem.pattern.group_size
    return {name: magnitude_scores(problem.flat(name), c) for name in problem.names()}
