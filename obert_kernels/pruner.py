"""One-shot pruning: model -> gradients -> Fisher -> scores -> masks -> update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._checks import check_positive
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
from .layers import find_weights, match_names
from .masks import check_sparsity, group_size_of, magnitude_scores, prunes_anything, select_masks
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


def _present_masks(weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: weight.detach() != 0 for name, weight in weights.items()}


@dataclass
class _Job:
    """Everything the stages of one call share."""

    model: nn.Module
    weights: dict[str, nn.Parameter]
    keep: dict[str, Tensor]
    sparsity: float | dict[str, float]
    group_size: int
    damping: float
    update: str
    scope: str
    clock: Clock
    progress: Progress

    def masks(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with self.clock.stage("masks"):
            return select_masks(scores, self.keep, self.sparsity, self.group_size, self.scope)

    @property
    def ranks_each_layer_alone(self) -> bool:
        return self.scope == "layer" or isinstance(self.sparsity, dict)

    @property
    def prunes_anything(self) -> bool:
        """Is any target above the present sparsity?  Otherwise there is nothing to estimate."""
        return prunes_anything(self.keep, self.sparsity, self.group_size, self.scope)

    def score(self, fishers: Mapping[str, GramFisher]) -> dict[str, Tensor]:
        scores = {}
        with self.clock.stage("scores"):
            for index, (name, fisher) in enumerate(fishers.items()):
                weight = self.weights[name].detach().flatten()
                scores[name] = fisher.scores(weight, self.damping, self.group_size)
                self.progress("scores", index + 1, len(fishers))
        return scores

    def apply(
        self, fishers: Mapping[str, GramFisher] | None, masks: Mapping[str, Tensor]
    ) -> dict[str, tuple[Tensor, float | None]]:
        """New weights and predicted increase of the matrices with a Fisher (or with a mask)."""
        new: dict[str, tuple[Tensor, float | None]] = {}
        names = list(masks if fishers is None else fishers)
        with self.clock.stage("update"):
            for index, name in enumerate(names):
                weight = self.weights[name].detach()
                if fishers is None or self.update == "none":
                    new[name] = (weight * masks[name], None)
                else:
                    flat, increase = fishers[name].update(
                        weight.flatten(),
                        masks[name].flatten(),
                        self.damping,
                        self.group_size,
                        self.update,
                    )
                    new[name] = (flat.view(weight.shape), increase)
                self.progress("update", index + 1, len(names))
        return new


def _commit(weights: Mapping[str, nn.Parameter], new: Mapping[str, Tensor]) -> None:
    """Write all new weights, or on any interruption none."""
    for name, value in new.items():
        if not bool(torch.isfinite(value).all()):
            raise ArithmeticError(
                f"the update of {name} left the range of {value.dtype}; raise damping"
            )
    old: dict[str, Tensor] = {}  # in the memory of `new`, so that nothing more is needed
    in_flight: tuple[str, Tensor] | None = None
    try:
        for name, value in new.items():
            weight = weights[name].detach()
            in_flight = (name, weight.clone())
            weight.copy_(value)
            value.copy_(in_flight[1])
            old[name] = value
    except BaseException:
        if in_flight is not None:
            old[in_flight[0]] = in_flight[1]
        for name, value in old.items():
            weights[name].detach().copy_(value)
        raise


def prune(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    sparsity: float | Mapping[str, float] = 0.8,
    pattern: str = "unstructured",
    *,
    num_grads: int = 1024,
    samples_per_grad: int | None = None,
    block_size: int = 50,
    damping: float = 1e-7,
    params: str | Iterable[str] | None = None,
    loss_fn: LossFn | None = None,
    selection: str = "diagonal",
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
        damping: added to the diagonal of the Fisher.
        params: names or ``re:`` patterns of the matrices; None: encoder linear layers.
        loss_fn: ``loss_fn(model, batch)`` returning the scalar task loss.
        selection: "diagonal" ranks by the OBS saliency of each weight or group; "magnitude"
            by its size (needs no batches unless an update is asked for).
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
    check_positive("damping", damping)
    if selection not in ("diagonal", "magnitude"):
        raise ValueError(f"selection must be 'diagonal' or 'magnitude', got {selection!r}")
    update = update or ("none" if selection == "magnitude" else "joint")
    if update not in ("sum", "joint", "none"):
        raise ValueError(f"update must be 'sum', 'joint' or 'none', got {update!r}")
    if scope not in ("global", "layer"):
        raise ValueError(f"scope must be 'global' or 'layer', got {scope!r}")
    group_size = group_size_of(pattern)
    weights, targets = _targets(model, sparsity, params, fisher)
    _check_groups(weights, group_size)
    job = _Job(
        model=model,
        weights=weights,
        keep=_present_masks(weights),
        sparsity=targets,
        group_size=group_size,
        damping=damping,
        update=update,
        scope=scope,
        clock=Clock(),
        progress=progress or silent,
    )
    needs_fisher = (selection == "diagonal" or update != "none") and job.prunes_anything
    plan: Plan | None = None
    notes: list[str] = []
    if not needs_fisher:
        masks = job.masks({name: magnitude_scores(w, group_size) for name, w in weights.items()})
        changes = job.apply(None, masks)
    elif fisher is not None:
        plan, notes = fisher.plan, fisher.notes
        masks, changes = _from_estimate(job, {n: fisher.fishers[n] for n in weights}, selection)
    else:
        if batches is None:
            raise ValueError("batches is needed: an iterable of batches, or fisher=an estimate")
        source = open_source(model, batches, weights, num_grads, samples_per_grad, loss_fn)
        plan = plan_passes(
            weights, block_size, fisher_dtype, max_memory, num_grads, source.group is not None
        )
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
        masks, changes = _in_passes(job, plan, estimate, selection)
    _commit(weights, {name: new for name, (new, _) in changes.items()})
    settings = {
        "sparsity": dict(sparsity) if isinstance(sparsity, Mapping) else sparsity,
        "pattern": pattern,
        "num_grads": fisher.num_grads if fisher else num_grads,
        "samples_per_grad": fisher.samples_per_grad if fisher else samples_per_grad,
        "block_size": next(iter(fisher.fishers.values())).block_size if fisher else block_size,
        "damping": damping,
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


def _rank(job: _Job, fishers: Mapping[str, GramFisher], selection: str) -> dict[str, Tensor]:
    if selection == "magnitude":
        return {name: magnitude_scores(job.weights[name], job.group_size) for name in fishers}
    return job.score(fishers)


def _from_estimate(job: _Job, fishers: Mapping[str, GramFisher], selection: str) -> tuple:
    masks = job.masks(_rank(job, fishers, selection))
    return masks, job.apply(fishers, masks)


def _in_passes(
    job: _Job,
    plan: Plan,
    estimate: Callable[[list[str]], dict[str, GramFisher]],
    selection: str,
) -> tuple[dict[str, Tensor], dict[str, tuple[Tensor, float | None]]]:
    """Score and update pass by pass, holding the Grams of one pass at a time.

    One ranking over all matrices needs every score before the first update, so the passes
    are run again for the updates, all but the last, whose Grams are still there.
    """
    masks: dict[str, Tensor] = {}
    changes: dict[str, tuple[Tensor, float | None]] = {}
    if job.ranks_each_layer_alone:
        for names in plan.passes:
            fishers = estimate(names)
            found = job.masks(_rank(job, fishers, selection))
            masks |= found
            changes |= job.apply(fishers, found)
            del fishers
        return masks, changes
    scores: dict[str, Tensor] = {}
    fishers = {}
    for names in plan.passes:
        fishers.clear()  # frees the Grams of the pass before
        fishers.update(estimate(names))
        scores |= _rank(job, fishers, selection)
    masks = job.masks(scores)
    scores.clear()
    for index, names in enumerate(reversed(plan.passes)):
        if index > 0 and job.update != "none":
            fishers.clear()
            fishers.update(estimate(names))
        part = {name: masks[name] for name in names}
        changes |= job.apply(None if job.update == "none" else fishers, part)
    return masks, {name: changes[name] for name in job.weights}


def _report(
    job: _Job,
    masks: Mapping[str, Tensor],
    changes: Mapping[str, tuple[Tensor, float | None]],
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
    return PruneReport(layers, settings, job.clock.seconds, memory, notes)
