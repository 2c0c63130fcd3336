"""Many trial prunings of one model, on as few Fisher estimates as they need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from ..fisher.estimate import estimate_fisher
from ..fisher.estimators import estimators
from ..fisher.memory import Plan, plan_passes
from ..gradients.losses import LossFn
from ..ops.status import NumericalError
from ..progress import Progress, silent
from ..pruning.oneshot import prune
from ..sparsity.layers import find_weights
from ..sparsity.masks import check_sparsity
from ..sparsity.patterns import find_pattern
from .budget import Budget
from .outcome import Outcome, Scores, Setting, values_to_try
from .scored_once import score_once

Trial = tuple[Setting, float]


class GridResult(NamedTuple):
    """What :func:`run_grid` returns.

    Attributes:
        outcomes: of all trials that are finished, those given as ``finished`` first.
        left_out: setting and sparsity of those for which the budget did not suffice.
    """

    outcomes: list[Outcome]
    left_out: list[Trial]


def run_grid(
    model: nn.Module,
    batches_of: Callable[[int, int], Iterable[Any]],
    evaluate: Callable[[nn.Module], Scores],
    settings: Iterable[Setting],
    sparsities: Iterable[float],
    *,
    pattern: str = "unstructured",
    scope: str = "global",
    params: str | Iterable[str] | None = None,
    estimator: str = "gram",
    calibration: Sequence[Any] = (),
    loss_fn: LossFn | None = None,
    fisher_dtype: torch.dtype = torch.float64,
    max_memory: int | None = None,
    finished: Iterable[Outcome] = (),
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    on_outcome: Callable[[Outcome], None] | None = None,
    progress: Progress | None = None,
) -> GridResult:
    """Prune and evaluate a model in every setting at every sparsity, always from the same weights.

    A Fisher is estimated once for all trials with the same gradients and block size, if any of
    them is left to do; it is freed before the next one is estimated.  (Where ``max_memory`` does
    not hold it whole, each of its trials makes its own, in passes.)

    Args:
        model: pruned in place and put back after each trial, also if one fails or is interrupted.
        batches_of: called with m and g; returns batches that give m gradients of g samples.
        evaluate: called with the pruned model; returns its
            :class:`obert_kernels.trials.outcome.Scores`.
        settings: what to try, see :func:`obert_kernels.make_grid`; those that share an estimate are
             tried together.
        sparsities: at which to try each.
        pattern, scope, params, estimator, loss_fn, fisher_dtype, max_memory, progress: of all
            trials, as for :func:`obert_kernels.prune`.
        calibration: batches on which damping "auto" is chosen, for each trial anew; the Fisher
            should not see them.
        finished: outcomes of trials that are not to be done again.
        budget: minutes; no estimate and no trial starts when they are over, nor one that would
            overrun them if it took as long as the fastest of its kind before it.
        clock: what measures them, in seconds.
        on_outcome: called after each trial.

    Returns:
        The outcomes, and the trials left out.  A trial that fails because a Fisher block is not
        positive definite has an outcome, too.

    Raises:
        ValueError, TypeError, MemoryError: as :func:`obert_kernels.prune`.
        TypeError: ``sparsities`` is a number.
    """
    targets = list(dict.fromkeys(values_to_try("sparsities", sparsities)))
    wanted = list(dict.fromkeys(settings))
    check_grid(model, wanted, targets, pattern=pattern, scope=scope, params=params)
    if not calibration and any(setting.damping == "auto" for setting in wanted):
        raise ValueError("damping 'auto' needs calibration batches: pass calibration, or numbers")
    shared = {
        "pattern": pattern, "scope": scope, "params": params, "loss_fn": loss_fn,
        "estimator": estimator,
    }  # fmt: skip
    work = _Work(
        model, batches_of, evaluate, shared, calibration, fisher_dtype, max_memory,
        progress or silent,
    )  # fmt: skip
    outcomes = list(finished)
    done = {outcome.key for outcome in outcomes}
    groups: dict[Any, list[Trial]] = {}
    for trial in product(wanted, targets):
        if trial not in done:
            groups.setdefault(trial[0].estimate, []).append(trial)
    for group in groups.values():
        work.plan(group[0][0])  # raises now what would be raised after hours
    time_left = Budget(budget, clock)
    left_out: list[Trial] = []
    for group in groups.values():
        for trial, outcome in _run_group(work, group, time_left):
            if outcome is None:
                left_out.append(trial)
                continue
            outcomes.append(outcome)
            if on_outcome is not None:
                on_outcome(outcome)
    return GridResult(outcomes, left_out)


def check_grid(
    model: nn.Module,
    settings: Iterable[Setting],
    sparsities: Iterable[float],
    *,
    pattern: str = "unstructured",
    scope: str = "global",
    params: str | Iterable[str] | None = None,
) -> None:
    """Find fault with the arguments of :func:`run_grid` before any long work.

    Raises:
        ValueError: :func:`obert_kernels.prune` does not take one of them.
    """
    shape = find_pattern(pattern)
    for sparsity in sparsities:
        check_sparsity(sparsity)
        shape.prescribed(sparsity)
    weights = find_weights(model, params)
    for name, weight in weights.items():
        shape.check(name, weight)
    settings = list(settings)
    for setting in settings:
        if setting.block_size is not None:
            shape.block_size(setting.block_size)
    smallest = min(weights, key=lambda name: weights[name].numel())
    for selection, update, damping in dict.fromkeys(
        (s.selection, s.update, s.damping) for s in settings
    ):
        given = {} if damping is None else {"damping": damping}
        how = {"selection": selection, "update": update, "scope": scope, "params": [smallest]}
        prune(model, sparsity=0.0, **how, **given)  # removes nothing, but checks its arguments


def _run_group(
    work: _Work, group: Sequence[Trial], time_left: Budget
) -> Iterator[tuple[Trial, Outcome | None]]:
    """Do the trials of one estimate; None for those there was no time for."""
    first = group[0][0]
    texts = float(first.texts or 1)
    preparation = ("estimate" if first.needs_fisher else "batches", texts)
    fisher: _Fisher | None = None
    for trial in group:
        kind = _kind(trial[0])
        if fisher is None and time_left.allows(preparation, (kind, 1.0)):
            with time_left.timed(*preparation):
                fisher = work.estimate(first)
        if fisher is None or not time_left.allows((kind, 1.0)):
            yield trial, None
            continue
        with time_left.timed(kind):
            outcome = work.outcome(*trial, fisher)
        yield trial, outcome


def _kind(setting: Setting) -> tuple[object, ...]:
    """Trials whose times say something about each other; what differs most is how many prunings."""
    return setting.needs_fisher, setting.damping == "auto"


class _Fisher(NamedTuple):
    """How :func:`prune` comes by its Fisher, and the seconds spent on that beforehand."""

    arguments: dict[str, Any]
    seconds: dict[str, float]


@dataclass
class _Work:
    """The work of a grid, and what all of it shares."""

    model: nn.Module
    batches_of: Callable[[int, int], Iterable[Any]]
    evaluate: Callable[[nn.Module], Scores]
    options: dict[str, Any]
    calibration: Sequence[Any]
    fisher_dtype: torch.dtype
    max_memory: int | None
    progress: Progress

    def __post_init__(self) -> None:
        self.weights = find_weights(self.model, self.options["params"])
        self.dense = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def estimate(self, setting: Setting) -> _Fisher:
        """Estimate a Fisher, unless there is no room for all of it, or no need."""
        if setting.num_grads is None or setting.texts_per_grad is None:
            return _Fisher({}, {})
        batches = self.batches_of(setting.num_grads, setting.texts_per_grad)
        if not setting.needs_fisher:
            return _Fisher({"batches": batches}, {})
        how = {
            "num_grads": setting.num_grads,
            "samples_per_grad": setting.texts_per_grad,
            "block_size": setting.block_size,
            "fisher_dtype": self.fisher_dtype,
        }
        calibration = {"calibration": self.calibration} if self.calibration else {}
        if (plan := self.plan(setting)) is not None and len(plan.passes) > 1:
            return _Fisher(
                {"batches": batches, "max_memory": self.max_memory, **how, **calibration}, {}
            )
        shared = ("params", "pattern", "loss_fn", "estimator")
        options = {name: self.options[name] for name in shared}
        fisher = estimate_fisher(self.model, batches, progress=self.progress, **options, **how)
        score_once(fisher, next(iter(self.weights.values())).device, self.max_memory)
        return _Fisher({"fisher": fisher, "batches": batches, **calibration}, fisher.seconds)

    def plan(self, setting: Setting) -> Plan | None:
        """Memory and passes of its Fisher; None without one.

        Raises:
            MemoryError: it does not fit.
        """
        if setting.num_grads is None or setting.block_size is None:
            return None
        return plan_passes(
            self.weights,
            setting.block_size,
            self.fisher_dtype,
            self.max_memory,
            setting.num_grads,
            streamed=True,
            pattern=find_pattern(self.options["pattern"]),
            estimator=estimators.find(self.options["estimator"]),
        )

    def outcome(self, setting: Setting, target: float, fisher: _Fisher) -> Outcome:
        """Prune, evaluate, and put the weights back."""
        started = time.perf_counter()
        try:
            figures = self._figures(setting, target, fisher)
        finally:
            with torch.no_grad():
                for name, weight in self.weights.items():
                    weight.copy_(self.dense[name])
        return Outcome(setting, target, **figures, trial_seconds=time.perf_counter() - started)

    def _figures(self, setting: Setting, target: float, fisher: _Fisher) -> dict[str, Any]:
        how = {"selection": setting.selection, "update": setting.update}
        if setting.damping is not None:
            how["damping"] = setting.damping
        try:
            report = prune(
                self.model, sparsity=target, progress=self.progress, **how, **self.options,
                **fisher.arguments,
            ).report  # fmt: skip
        except NumericalError as error:  # this damping is too small; others may not be
            return {**_seconds(fisher.seconds), "error": " ".join(str(error).split())}
        return {
            "sparsity": report.sparsity,
            **self.evaluate(self.model)._asdict(),
            "predicted_increase": report.predicted_increase,
            "damping_used": report.settings["damping"],
            **_seconds({**fisher.seconds, **report.seconds}),
        }


def _seconds(by_stage: dict[str, float]) -> dict[str, float]:
    """Seconds as :class:`Outcome` has them."""
    return {
        "gradients_seconds": by_stage.get("gradients", 0.0),
        "fisher_seconds": by_stage.get("fisher", 0.0),
        "damping_seconds": by_stage.get("damping", 0.0),
        "selection_seconds": sum(by_stage.get(s, 0.0) for s in ("scores", "masks", "update")),
    }
