"""The trials of a grid: which there are, in which order, what came of them, which was best."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from ..pruning.saliencies import own_update, uses_fisher
from ..sparsity.patterns import find_pattern


@dataclass(frozen=True)
class Setting:
    """One way to prune, at whatever sparsity.

    Attributes:
        selection, update: as for :func:`obert_kernels.prune`.
        num_grads: m, gradients in the Fisher; None where no texts are looked at.
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

    @property
    def estimate(self) -> tuple[int | None, int | None, int | None]:
        """Settings with the same can share a Fisher."""
        return self.num_grads, self.texts_per_grad, self.block_size

    @property
    def needs_fisher(self) -> bool:
        """Does it need one at all?"""
        return self.block_size is not None


class Scores(NamedTuple):
    """How well a model does; accuracies are fractions, the loss is a mean over the texts.

    Attributes:
        dev_accuracy, dev_loss: on the held-back texts, by which settings are chosen.
        test_accuracy: on texts that decide nothing.
    """

    dev_accuracy: float
    dev_loss: float
    test_accuracy: float


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Attributes:
        setting: how it was pruned.
        target: sparsity asked for.
        sparsity: share of pruned weights reached, over the pruned matrices.
        dev_accuracy, dev_loss, test_accuracy: see :class:`Scores`.
        predicted_increase: see :class:`obert_kernels.LayerReport`.
        damping_used: of the Fisher; None without one.
        gradients_seconds, fisher_seconds: of the estimate, whether or not other trials shared it.
        damping_seconds: of choosing the damping.
        selection_seconds: of scores, masks and update.  Scores that an earlier trial has asked
            for take no time in these two.
        trial_seconds: of everything but a shared estimate, evaluation included.
        error: why it failed, else empty; all figures but the seconds are None then.
    """

    setting: Setting
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
    trial_seconds: float = 0.0
    error: str = ""

    @property
    def key(self) -> tuple[Setting, float]:
        """What trial it was."""
        return self.setting, self.target

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
    pattern: str = "unstructured",
) -> list[Setting]:
    """Return all combinations, each once, those with the cheapest estimates first.

    Combinations that differ only in what does not matter to them are one: magnitude pruning
    knows neither gradients nor blocks nor damping.

    Args:
        texts: n; m = n // g gradients are taken.
        texts_per_grad: g.
        block_size: B; None: what the pattern takes by default.
        damping: numbers or "auto".
        selection: as for :func:`obert_kernels.prune`.
        update: likewise, or "auto": "sum" for diagonal (oBERT's own), "none" for those that use
            no Fisher, "joint" for the others.
        pattern: which block sizes there can be.

    Raises:
        TypeError: one value is given where a list of those to try is expected.
        ValueError: something is out of range.
    """
    shape = find_pattern(pattern)
    axes = {
        "texts": texts, "texts_per_grad": texts_per_grad, "block_size": block_size,
        "selection": selection, "update": update, "damping": damping,
    }  # fmt: skip
    values = [values_to_try(name, given) for name, given in axes.items()]
    settings: dict[Setting, None] = {}
    for n, g, wanted, ranking, rule, value in product(*values):
        num_grads = _gradients(n, g)
        size = shape.block_size(wanted)
        own = own_update(ranking) if rule == "auto" else rule
        if uses_fisher(ranking, own):
            settings[Setting(ranking, own, num_grads, g, size, value)] = None
        elif ranking == "magnitude":
            settings[Setting(ranking, own)] = None
        else:
            settings[Setting(ranking, own, num_grads, g)] = None
    return sorted(settings, key=_cost)


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


def _cost(setting: Setting) -> tuple[int, int]:
    """Backward passes grow with the texts, the Fisher with gradients times block size."""
    return setting.texts or 0, (setting.num_grads or 0) * (setting.block_size or 0)


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


# What tells settings apart in a legend, and how it is written there.
_LABELS = (("texts", "n"), ("texts_per_grad", "g"), ("block_size", "B"), ("damping", "damping"))


def label(setting: Setting, among: Sequence[Setting]) -> str:
    """Return a short name of a setting: what differs among those it stands beside."""
    peers = [other for other in among if other.selection == setting.selection]
    parts = [setting.selection]
    if len({other.update for other in peers}) > 1:
        parts[0] += f"/{setting.update}"
    for field, short in _LABELS:
        values = {getattr(other, field) for other in among} - {None}
        value = getattr(setting, field)
        if value is not None and len(values) > 1:
            parts.append(f"{short} {value:g}" if isinstance(value, float) else f"{short} {value}")
    return ", ".join(parts)
