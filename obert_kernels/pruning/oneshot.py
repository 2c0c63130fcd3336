"""One-shot pruning: model -> gradients -> Fisher -> scores -> masks -> update."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fisher.estimate import FisherEstimate, check_request
from ..fisher.estimators import estimators
from ..gradients.losses import LossFn, default_loss
from ..gradients.source import hold_out, open_source
from ..ops.checks import check_positive
from ..progress import Clock, Progress, silent
from ..sparsity.layers import find_weights, match_names
from ..sparsity.masks import check_sparsity
from ..sparsity.patterns import find_pattern
from .passes import Limits, Step, from_estimate, in_steps, with_estimate, without_fisher
from .report import LayerReport, PruneReport
from .saliencies import own_update, uses_fisher
from .step import Job
from .weights import present_masks


class PruneResult(NamedTuple):
    """What :func:`prune` returns.

    Attributes:
        model: the model given, pruned in place.
        masks: parameter name to bool tensor of its shape, True for the survivors.
        report: figures per layer, times, memory.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    report: PruneReport


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    sparsity: float | Mapping[str, float] | None = None,
    pattern: str = "unstructured",
    *,
    num_grads: int = 1024,
    samples_per_grad: int | None = None,
    block_size: int | None = None,
    damping: float | str = "auto",
    calibration: Iterable[Any] | None = None,
    params: str | Iterable[str] | None = None,
    loss_fn: LossFn | None = None,
    selection: str = "greedy",
    update: str | None = None,
    scope: str = "global",
    steps: int = 1,
    schedule: str = "geometric",
    estimator: str = "gram",
    fisher: FisherEstimate | None = None,
    fisher_dtype: torch.dtype = torch.float64,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a model in place, in one shot, with second-order information (oBERT).

    Args:
        model: any module; nothing of it changes if the call fails or is interrupted.
        batches: an iterable of batches, one gradient each; started over when it ends before
            ``num_grads``.  Mappings are passed as ``model(**batch)`` and must give ``.logits`` of
            classes or ``.loss``; anything else needs ``loss_fn``.
        sparsity: share of weights to be zero, counted over all pruned matrices; or a mapping
            from name or ``re:`` pattern to the sparsity of each matrix it matches.  Default 0.8,
            or what an N:M pattern prescribes.
        pattern: "unstructured"; "block4" (any "block<c>"): c consecutive weights along the input
            dimension live or die together; "block4x1" (any "block<c>x1"): c along the output
            dimension, along which the Fisher blocks then run, too; "2:4" (any N:M up to 16): at
            most 2 of every 4 weights along the input dimension survive.
        num_grads: m, number of gradients.
        samples_per_grad: None: each batch gives one gradient.  g: one backward pass gives a
            gradient of every g samples of its batch, so large batches are best (64 g samples);
            the loss must be a mean over samples.
        block_size: B, 1 to 256, weights per Fisher block; a multiple of M for N:M patterns.
            Default 50, or the multiple of M below.
        damping: added to the diagonal of the Fisher.  "auto": chosen by trial prunings, the one
            that moves the probabilities of the classes least on the calibration batches (the loss,
            where there are no classes; :mod:`obert_kernels.pruning.damping`).
        calibration: batches for these trials, which the Fisher should not have seen; None: the
            first of ``batches``, some 256 samples, a quarter at most if their number is known, are
            kept back.
        params: names or ``re:`` patterns of the matrices; None: encoder linear layers.
        loss_fn: ``loss_fn(model, batch)``, a scalar, the mean of something over the samples, that
            gradients are taken of.  None: :func:`prediction_loss` for models that give each sample
            one of several classes, which needs no labels, and the model's own loss for others.
            :func:`model_loss`: always the model's own, as in the papers.
        selection: "greedy" ranks by what exact removals one after the other cost inside each
            block (for N:M: removes from each M-group the set that costs least); "diagonal"
            (oBERT's) by the OBS saliency of each weight or group as if it went alone; "magnitude"
            by size (needs no batches unless an update is asked for); or what
            :func:`register_saliency` was given.
        update: how survivors make up for the pruned: "joint" (exact inside each block), "sum"
            (oBERT's), or "none".  Default: "sum" for the diagonal selection, "none" for magnitude
            and others that use no Fisher, else "joint".
        scope: "global" for one ranking over all matrices, "layer" for one in each.
        steps: sub-steps R; in each the Fisher of the weights that are left is estimated anew,
            from ``num_grads`` further gradients of the model as it is by then; a selection without
            a Fisher is asked anew.
        schedule: "geometric" takes the same share of what is left in each sub-step, "linear"
            the same number of weights.
        estimator: "gram"; "refilled": the same, but where weights are gone already the others are
            cut into full blocks anew (:mod:`obert_kernels.fisher.living` says when that is
            better); or what :func:`register_fisher` was given.
        fisher: an :func:`estimate_fisher` of this model to use instead of batches; what belongs to
            the estimate (``num_grads``, ``samples_per_grad``, ``block_size``, ``estimator``,
            ``fisher_dtype``, ``max_memory``) is then the fisher's.  ``damping="auto"`` needs
            ``calibration`` with it.
        fisher_dtype: type of the Gram, float64 or float32.
        max_memory: bytes the call may use on top of the model; matrices are then worked on in
            several passes over the same batches.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        The model, its masks and a report.

    Raises:
        ValueError: an argument is out of range or does not fit the model, the batches give no
            finite loss or gradient, or they are too few.
        TypeError: no loss could be had from a batch, or an argument, or a matrix, has a type that
            cannot be worked with.
        MemoryError: the call would not fit; the message gives the figures and the remedies.
        NumericalError: a Fisher block is not positive definite, or new weights (with damping
            "auto": what the model makes of the calibration batches) are not finite.
    """
    loss_fn = loss_fn or default_loss
    check_request(batches, num_grads, samples_per_grad, fisher_dtype)
    kind = estimators.find(estimator)
    if damping != "auto":
        if isinstance(damping, str):
            raise ValueError(f"damping must be a positive number or 'auto', got {damping!r}")
        if not isinstance(damping, Real):
            raise TypeError(f"damping must be a positive number or 'auto', got {damping!r}")
        damping = float(damping)
        check_positive("damping", damping)
    update = own_update(selection) if update is None else update
    needs_fisher = uses_fisher(selection, update)
    if update not in ("sum", "joint", "none"):
        raise ValueError(f"update must be 'sum', 'joint' or 'none', got {update!r}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    shape = find_pattern(pattern)
    if fisher is not None:
        block_size = fisher.block_size
    block_size = shape.block_size(block_size)
    sparsity = shape.prescribed(sparsity)
    weights, targets = _targets(model, sparsity, params, fisher)
    for name, weight in weights.items():
        shape.check(name, weight)
    job = Job(
        model=model,
        weights=weights,
        keep=present_masks(weights, shape),
        sparsity=targets,
        pattern=shape,
        damping=damping if isinstance(damping, float) else 0.0,
        selection=selection,
        update=update,
        scope=scope,
        clock=Clock(),
        progress=progress or silent,
        batches=batches,
        loss_fn=loss_fn,
    )
    job.sub_sparsities(steps, schedule)  # finds fault with them
    notes: list[str] = []
    if not job.prunes_anything:
        done = [without_fisher(job)]
    elif not needs_fisher:
        if steps > 1 and isinstance(batches, Iterator):
            job.batches = list(batches)  # which every step may look at
        done = in_steps(job, steps, schedule, without_fisher)
    elif fisher is not None:
        if steps != 1:
            raise ValueError("steps needs batches for a new Fisher in each; leave fisher out")
        if fisher.pattern.order != shape.order:
            raise ValueError(
                f"the blocks of fisher have their weights in another order than pattern {pattern}; "
                f"call estimate_fisher with pattern={pattern!r}"
            )
        if damping == "auto":
            if calibration is None:
                raise ValueError(
                    "damping='auto' needs calibration batches (which the Fisher has not seen) "
                    "beside a fisher: pass calibration, or a number"
                )
            job.calibration = _calibration(calibration)
        done, notes = [from_estimate(job, fisher)], fisher.notes
    else:
        if batches is None:
            raise ValueError("batches is needed: an iterable of batches, or fisher=an estimate")
        held_notes: list[str] = []
        kept_back = 0
        if damping == "auto":
            if calibration is not None:
                job.calibration = _calibration(calibration)
            else:
                job.calibration, batches, held_notes = hold_out(batches)
                kept_back = 0 if held_notes else len(job.calibration)
        source = open_source(
            model, batches, weights, num_grads, samples_per_grad, loss_fn, shape,
            goes_on=steps > 1, kept_back=kept_back,
        )  # fmt: skip
        source.notes += held_notes
        limits = Limits(kind, block_size, fisher_dtype, max_memory, steps > 1)
        done = in_steps(job, steps, schedule, partial(with_estimate, source=source, limits=limits))
        notes = source.all_notes(len(done))
    settings = {
        "sparsity": dict(sparsity) if isinstance(sparsity, Mapping) else sparsity,
        "pattern": pattern,
        "num_grads": fisher.num_grads if fisher else num_grads,
        "samples_per_grad": fisher.samples_per_grad if fisher else samples_per_grad,
        "block_size": block_size,
        "damping": done[-1].damping,
        "selection": selection,
        "update": update,
        "scope": scope,
        "steps": steps,
        "schedule": schedule if steps > 1 else None,
    }
    masks = {name: shape.matrix(done[-1].masks[name], w) for name, w in weights.items()}
    return PruneResult(model, masks, _report(job, done, settings, notes))


def _calibration(batches: Iterable[Any]) -> list[Any]:
    found = list(batches)
    if not found:
        raise ValueError(
            "calibration is empty: pass batches to choose the damping on (an iterator may be used "
            "up), or a number as damping"
        )
    return found


def _targets(
    model: nn.Module,
    sparsity: float | Mapping[str, float],
    params: str | Iterable[str] | None,
    fisher: FisherEstimate | None,
) -> tuple[dict[str, nn.Parameter], float | dict[str, float]]:
    """Return the matrices to prune and the sparsity of all, or of each."""
    if params is None and fisher is not None:
        params = list(fisher.fishers)
    if isinstance(sparsity, Mapping):
        everything = find_weights(model, params if params is not None else list(sparsity))
        targets: dict[str, float] = {}
        for pattern, value in sparsity.items():
            for name in match_names(everything, [pattern]):
                if targets.setdefault(name, check_sparsity(value)) != value:
                    raise ValueError(f"sparsity: {name} is matched twice, with different values")
        weights = {name: everything[name] for name in everything if name in targets}
        result: float | dict[str, float] = targets
    else:
        weights = find_weights(model, params)
        result = check_sparsity(sparsity)
    if fisher is not None:
        for name, weight in weights.items():
            known = fisher.fishers.get(name)
            if known is None or known.num_weights != weight.numel():
                raise ValueError(f"fisher has no estimate for {name}; estimate it with this model")
    return weights, result


def _report(job: Job, steps: list[Step], settings: dict[str, Any], notes: list[str]) -> PruneReport:
    def increase(name: str) -> float | None:
        parts = [step.increase[name] for step in steps]
        return None if None in parts else float(sum(part or 0.0 for part in parts))

    masks = steps[-1].masks
    layers = [
        LayerReport(name, list(w.shape), w.numel(), int((~masks[name]).sum()), increase(name))
        for name, w in job.weights.items()
    ]
    memory = {}
    plan = steps[0].plan
    if plan is not None:
        memory = {
            "gram": plan.gram_bytes,
            "gathered gradients": plan.buffer_bytes,
            "other": plan.other_bytes,
            "passes": len(plan.passes),
        }
    if all(torch.equal(masks[name], job.keep[name]) for name in masks):
        notes = [
            *notes,
            "the model was at least this sparse already; nothing was pruned or revived",
        ]
    trials = [
        trial._replace(step=index + 1) for index, step in enumerate(steps) for trial in step.trials
    ]
    return PruneReport(layers, settings, job.clock.seconds, memory, notes, trials)
