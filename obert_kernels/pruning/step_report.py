"""What a pruning step did, as a report."""

from __future__ import annotations

from ..fisher.estimate import FisherEstimate
from .passes import SubStep
from .report import LayerReport, PruneReport, total_or_none
from .step import PruningStep


def report_of(
    step: PruningStep, done: list[SubStep], notes: list[str], fisher: FisherEstimate | None
) -> PruneReport:
    """Return the report of a step, its sub-steps taken together.

    Args:
        step: the whole of it.
        done: what its sub-steps did.
        notes: on batches and Fishers.
        fisher: the estimate that was given, if one was.
    """
    config, masks = step.config, done[-1].masks
    layers = [
        LayerReport(
            name,
            list(weight.shape),
            weight.numel(),
            int((~masks[name]).sum()),
            total_or_none(sub.increase[name] for sub in done),
        )
        for name, weight in step.weights.items()
    ]
    trials = [
        trial._replace(step=index + 1) for index, sub in enumerate(done) for trial in sub.trials
    ]
    fits = [sub.fit for sub in done if sub.fit is not None]
    settings = {
        "sparsity": None,
        "pattern": config.pattern,
        "num_grads": fisher.num_grads if fisher else config.fisher.num_grads,
        "samples_per_grad": fisher.samples_per_grad if fisher else config.fisher.samples_per_grad,
        "block_size": fisher.block_size if fisher else config.fisher.block_size,
        "damping": done[-1].damping,
        "selection": config.selection,
        "update": config.update,
        "scope": config.scope,
        "steps": config.steps,
        "schedule": config.schedule if config.steps > 1 else None,
        "reconstruction": fits[-1].config.to_dict() if fits else None,
    }
    plan = done[0].plan
    notes = list(dict.fromkeys([*notes, *(note for fit in fits for note in fit.notes)]))
    return PruneReport(
        layers,
        settings,
        step.clock.seconds,
        {} if plan is None else plan.to_dict(),
        notes,
        trials,
        [fit.report._replace(step=number) for number, fit in enumerate(fits, 1)],
    )
