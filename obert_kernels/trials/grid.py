"""Many trial prunings of one model, on as few Fisher estimates as they need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import nn

from ..fisher.estimate import FisherEstimate
from ..gradients.losses import LossFn
from ..ops.status import NumericalError
from ..progress import Progress, silent
from ..pruning.config import PruningConfig
from ..pruning.oneshot import PruneResult, dtype_name, names_of
from ..pruning.pruner import Pruner
from ..pruning.rollback import Rollback, put_back_after
from ..pruning.score_cache import ScoreCache
from ..sparsity.masks import check_sparsity
from .budget import Budget
from .outcome import Outcome, Scores, batches_for, canonical, estimate_key, values_to_try

Trial = tuple[PruningConfig, float]


class GridResult(NamedTuple):
    """What :func:`run_grid` returns.

    Attributes:
        outcomes: of all trials that are finished, those given as ``finished`` first.
        left_out: configuration and sparsity of those for which the budget did not suffice.
    """

    outcomes: list[Outcome]
    left_out: list[Trial]


class _Prepared(NamedTuple):
    """What the trials of one estimate share."""

    batches: Iterable[Any] | None = None
    fisher: FisherEstimate | None = None
    scores: ScoreCache | None = None


@dataclass
class TrialLoop:
    """Prunes and evaluates one model again and again, always from the same weights.

    A Fisher is estimated once for all trials in a row that can share it; it is freed before the
    next one is estimated.  Where ``max_memory`` does not hold it whole, or pruning takes
    several steps, each trial makes its own.

    Attributes:
        model: pruned in place and put back after each trial, also if one fails or is interrupted.
        batches_of: called with m and g; returns batches that give m gradients of g samples.
        evaluate: called with the pruned model; returns its :class:`Scores`.
        calibration: batches on which damping "auto" is chosen, and which judge the fit of the
            remaining weights; the Fisher should not see them.
        loss_fn: what gradients are taken of; None: what the configuration says.
        max_memory: bytes, as for :func:`obert_kernels.prune`.
        recover: called after each pruning, for example to fine-tune under the masks.
        on_pruned: called after each evaluation while the model is pruned.
        on_outcome: called after each trial, also if it failed, when the weights are back.
        one_damping: choose a damping "auto" at the highest sparsity and use it for all, where an
            estimate serves them all; else it is chosen for each.
        progress: called as ``progress(stage, done, total)``.
        budget: whether there is time.
    """

    model: nn.Module
    batches_of: Callable[[int, int], Iterable[Any]]
    evaluate: Callable[[nn.Module], Scores]
    calibration: Sequence[Any] = ()
    loss_fn: LossFn | None = None
    max_memory: int | None = None
    recover: Callable[[PruneResult], None] | None = None
    on_pruned: Callable[[Outcome, PruneResult], None] = lambda outcome, result: None
    on_outcome: Callable[[Outcome], None] = lambda outcome: None
    one_damping: bool = False
    progress: Progress = silent
    budget: Budget = Budget(None)  # noqa: RUF009  (without an end it holds nothing)

    def check(self, trials: Iterable[Trial]) -> None:
        """Validate trials before any long work.

        Raises:
            ValueError, TypeError, MemoryError: as for :func:`obert_kernels.prune`.
        """
        trials = list(trials)
        for config, target in trials:
            check_sparsity(target)
            config.shape.target_sparsity(target)
            if config.uses_fisher and config.damping == "auto" and not self.calibration:
                raise ValueError(
                    "damping 'auto' needs calibration batches: pass calibration, or numbers"
                )
        for config in dict.fromkeys(config for config, _ in trials):
            pruner = self._pruner(config)
            if config.uses_fisher:
                pruner.plan(streamed=config.fisher.samples_per_grad is not None)

    def run(self, trials: Iterable[Trial]) -> list[Trial]:
        """Do trials in the order given; return those there was no time for.

        What a trial needs is kept for those after it that can share it: see :func:`grouped`.
        """
        trials = list(trials)
        highest: dict[PruningConfig, float] = {}
        for config, target in trials:
            highest[config] = max(target, highest.get(config, target))
        dampings: dict[PruningConfig, PruneResult] = {}
        prepared: _Prepared | None = None
        key: object = None
        left_out = []
        for config, target in trials:
            kind, asked = _kind(config), batches_for(config)
            if asked is None:  # it needs nothing, and what is there is kept
                here: _Prepared | None = _Prepared()
            else:
                if key != estimate_key(config):
                    key, prepared, here = estimate_key(config), None, None  # frees the Fisher
                    dampings.clear()
                work = "estimate" if config.uses_fisher else "batches", float(asked[0] * asked[1])
                if prepared is None and self.budget.allows(work, (kind, 1.0)):
                    with self.budget.timed(*work):
                        prepared = self._prepare(config)
                here = prepared
            if here is None or not self.budget.allows((kind, 1.0)):
                left_out.append((config, target))
                continue
            with self.budget.timed(kind):
                outcome = self._trial(config, target, here, highest[config], dampings)
            self.on_outcome(outcome)
        return left_out

    def _pruner(self, config: PruningConfig) -> Pruner:
        return Pruner(
            self.model,
            config,
            loss_fn=self.loss_fn,
            max_memory=self.max_memory,
            progress=self.progress,
        )

    def _prepare(self, config: PruningConfig) -> _Prepared:
        """Estimate a Fisher, unless there is no room for all of it, or no need."""
        if (asked := batches_for(config)) is None:
            return _Prepared()
        batches = self.batches_of(*asked)
        if isinstance(batches, Iterator):
            batches = list(batches)  # each trial looks at them
        if not config.uses_fisher or config.steps > 1:
            return _Prepared(batches)
        pruner = self._pruner(config)
        plan = pruner.plan(streamed=config.fisher.samples_per_grad is not None)
        if len(plan.passes) > 1:
            return _Prepared(batches)
        try:
            fisher = pruner.fisher(batches)
        except MemoryError:  # gradients cannot be streamed from this model: in passes they fit
            return _Prepared(batches)
        room = ScoreCache.if_room(pruner.weights, plan.total_bytes, self.max_memory)
        return _Prepared(batches, fisher, room)

    def _trial(
        self,
        config: PruningConfig,
        target: float,
        prepared: _Prepared,
        highest: float,
        dampings: dict[PruningConfig, PruneResult],
    ) -> Outcome:
        """Prune, recover, evaluate, and put the weights back."""
        pruner = self._pruner(config)
        changing = self.model.state_dict(keep_vars=True)  # evaluate may train, as recover does
        before = Rollback(self.model, changing).keep_all()

        def pruned() -> PruneResult:
            if not (self.one_damping and prepared.fisher and config.damping == "auto"):
                return self._prune(pruner, target, prepared)
            if config not in dampings:
                search = self._pruner(replace(config, reconstruction=None))
                dampings[config] = put_back_after(
                    before, lambda: self._prune(search, highest, prepared)
                )
            return self._prune_like(config, target, prepared, dampings[config])

        return put_back_after(before, lambda: self._evaluated(config, target, prepared, pruned))

    def _evaluated(
        self,
        config: PruningConfig,
        target: float,
        prepared: _Prepared,
        pruned: Callable[[], PruneResult],
    ) -> Outcome:
        """What pruning comes to; the model stays as it is by then."""
        started = time.perf_counter()
        result = None
        figures: dict[str, Any] = {}
        try:
            result = pruned()
        except NumericalError as error:  # this damping is too small; others may not be
            figures["error"] = " ".join(str(error).split())
        seconds = dict(prepared.fisher.seconds) if prepared.fisher else {}
        if result is not None:
            if self.recover is not None:
                self.recover(result)
            report = result.report
            figures |= {
                "sparsity": report.sparsity,
                **_scores(self.evaluate(self.model))._asdict(),
                "predicted_increase": report.predicted_increase,
                "damping_used": report.settings["damping"],
            }
            seconds |= report.seconds
        figures |= seconds_of(seconds)
        took = time.perf_counter() - started
        outcome = Outcome(config, target, **figures, trial_seconds=took)
        if result is not None:
            self.on_pruned(outcome, result)
        return outcome

    def _prune(self, pruner: Pruner, target: float, prepared: _Prepared) -> PruneResult:
        report = pruner.step(
            target,
            prepared.batches,
            fisher=prepared.fisher,
            calibration=self.calibration or None,
            scores=prepared.scores,
        )
        return PruneResult(self.model, pruner.masks, report)

    def _prune_like(
        self, config: PruningConfig, target: float, prepared: _Prepared, known: PruneResult
    ) -> PruneResult:
        """Prune with the damping that another sparsity has settled."""
        damping = known.report.settings["damping"] or "auto"
        result = self._prune(self._pruner(replace(config, damping=damping)), target, prepared)
        result.report.damping_trials = known.report.damping_trials
        return result


def _scores(found: object) -> Scores:
    if isinstance(found, Scores):
        return found
    raise TypeError(
        "evaluate must return obert_kernels.Scores(dev_accuracy, dev_loss, test_accuracy), got a "
        f"{type(found).__name__}"
    )


def run_grid(
    model: nn.Module,
    batches_of: Callable[[int, int], Iterable[Any]],
    evaluate: Callable[[nn.Module], Scores],
    settings: Iterable[PruningConfig],
    sparsities: Iterable[float],
    *,
    pattern: str | None = None,
    scope: str | None = None,
    params: str | Iterable[str] | None = None,
    estimator: str | None = None,
    calibration: Sequence[Any] = (),
    loss_fn: LossFn | None = None,
    fisher_dtype: torch.dtype | None = None,
    max_memory: int | None = None,
    finished: Iterable[Outcome] = (),
    budget: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    on_outcome: Callable[[Outcome], None] | None = None,
    progress: Progress | None = None,
) -> GridResult:
    """Prune and evaluate a model in every configuration at every sparsity, from the same weights.

    A Fisher is estimated once for all trials with the same gradients and block size, if any of
    them is left to do; it is freed before the next one is estimated.  (Where ``max_memory`` does
    not hold it whole, each of its trials makes its own, in passes.)

    Args:
        model: pruned in place and put back after each trial, also if one fails or is interrupted.
        batches_of: called with m and g; returns batches that give m gradients of g samples.
        evaluate: called with the pruned model, which it may train first; returns its
            :class:`obert_kernels.trials.outcome.Scores`.
        settings: what to try, see :func:`obert_kernels.make_grid`; those that share an estimate are
            tried together.
        sparsities: at which to try each.
        pattern, scope, params, estimator, fisher_dtype: of all trials, in place of what the
            settings say.
        loss_fn, max_memory, progress: as for :func:`obert_kernels.prune`.
        calibration: batches on which damping "auto" is chosen, for each trial anew, and which
            judge the fit of the remaining weights; the Fisher should not see them.
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
        TypeError: ``sparsities`` is a number, or another argument is of a wrong type.
    """
    targets = list(dict.fromkeys(values_to_try("sparsities", sparsities)))
    settings = values_to_try("settings", settings)
    for config in settings:
        if not isinstance(config, PruningConfig):
            raise TypeError(f"settings are PruningConfigs, see make_grid, got {config!r}")
    if isinstance(calibration, Iterator):
        calibration = list(calibration)  # each trial looks at all of them
    configs = [_with(c, pattern, scope, params, estimator, fisher_dtype) for c in settings]
    outcomes = list(finished)
    done = {outcome.key for outcome in outcomes}

    def add(outcome: Outcome) -> None:
        outcomes.append(outcome)
        if on_outcome is not None:
            on_outcome(outcome)

    loop = TrialLoop(
        model,
        batches_of,
        evaluate,
        calibration,
        loss_fn,
        max_memory,
        on_outcome=add,
        progress=progress or silent,
        budget=Budget(budget, clock),
    )
    wanted = list(product({canonical(config): config for config in configs}.values(), targets))
    to_do = [trial for trial in wanted if (canonical(trial[0]), trial[1]) not in done]
    loop.check(to_do)
    for name, function in (("batches_of", batches_of), ("evaluate", evaluate)):
        if to_do and not callable(function):
            raise TypeError(f"{name} is a function, got a {type(function).__name__}")
    return GridResult(outcomes, loop.run(grouped(to_do)))


def grouped(trials: Iterable[Trial]) -> list[Trial]:
    """Return the trials in their order, but those that can share an estimate together."""
    groups: dict[object, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(estimate_key(trial[0]), []).append(trial)
    return [trial for group in groups.values() for trial in group]


def _with(
    config: PruningConfig,
    pattern: str | None,
    scope: str | None,
    params: str | Iterable[str] | None,
    estimator: str | None,
    dtype: torch.dtype | None,
) -> PruningConfig:
    """The same with what is given."""
    fisher = replace(
        config.fisher,
        # What uses no Fisher has the default for its own pattern.
        block_size=config.fisher.block_size if config.uses_fisher else None,
        estimator=estimator or config.fisher.estimator,
        dtype=config.fisher.dtype if dtype is None else dtype_name(dtype),
    )
    return replace(
        config,
        pattern=pattern or config.pattern,
        scope=scope or config.scope,
        params=config.params if params is None else names_of(params),
        fisher=fisher,
    )


def _kind(config: PruningConfig) -> tuple[object, ...]:
    """Trials whose times say something about each other; what differs most is how many prunings."""
    return config.uses_fisher, config.damping == "auto", config.fit is None


def seconds_of(by_stage: Mapping[str, float]) -> dict[str, float]:
    """Seconds as :class:`Outcome` has them."""
    return {
        "gradients_seconds": by_stage.get("gradients", 0.0),
        "fisher_seconds": by_stage.get("fisher", 0.0),
        "damping_seconds": by_stage.get("damping", 0.0),
        "selection_seconds": sum(by_stage.get(s, 0.0) for s in ("scores", "masks", "update")),
        "reconstruction_seconds": by_stage.get("reconstruction", 0.0),
    }
