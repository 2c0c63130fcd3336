"""What a pruning call did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from ..reconstruction.fit import LayerFit

NOTHING_TO_PRUNE = "the model was at least this sparse already; nothing was pruned or revived"


class DampingTrial(NamedTuple):
    """One trial pruning.

    Attributes:
        damping: tried.
        relative: damping over the mean diagonal of the Fisher.
        loss: mean loss of the calibration batches afterwards; infinite if the Fisher was not
            positive definite.
        divergence: of the predictions from those before pruning, in nats a sample; None where the
            model does not classify, and the loss decides.
        step: 1 for the first sub-step.
        chosen: it is the one.
    """

    damping: float
    relative: float
    loss: float
    divergence: float | None = None
    step: int = 1
    chosen: bool = False

    @property
    def cost(self) -> float:
        """What the chosen one has the least of."""
        return self.loss if self.divergence is None else self.divergence


class FitReport(NamedTuple):
    """The fit of the remaining weights to what the dense model computes.

    Attributes:
        step: 1 for the first sub-step.
        before, after: divergence of the predictions from those of the dense model on held-back
            batches (their loss, where the model does not classify), without and with it.
        is_kept: it is smaller; otherwise the fit was undone.
        layers: in the order of the forward pass, each with its ridge, and mean square errors on
            held-back batches over the variance of its outputs.
    """

    step: int
    before: float
    after: float
    is_kept: bool
    layers: list[LayerFit]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self._asdict(), "layers": [layer._asdict() for layer in self.layers]}


@dataclass
class LayerReport:
    """One weight matrix.

    Attributes:
        name: parameter name.
        shape: rows and columns.
        weights: number of weights.
        pruned: how many of them are zero now.
        predicted_increase: ``1/2 d^T F d`` for its change d: of the loss, or of half the
            variance of the logits' change where gradients are of predictions (of g samples: a g-th
            of it); None without an update.
    """

    name: str
    shape: list[int]
    weights: int
    pruned: int
    predicted_increase: float | None

    @property
    def sparsity(self) -> float:
        """Share of pruned weights."""
        return self.pruned / self.weights


@dataclass
class PruneReport:
    """The result of :func:`obert_kernels.prune` in figures; ``str()`` gives a table.

    Attributes:
        layers: one entry per weight matrix, in model order.
        settings: most of the arguments that decided the result, and the damping used.
        seconds: stage to wall-clock seconds ("gradients", "fisher", "damping", "scores", "masks",
            "update", "reconstruction").
        memory: bytes planned ("gram", "gathered gradients", "other") and "passes"; of the first
            sub-step, the largest.
        notes: what the user should know, one sentence each.
        damping_trials: those of damping "auto".
        fits: of the remaining weights to the dense model, of each sub-step.
    """

    layers: list[LayerReport]
    settings: dict[str, Any]
    seconds: dict[str, float]
    memory: dict[str, int]
    notes: list[str] = field(default_factory=list)
    damping_trials: list[DampingTrial] = field(default_factory=list)
    fits: list[FitReport] = field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """Share of pruned weights over all matrices."""
        return sum(x.pruned for x in self.layers) / sum(x.weights for x in self.layers)

    @property
    def predicted_increase(self) -> float | None:
        """Sum over the matrices; None without an update."""
        parts = [x.predicted_increase for x in self.layers]
        return None if any(p is None for p in parts) else float(sum(p or 0.0 for p in parts))

    @classmethod
    def merged(cls, reports: Sequence[PruneReport]) -> PruneReport:
        """Return one report of several steps: the last masks, sums of seconds and increases."""
        increases: dict[str, list[float | None]] = {}
        latest: dict[str, LayerReport] = {}
        seconds: Counter[str] = Counter()
        trials: list[DampingTrial] = []
        fits: list[FitReport] = []
        for report in reports:
            for layer in report.layers:
                increases.setdefault(layer.name, []).append(layer.predicted_increase)
                latest[layer.name] = layer
            seconds.update(report.seconds)
            earlier = trials[-1].step if trials else 0
            trials += [t._replace(step=t.step + earlier) for t in report.damping_trials]
            earlier = fits[-1].step if fits else 0
            fits += [fit._replace(step=fit.step + earlier) for fit in report.fits]
        layers = [
            replace(layer, predicted_increase=total_or_none(increases[name]))
            for name, layer in latest.items()
        ]
        notes = dict.fromkeys(note for report in reports for note in report.notes)
        if not all(NOTHING_TO_PRUNE in report.notes for report in reports):
            notes.pop(NOTHING_TO_PRUNE, None)
        memory = max((report.memory for report in reports), key=lambda m: m.get("gram", 0))
        return cls(layers, reports[-1].settings, dict(seconds), memory, list(notes), trials, fits)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        layers = [{**asdict(layer), "sparsity": layer.sparsity} for layer in self.layers]
        return {
            "sparsity": self.sparsity,
            "predicted_increase": self.predicted_increase,
            "settings": self.settings,
            "seconds": self.seconds,
            "memory": self.memory,
            "notes": self.notes,
            "damping_trials": [trial._asdict() for trial in self.damping_trials],
            "reconstruction": [fit.to_dict() for fit in self.fits],
            "layers": layers,
        }

    def __str__(self) -> str:
        width = max(len(layer.name) for layer in self.layers)
        rows = [f"{'matrix':<{width}}  {'weights':>10}  sparsity  predicted increase"]
        for layer in self.layers:
            rows.append(
                f"{layer.name:<{width}}  {layer.weights:>10}  {layer.sparsity:>7.2%}  "
                f"{_increase(layer.predicted_increase)}"
            )
        total = sum(layer.weights for layer in self.layers)
        rows.append(
            f"{'all':<{width}}  {total:>10}  {self.sparsity:>7.2%}  "
            f"{_increase(self.predicted_increase)}"
        )
        rows.append("seconds: " + ", ".join(f"{k} {v:.1f}" for k, v in self.seconds.items()))
        for step in sorted({trial.step for trial in self.damping_trials}):
            trials = [trial for trial in self.damping_trials if trial.step == step]
            best = next(trial for trial in trials if trial.chosen)
            by = "loss" if best.divergence is None else "divergence"
            tried = ", ".join(f"{trial.damping:.2g}: {trial.cost:.4g}" for trial in trials)
            rows.append(f"damping {best.damping:.3g}, by {by} after trials: {tried}")
        for fit in self.fits:
            rows.append(
                f"reconstruction, divergence on held-back batches: {fit.before:.4g} before, "
                f"{fit.after:.4g} after{'' if fit.is_kept else ', undone'}"
            )
        rows += [f"note: {note}" for note in self.notes]
        return "\n".join(rows)


def _increase(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def total_or_none(parts: Iterable[float | None]) -> float | None:
    """Sum of numbers; None where one is not known."""
    known = list(parts)
    return None if None in known else float(sum(part or 0.0 for part in known))
