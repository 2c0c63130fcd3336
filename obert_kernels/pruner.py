"""One-shot pruning: model -> gradients -> Fisher -> scores -> masks -> update."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import check_positive
from .damping import hold_out
from .estimate import (
    Clock,
    FisherEstimate,
    Progress,
    accumulate,
    check_counts,
    open_source,
    silent,
)
from .fisher import GramFisher
from .gradients import LossFn
from .job import Changes, Job, commit, from_estimate, in_passes, present_masks
from .layers import find_weights, match_names
from .masks import check_sparsity, group_size_of, magnitude_scores
from .memory import Plan, plan_passes
from .report import LayerReport, PruneReport


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
    sparsity: float | Mapping[str, float] = 0.8,
    pattern: str = "unstructured",
    *,
    num_grads: int = 1024,
    samples_per_grad: int | None = None,
    block_size: int = 50,
    damping: float | str = "auto",
    calibration: Iterable[Any] | None = None,
    params: str | Iterable[str] | None = None,
    loss_fn: LossFn | None = None,
    selection: str = "greedy",
    update: str | None = None,
    scope: str = "global",
    fisher: FisherEstimate | None = None,
    fisher_dtype: torch.dtype = torch.float64,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> PruneResult:
    """Prune a model in place, in one shot, with second-order information (oBERT).

    Args:
        model: any module; nothing of it changes if the call fails or is interrupted.
        batches: an iterable of batches, one gradient each; started over when it ends before
            ``num_grads``.  Mappings are passed as ``model(**batch)`` and must give ``.loss``;
            anything else needs ``loss_fn``.
        sparsity: share of weights to be zero, counted over all pruned matrices; or a mapping
            from name or ``re:`` pattern to the sparsity of each matrix it matches.
        pattern: "unstructured", or "block4" (any "block<c>"): c consecutive weights along the
            input dimension live or die together.
        num_grads: m, number of gradients.
        samples_per_grad: None: each batch gives one gradient.  g: one backward pass gives a
            gradient of every g samples of its batch, so large batches are best (64 g samples);
            the loss must be a mean over samples.
        block_size: B, 1 to 256, weights per Fisher block.
        damping: added to the diagonal of the Fisher.  "auto": chosen by trial prunings, the one
            with the least loss on the calibration batches (:mod:`obert_kernels.damping`).
        calibration: batches for these trials, which the Fisher should not have seen; None: some
            256 samples, a quarter at most, are kept back from ``batches``.
        params: names or ``re:`` patterns of the matrices; None: encoder linear layers.
        loss_fn: ``loss_fn(model, batch)`` returning the scalar task loss.
        selection: "greedy" ranks by what exact removals one after the other cost inside each
            block; "diagonal" (oBERT's) by the OBS saliency of each weight or group as if it went
            alone; "magnitude" by size (needs no batches unless an update is asked for).
        update: how survivors make up for the pruned: "joint" (exact inside each block), "sum"
            (oBERT's), or "none".  Default: "joint", and "none" for magnitude.
        scope: "global" for one ranking over all matrices, "layer" for one in each.
        fisher: an :func:`estimate_fisher` of this model to use instead of batches.
        fisher_dtype: type of the Gram, float64 or float32.
        max_memory: bytes the call may use on top of the model; matrices are then worked on in
            several passes over the same batches.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        The model, its masks and a report.

    Raises:
        ValueError: an argument is out of range or does not fit the model, the batches give no
            finite loss or gradient, or they are too few.
        TypeError: no loss could be had from a batch.
        MemoryError: the call would not fit; the message gives the figures and the remedies.
        NumericalError: a Fisher block is not positive definite.
    """
    check_counts(num_grads, block_size, samples_per_grad)
    if damping != "auto":
        if isinstance(damping, str):
            raise ValueError(f"damping must be a positive number or 'auto', got {damping!r}")
        damping = float(damping)
        check_positive("damping", damping)
    if selection not in ("greedy", "diagonal", "magnitude"):
        raise ValueError(
            f"selection must be 'greedy', 'diagonal' or 'magnitude', got {selection!r}"
        )
    update = update or ("none" if selection == "magnitude" else "joint")
    if update not in ("sum", "joint", "none"):
        raise ValueError(f"update must be 'sum', 'joint' or 'none', got {update!r}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    group_size = group_size_of(pattern)
    weights, targets = _targets(model, sparsity, params, fisher)
    _check_groups(weights, group_size)
    job = Job(
        model=model,
        weights=weights,
        keep=present_masks(weights),
        sparsity=targets,
        group_size=group_size,
        damping=damping if isinstance(damping, float) else 0.0,
        selection=selection,
        update=update,
        scope=scope,
        clock=Clock(),
        progress=progress or silent,
        loss_fn=loss_fn,
    )
    needs_fisher = (selection != "magnitude" or update != "none") and job.prunes_anything
    plan: Plan | None = None
    notes: list[str] = []
    if not needs_fisher:
        masks = job.masks({name: magnitude_scores(w, group_size) for name, w in weights.items()})
        changes = job.apply(None, masks)
    elif fisher is not None:
        if damping == "auto":
            if calibration is None:
                raise ValueError(
                    "damping='auto' needs calibration batches (which the Fisher has not seen) "
                    "beside a fisher: pass calibration, or a number"
                )
            job.calibration = list(calibration)
        plan, notes = fisher.plan, fisher.notes
        masks, changes = from_estimate(job, {n: fisher.fishers[n] for n in weights})
    else:
        if batches is None:
            raise ValueError("batches is needed: an iterable of batches, or fisher=an estimate")
        if damping == "auto":
            if calibration is not None:
                job.calibration = list(calibration)
            else:
                job.calibration, batches, notes = hold_out(batches)
        source = open_source(model, batches, weights, num_grads, samples_per_grad, loss_fn)
        plan = plan_passes(
            weights, block_size, fisher_dtype, max_memory, num_grads, source.group is not None
        )
        source.notes += notes
        notes = source.notes

        def estimate(names: list[str]) -> dict[str, GramFisher]:
            return accumulate(
                source,
                {name: weights[name] for name in names},
                plan,
                block_size=block_size,
                dtype=fisher_dtype,
                clock=job.clock,
                progress=job.progress,
            )

        if len(plan.passes) > 1:
            source.hold_batches()
        masks, changes = in_passes(job, plan, estimate)
    commit(weights, {name: new for name, (new, _) in changes.items()})
    settings = {
        "sparsity": dict(sparsity) if isinstance(sparsity, Mapping) else sparsity,
        "pattern": pattern,
        "num_grads": fisher.num_grads if fisher else num_grads,
        "samples_per_grad": fisher.samples_per_grad if fisher else samples_per_grad,
        "block_size": next(iter(fisher.fishers.values())).block_size if fisher else block_size,
        "damping": job.damping if needs_fisher else None,
        "selection": selection,
        "update": update,
        "scope": scope,
    }
    return PruneResult(model, masks, _report(job, masks, changes, settings, plan, notes))


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


def _check_groups(weights: Mapping[str, nn.Parameter], group_size: int) -> None:
    for name, weight in weights.items():
        if weight.shape[1] % group_size:
            raise ValueError(
                f"pattern block{group_size}: the {weight.shape[1]} columns of {name} are not "
                f"divisible by {group_size}; use another pattern or leave it out with params"
            )


def _report(
    job: Job,
    masks: Mapping[str, Tensor],
    changes: Changes,
    settings: dict[str, Any],
    plan: Plan | None,
    notes: list[str],
) -> PruneReport:
    layers = [
        LayerReport(
            name, list(w.shape), w.numel(), w.numel() - int(masks[name].sum()), changes[name][1]
        )
        for name, w in job.weights.items()
    ]
    memory = {}
    if plan is not None:
        memory = {
            "gram": plan.gram_bytes,
            "gathered gradients": plan.buffer_bytes,
            "other": plan.other_bytes,
            "passes": len(plan.passes),
        }
    notes = list(notes)
    if all(torch.equal(masks[name], job.keep[name]) for name in masks):
        notes.append("the model was at least this sparse already; nothing was pruned or revived")
    return PruneReport(
        layers, settings, job.clock.seconds, memory, notes, [t._asdict() for t in job.trials]
    )
