"""The trials of a grid: which there are, in which order, what came of them, which was best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

from ..pruning.config import PruningConfig

# Samples that batches without a Fisher are asked for by: a batch of one costs nearly as much.
_FITTED_TOGETHER = 16


class GridPoint(NamedTuple):
    """What tells a configuration of a grid from the others; None is what it does not look at.

    Attributes:
        selection, update: as in :class:`obert_kernels.PruningConfig`.
        num_grads: m, gradients in the Fisher; None where it takes no texts to select and update.
        texts_per_grad: g, texts (samples) in each gradient.
        block_size: B, weights per Fisher block; None, as what follows, where there is no Fisher.
        damping: of the Fisher, a number or "auto".
    """

    selection: str
    update: str
    num_grads: int | None = None
    texts_per_grad: int | None = None
    block_size: int | None = None
    damping: float | str | None = None

    @property
    def texts(self) -> int | None:
        """n, texts used for gradients in all."""
        if self.num_grads is None or self.texts_per_grad is None:
            return None
        return self.num_grads * self.texts_per_grad


def point_of(config: PruningConfig) -> GridPoint:
    """Return what tells a configuration from the others of a grid."""
    ranking = config.selection, str(config.update)
    if not config.uses_fisher and config.selection == "magnitude":
        return GridPoint(*ranking)
    texts = config.fisher.num_grads, config.fisher.samples_per_grad
    if not config.uses_fisher:
        return GridPoint(*ranking, *texts)
    return GridPoint(*ranking, *texts, config.fisher.block_size, config.damping)


def batches_for(config: PruningConfig) -> tuple[int, int] | None:
    """Return how many gradients of how many samples a configuration wants batches for.

    Where only the fit of the remaining weights looks at samples, it is as many as that takes.
    None: nothing looks at any.
    """
    point = point_of(config)
    if point.num_grads is not None:
        return point.num_grads, point.texts_per_grad or 1
    if config.fit is None:
        return None
    together = min(_FITTED_TOGETHER, config.fit.num_samples)
    return math.ceil(config.fit.num_samples / together), together


def canonical(config: PruningConfig) -> PruningConfig:
    """Return the same with defaults for what it does not look at: equal ones prune alike."""
    if config.uses_fisher:
        return config
    point, default = point_of(config), PruningConfig(pattern=config.pattern)
    fisher = replace(
        default.fisher,
        num_grads=point.num_grads or default.fisher.num_grads,
        samples_per_grad=point.texts_per_grad,
    )
    return replace(config, damping=default.damping, fisher=fisher)


def estimate_key(config: PruningConfig) -> object:
    """Return what configurations that can share a Fisher, or batches, have in common."""
    if not config.uses_fisher:
        return batches_for(config)
    return config.fisher, config.params, config.shape.order, config.shape.span, config.steps > 1


def at_point(base: PruningConfig, point: GridPoint) -> PruningConfig:
    """Return the configuration at a point; what it does not look at is as in ``base``."""
    fisher = replace(
        base.fisher,
        num_grads=point.num_grads or base.fisher.num_grads,
        samples_per_grad=point.texts_per_grad or base.fisher.samples_per_grad,
        block_size=point.block_size or base.fisher.block_size,
    )
    return replace(
        base,
        selection=point.selection,
        update=point.update,
        damping=base.damping if point.damping is None else point.damping,
        fisher=fisher,
    )


class Scores(NamedTuple):
    """How well a model does; accuracies are fractions, the loss is a mean over the texts.

    Attributes:
        dev_accuracy, dev_loss: on the held-back texts, by which configurations are chosen; None
            where nothing is chosen.
        test_accuracy: on texts that decide nothing.
    """

    dev_accuracy: float | None
    dev_loss: float | None
    test_accuracy: float


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        config: how it was pruned.
        target: sparsity asked for.
        sparsity: share of pruned weights reached, over the pruned matrices.
        dev_accuracy, dev_loss, test_accuracy: see :class:`Scores`.
        predicted_increase: see :class:`obert_kernels.LayerReport`.
        damping_used: of the Fisher; None without one.
        gradients_seconds, fisher_seconds: of the estimate, whether or not other trials shared it.
        damping_seconds: of choosing the damping.
        selection_seconds: of scores, masks and update.  Scores that an earlier trial has asked
            for take no time in these two.
        reconstruction_seconds: of fitting the remaining weights.
        trial_seconds: of everything but a shared estimate, evaluation included.
        error: why it failed, else empty; all figures but the seconds are None then.
    """

    config: PruningConfig
    target: float
    sparsity: float | None = None
    dev_accuracy: float | None = None
    dev_loss: float | None = None
    test_accuracy: float | None = None
    predicted_increase: float | None = None
    damping_used: float | None = None
    gradients_seconds: float = 0.0
    fisher_seconds: float = 0.0
    damping_seconds: float = 0.0
    selection_seconds: float = 0.0
    reconstruction_seconds: float = 0.0
    trial_seconds: float = 0.0
    error: str = ""

    @property
    def point(self) -> GridPoint:
        """What tells its configuration apart."""
        return point_of(self.config)

    @property
    def key(self) -> tuple[PruningConfig, float]:
        """What trial it was."""
        return canonical(self.config), self.target

    @property
    def rank(self) -> tuple[float, float, float]:
        """Smaller is better: dev accuracy, ties by dev loss; failures last."""
        if self.dev_accuracy is None or self.dev_loss is None:
            return (1, 0, 0)
        return (0, -self.dev_accuracy, self.dev_loss)


def number_or_word(text: str) -> float | str:
    """Return the number that ``text`` is, or ``text`` itself."""
    try:
        return float(text)
    except ValueError:
        return text


def make_grid(
    *,
    texts: Iterable[int] = (4096,),
    texts_per_grad: Iterable[int] = (16,),
    block_size: Iterable[int | None] = (None,),
    damping: Iterable[float | str] = ("auto",),
    selection: Iterable[str] = ("greedy",),
    update: Iterable[str] = ("auto",),
    pattern: str | None = None,
    base: PruningConfig | None = None,
) -> list[PruningConfig]:
    """Return all combinations, each once, those with the cheapest estimates first.

    Combinations that differ only in what does not matter to them are one: magnitude pruning
    knows neither gradients nor blocks nor damping.

    Args:
        texts: n; m = n // g gradients are taken.
        texts_per_grad: g, texts in each gradient.
        block_size: B; None: what the pattern takes by default.
        damping: numbers or "auto".
        selection: as for :func:`obert_kernels.prune`.
        update: likewise, or "auto": "sum" for diagonal (oBERT's own), "none" for those that use
            no Fisher, "joint" for the others.
        pattern: of all; None: that of ``base``.
        base: everything else.

    Raises:
        TypeError: one value is given where a list of those to try is expected.
        ValueError: something is out of range.
    """
    base = base or PruningConfig()
    if pattern is not None:
        fisher = replace(base.fisher, block_size=None)
        base = replace(base, pattern=pattern, fisher=fisher)
    tried = {
        "texts": texts, "texts_per_grad": texts_per_grad, "block_size": block_size,
        "selection": selection, "update": update, "damping": damping,
    }  # fmt: skip
    values = [values_to_try(name, given) for name, given in tried.items()]
    configs: dict[PruningConfig, None] = {}
    for n, g, size, ranking, rule, value in product(*values):
        fisher = replace(
            base.fisher, num_grads=_gradients(n, g), samples_per_grad=g, block_size=size
        )
        config = replace(base, selection=ranking, update=rule, damping=value, fisher=fisher)
        configs[canonical(config)] = None
    return sorted(configs, key=_cost)


def values_to_try(name: str, given: Iterable[Any]) -> list[Any]:
    """The values to try; a string is one, not its letters."""
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name} is a list of values to try, got {given!r}: write [{given!r}]")
    return list(given)


def _gradients(texts: int, texts_per_grad: int) -> int:
    if texts_per_grad < 1:
        raise ValueError(f"texts per gradient must be at least 1, got {texts_per_grad}")
    if texts < texts_per_grad:
        raise ValueError(
            f"{texts} texts give no gradient of {texts_per_grad} texts: use more texts or fewer "
            "per gradient"
        )
    return texts // texts_per_grad


def _cost(config: PruningConfig) -> tuple[int, int]:
    """Backward passes grow with the texts, the Fisher with gradients times block size."""
    found = point_of(config)
    return found.texts or 0, (found.num_grads or 0) * (found.block_size or 0)


def best_by_target(outcomes: Iterable[Outcome]) -> dict[float, Outcome]:
    """Return the best outcome at each sparsity at which a trial succeeded."""
    best: dict[float, Outcome] = {}
    for outcome in outcomes:
        known = best.get(outcome.target)
        if not outcome.error and (known is None or outcome.rank < known.rank):
            best[outcome.target] = outcome
    return dict(sorted(best.items()))


def by_rank(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """Return the outcomes by sparsity, the best first."""
    return sorted(outcomes, key=lambda outcome: (outcome.target, outcome.rank))


# What tells configurations apart in a legend, and how it is written there.
_LABELS = (("texts", "n"), ("texts_per_grad", "g"), ("block_size", "B"), ("damping", "damping"))


def label(found: GridPoint, among: Sequence[GridPoint]) -> str:
    """Return a short name of a configuration: what differs among those it stands beside."""
    parts = [found.selection]
    if len({other.update for other in among if other.selection == found.selection}) > 1:
        parts[0] += f"/{found.update}"
    for field, short in _LABELS:
        values = {getattr(other, field) for other in among} - {None}
        value = getattr(found, field)
        if value is not None and len(values) > 1:
            parts.append(f"{short} {value:g}" if isinstance(value, float) else f"{short} {value}")
    return ", ".join(parts)
