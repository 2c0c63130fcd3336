"""A model and how it is pruned: steps that can be taken one after the other, and resumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import tee
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..fisher.estimate import (
    Estimation,
    FisherEstimate,
    note_on_zero_gradients,
    zero_weights,
)
from ..fisher.memory import MemoryPlan, plan_passes
from ..gradients.losses import LOSSES, LossFn
from ..gradients.source import BatchSource
from ..progress import Clock, Progress, silent
from ..reconstruction.memory import planned_bytes
from ..reconstruction.stage import biases_of
from ..sparsity.masks import check_pruned_are_zero, masked_parameters
from ..sparsity.wrappers import check_one_process, unwrapped, wrappers_at_rest
from .config import PruningConfig
from .fitting import Fitting
from .inputs import (
    check_batches,
    check_estimate,
    check_estimate_serves,
    check_loss_fn,
    check_max_memory,
    check_progress,
    sparsity_targets,
)
from .passes import (
    DampingChoice,
    SubStep,
    fitted,
    from_estimate,
    in_steps,
    with_estimate,
    without_fisher,
)
from .predictions import Calibration
from .report import NOTHING_TO_PRUNE, PruneReport
from .rollback import Rollback, all_or_nothing
from .score_cache import ScoreCache
from .step import PruningStep
from .step_report import report_of
from .weights import present_masks

_STATE_VERSION = 1
_REMEDY = "call apply_masks() after every step of the optimizer"

T = TypeVar("T")


class Pruner:
    """Prunes a model in place, in steps; what comes between them, say training, is the caller's.

    Weights that are zero when it is made, or when a step starts, count as pruned: make it when
    pruning begins.

    Args:
        model: any module; of a wrapper (``DistributedDataParallel``, ``torch.compile``) the model
            inside is pruned, and ``loss_fn`` is given that.
        config: how to prune; None: the defaults.
        loss_fn: ``loss_fn(model, batch)``, a scalar, the mean of something over the samples, that
            gradients are taken of; None: what ``config.fisher.gradients_of`` says.
        max_memory: bytes a step may use on top of the model; matrices are then worked on in
            several passes over the same batches.
        progress: called as ``progress(stage, done, total)``.

    Attributes:
        weights: name to matrix, those that are pruned.

    Raises:
        ValueError, TypeError: the configuration does not fit the model, see
            :meth:`PruningConfig.check`.
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruningConfig | None = None,
        *,
        loss_fn: LossFn | None = None,
        max_memory: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not isinstance(config, PruningConfig | None):
            raise TypeError(f"config must be a PruningConfig, got a {type(config).__name__}")
        check_loss_fn(loss_fn)
        check_max_memory(max_memory)
        check_progress(progress)
        self.model, self._whole = unwrapped(model), model
        self.config = config or PruningConfig()
        check_one_process(model)
        self.weights = self.config.check(model)
        self.loss_fn = loss_fn or LOSSES[self.config.fisher.gradients_of]
        self.max_memory = max_memory
        self.progress = progress or silent
        self._masks = {name: weight.detach() != 0 for name, weight in self.weights.items()}
        self._history: list[PruneReport] = []
        self._relative_damping: float | None = None

    @property
    def masks(self) -> dict[str, Tensor]:
        """Parameter name to bool tensor of its shape, True for the weights that remain."""
        return dict(self._masks)

    def apply_masks(self) -> None:
        """Set pruned weights to zero again, as an optimizer's step may have moved them."""
        with torch.no_grad():
            for name, weight in masked_parameters(self.model, self._masks).items():
                weight.masked_fill_(~self._masks[name].to(weight.device), 0.0)

    def plan(
        self,
        *,
        streamed: bool,
        can_split: bool = True,
        weights: Mapping[str, nn.Parameter] | None = None,
    ) -> MemoryPlan:
        """Return the memory and the passes that a step needs.

        Args:
            streamed: gradients come one matrix at a time, as with ``samples_per_grad``.
            can_split: there may be several passes.
            weights: some of the matrices; None: all.

        Raises:
            MemoryError: it does not fit; the message gives the figures and the remedies.
        """
        return plan_passes(
            self.weights if weights is None else weights,
            self.config.fisher,
            self.config.shape,
            self.max_memory,
            streamed=streamed,
            can_split=can_split,
            keeps_weights=can_split and self.config.steps > 1,
            has_trials=self.config.damping == "auto",
            later_bytes=planned_bytes(self.weights) if self.config.fit else 0,
        )

    def fisher(self, batches: Iterable[Any]) -> FisherEstimate:
        """Estimate the Fisher of all matrices, to be used by steps at several sparsities.

        Args:
            batches: as for :func:`obert_kernels.prune`.

        Raises:
            ValueError, TypeError, MemoryError: as for :func:`obert_kernels.prune`.
        """
        return self._all_or_nothing(lambda rollback: self._fisher(batches))

    def _fisher(self, batches: Iterable[Any]) -> FisherEstimate:
        check_batches(batches)
        source = BatchSource(batches)
        if self.config.fit is not None:
            source.remember(self.config.fit.num_samples)
        estimation = self._estimation(source, self.weights)
        plan = self.plan(streamed=estimation.samples is not None, can_split=False)
        clock = Clock()
        fishers = estimation.accumulate(self.weights, plan, clock, self.progress)
        squares = {name: fisher.mean_squares() for name, fisher in fishers.items()}
        if note := note_on_zero_gradients(squares, self.weights):
            estimation.source.notes.append(note)
        config, pattern = self.config.fisher, self.config.shape
        assert config.block_size is not None
        return FisherEstimate(
            fishers,
            config.num_grads,
            clock.seconds,
            plan,
            estimation.source.all_notes(config.num_grads),
            config.samples_per_grad,
            pattern,
            config.block_size,
            zero_weights(fishers, self.weights, pattern),
            estimation.source.remembered,
        )

    def _estimation(self, source: BatchSource, weights: Mapping[str, nn.Parameter]) -> Estimation:
        config = self.config
        return Estimation(self.model, source, weights, config.fisher, config.shape, self.loss_fn)

    def step(
        self,
        sparsity: float | Mapping[str, float] | None = None,
        batches: Iterable[Any] | None = None,
        *,
        fisher: FisherEstimate | None = None,
        calibration: Iterable[Any] | None = None,
        scores: ScoreCache | None = None,
    ) -> PruneReport:
        """Prune to a sparsity: all of it, or, on any failure or interruption, nothing.

        Args:
            sparsity: share of the weights to be zero, over all matrices; or a mapping from name
                or ``re:`` pattern to that of each matrix it matches, others are left as they are.
                None: 0.8, or what an N:M pattern gives.
            batches: for gradients, for selections that look at them, and for the reconstruction.
            fisher: an estimate to use in place of gradients, from :meth:`fisher`.
            calibration: batches that a damping "auto" is judged on, which the Fisher should not
                have seen; None: the first of ``batches`` are kept back.
            scores: those of earlier steps from the same weights with the same ``fisher``.

        Returns:
            What this step did.

        Raises:
            ValueError, TypeError, MemoryError, NumericalError: as for
                :func:`obert_kernels.prune`.
        """
        return self._all_or_nothing(
            lambda rollback: self._step(rollback, sparsity, batches, fisher, calibration, scores)
        )

    def _all_or_nothing(self, call: Callable[[Rollback], T]) -> T:
        """Make a call that leaves model and pruner as they were unless it succeeds."""
        weights = self.config.check(self.model)  # others may stand there by now
        biases = biases_of(self.model, weights) if self.config.reconstruction else {}
        rollback = Rollback(self._whole, {**weights, **biases}, also=[self])

        def from_here() -> T:
            self.weights = weights
            with wrappers_at_rest(self._whole):
                return call(rollback)

        return all_or_nothing(rollback, from_here)

    def _step(
        self,
        rollback: Rollback,
        sparsity: float | Mapping[str, float] | None,
        batches: Iterable[Any] | None,
        fisher: FisherEstimate | None,
        calibration: Iterable[Any] | None,
        scores: ScoreCache | None = None,
    ) -> PruneReport:
        check_batches(batches)
        check_batches(calibration, "calibration")
        check_estimate(fisher)
        check_pruned_are_zero(self.model, self._masks, _REMEDY)
        targets = sparsity_targets(self.config.shape, self.weights, sparsity)
        weights = self.weights
        if isinstance(targets, dict):
            weights = {name: weight for name, weight in weights.items() if name in targets}
        step = PruningStep(
            config=self.config,
            model=self.model,
            weights=weights,
            keep=present_masks(weights, self.config.shape),
            sparsity=targets,
            loss_fn=self.loss_fn,
            batches=batches,
            rollback=rollback,
            clock=Clock(),
            progress=self.progress,
            scores=scores,
        )
        done, notes = self._run(step, fisher, calibration)
        report = report_of(step, done, notes, fisher)
        wanted = self.config.shape.target_sparsity(sparsity)
        report.settings["sparsity"] = dict(wanted) if isinstance(wanted, Mapping) else wanted
        new = done[-1].masks
        self._masks = {
            **self._masks,
            **{name: self.config.shape.matrix(new[name], weights[name]) for name in weights},
        }
        self._relative_damping = done[-1].relative_damping or self._relative_damping
        self._history = [*self._history, report]
        return report

    def _run(
        self,
        step: PruningStep,
        fisher: FisherEstimate | None,
        calibration: Iterable[Any] | None,
    ) -> tuple[list[SubStep], list[str]]:
        """Return what the sub-steps did, and notes."""
        config = self.config
        if not step.prunes_anything:
            nothing = without_fisher(step)
            if config.update != "none":
                nothing = nothing._replace(increase=dict.fromkeys(step.weights, 0.0))
            return [nothing], [NOTHING_TO_PRUNE]
        if not config.uses_fisher:
            step, own = _with_source(_with_lasting_batches(step))
            fitting = self._fitting(step, own, self._judge(calibration))
            return in_steps(step, lambda here, _: without_fisher(here), fitting), []
        if fisher is not None:
            check_estimate_serves(fisher, config, step.weights)
            if config.damping == "auto" and calibration is None:
                raise ValueError(
                    "damping='auto' needs calibration batches (which the Fisher has not seen) "
                    "beside a fisher: pass calibration, or a number"
                )
            judge = self._judge(calibration)
            damping = self._damping(judge)
            step, known = _with_source(step)
            if known is None and fisher.batches:
                known = BatchSource(fisher.batches)
            fitting = self._fitting(step, known, judge)
            return [fitted(step, from_estimate(step, fisher, damping), fitting)], fisher.notes
        if step.batches is None:
            raise ValueError("batches is needed: an iterable of batches, or fisher=an estimate")
        source = BatchSource(step.batches)
        if config.damping == "auto" and calibration is None:
            calibration = source.keep_back()
        judge = self._judge(calibration)
        damping = self._damping(judge)
        fitting = self._fitting(step, source, judge)
        estimation = self._estimation(source, step.weights)

        def one_step(here: PruningStep, done: list[SubStep]) -> SubStep:
            plan = self.plan(streamed=estimation.samples is not None, weights=step.weights)
            return with_estimate(here, estimation, plan, damping.next(done))

        done = in_steps(step, one_step, fitting)
        return done, source.all_notes(config.fisher.num_grads * len(done))

    def _fitting(
        self, step: PruningStep, source: BatchSource | None, judge: Calibration | None
    ) -> Fitting | None:
        """How the remaining weights are fitted after each sub-step, if they are."""
        config = self.config.fit
        if config is None or (source is None and self.config.reconstruction == "auto"):
            return None
        if source is None:
            raise ValueError("batches is needed: a reconstruction looks at batches")
        biases = biases_of(self.model, step.weights)
        return Fitting(config, biases, source, judge, self.max_memory)

    def _judge(self, calibration: Iterable[Any] | None) -> Calibration | None:
        if calibration is None:
            return None
        chooses = self.config.uses_fisher and self.config.damping == "auto"
        use = "the damping is chosen" if chooses else "the fit is judged"
        return Calibration(self.model, calibration, self.loss_fn, use)

    def _damping(self, judge: Calibration | None) -> DampingChoice:
        if not isinstance(self.config.damping, str):
            return DampingChoice(self.config.damping)
        return DampingChoice(None, judge, self._relative_damping)

    def report(self) -> PruneReport:
        """Return what all steps so far did, taken together.

        Raises:
            ValueError: there was none.
        """
        if not self._history:
            raise ValueError("nothing has been pruned yet: call step() first")
        return PruneReport.merged(self._history)

    def state_dict(self) -> dict[str, Any]:
        """Return what a later :meth:`load_state_dict` needs, beside the model's own state."""
        return {
            "version": _STATE_VERSION,
            "config": self.config.to_dict(),
            "relative_damping": self._relative_damping,
            "masks": {name: mask.clone() for name, mask in self.masks.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another pruner of the same model stood; load the model's weights first.

        Raises:
            TypeError: it is no mapping.
            ValueError: it is of other matrices or a later version, or pruned weights of the model
                are not zero.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                "state of a Pruner: what state_dict() returned is needed, got a "
                f"{type(state).__name__}"
            )
        if state.get("version") != _STATE_VERSION:
            raise ValueError(f"state of a Pruner: version {state.get('version')!r} is not known")
        missing = {"config", "masks", "relative_damping"} - state.keys()
        if missing:
            raise ValueError(f"state of a Pruner: it has no {', '.join(sorted(missing))}")
        pattern = PruningConfig.from_dict(state["config"]).pattern
        if pattern != self.config.pattern:
            raise ValueError(
                f"state of a Pruner: its masks have pattern {pattern}, not {self.config.pattern}"
            )
        masks = {name: mask.bool() for name, mask in state["masks"].items()}
        shapes = {name: tuple(weight.shape) for name, weight in self.weights.items()}
        if {name: tuple(mask.shape) for name, mask in masks.items()} != shapes:
            raise ValueError("state of a Pruner: it is of other matrices than this model's")
        check_pruned_are_zero(self.model, masks, _REMEDY)
        placed = {name: masks[name].to(self.weights[name].device) for name in self.weights}
        vars(self).update(_masks=placed, _relative_damping=state["relative_damping"])


def _with_lasting_batches(step: PruningStep) -> PruningStep:
    """The same with batches that every sub-step may look at."""
    if step.config.steps > 1 and isinstance(step.batches, Iterator):
        return replace(step, batches=list(step.batches))
    return step


def _with_source(step: PruningStep) -> tuple[PruningStep, BatchSource | None]:
    """The same, and a source for its reconstruction: neither uses up the other's batches."""
    if step.config.reconstruction is not None and isinstance(step.batches, Iterator):
        own, others = tee(step.batches)
        return replace(step, batches=own), BatchSource(others)
    return step, None if step.batches is None else BatchSource(step.batches)
