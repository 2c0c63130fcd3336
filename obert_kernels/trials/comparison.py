"""Pruning by magnitude and with second-order information at several sparsities, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..fisher.estimate import estimate_fisher
from ..fisher.estimators import estimators
from ..fisher.memory import plan_passes
from ..gradients.losses import LossFn
from ..progress import Progress
from ..pruning.oneshot import PruneResult, prune
from ..pruning.report import Trial
from ..pruning.saliencies import uses_fisher
from ..sparsity.layers import find_weights
from ..sparsity.patterns import find_pattern
from ..tasks.loaders import Batch
from ..tasks.precision import prediction_text_loss
from .scored_once import score_once


@dataclass(frozen=True)
class Measurement:
    """One line of the table of :func:`compare`.

    Attributes:
        method: "magnitude" or "obert_kernels".
        target: the sparsity asked for.
        sparsity: share of pruned weights reached, over the pruned matrices.
        accuracy: on the test texts, as a fraction.
        predicted_increase: see :class:`obert_kernels.LayerReport`.
        damping: of the Fisher; None without one.
    """

    method: str
    target: float
    sparsity: float
    accuracy: float
    predicted_increase: float | None
    damping: float | None


def compare(
    model: nn.Module,
    batches: Sequence[Batch],
    evaluate: Callable[[nn.Module], float],
    sparsities: Sequence[float],
    options: Mapping[str, Any],
    *,
    num_grads: int,
    calibration: Sequence[Batch] = (),
    samples_per_grad: int | None = None,
    block_size: int = 50,
    loss_fn: LossFn = prediction_text_loss,
    fisher_dtype: torch.dtype = torch.float64,
    max_memory: int | None = None,
    recover: Callable[[PruneResult], None] | None = None,
    on_result: Callable[[Measurement, PruneResult], None] | None = None,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Prune at each sparsity by magnitude and by second order, always from the same weights.

    The Fisher is estimated once, from ``batches``, for all sparsities (once for each where
    ``max_memory`` does not hold all of it, or where pruning takes several steps).  The weights
    are put back at the end.

    Args:
        model: what to prune.
        batches: for the Fisher.
        evaluate: called with the pruned model; returns its accuracy.
        sparsities: shares of weights to remove.
        options: further arguments of :func:`obert_kernels.prune`: pattern, damping, update,
            scope, params, steps, schedule, selection, estimator.
        num_grads: m, gradients in the Fisher.
        calibration: batches that damping "auto" is chosen on, at the highest sparsity (in
            several steps or passes at each).
        samples_per_grad: see :func:`obert_kernels.prune`.
        block_size: weights per Fisher block.
        loss_fn: what the gradients are taken of.
        fisher_dtype: type of the Gram, float64 or float32.
        max_memory: bytes, see :func:`obert_kernels.prune`.
        recover: called after each pruning, for example to fine-tune under the masks.
        on_result: called after each evaluation, while the model is pruned.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        ValueError, MemoryError, NumericalError: as :func:`obert_kernels.prune`.
    """
    dense = {name: value.detach().clone() for name, value in model.state_dict().items()}
    shared = {"pattern": options["pattern"], "scope": options["scope"]}
    magnitude = {**shared, "params": options["params"], "selection": "magnitude", "update": "none"}
    second_order = {
        **options,
        "batches": batches,
        "calibration": calibration,
        "loss_fn": loss_fn,
    }
    estimation: dict[str, Any] = {
        "num_grads": num_grads,
        "samples_per_grad": samples_per_grad,
        "block_size": block_size,
        "fisher_dtype": fisher_dtype,
        "loss_fn": loss_fn,
    }
    weights = find_weights(model, options["params"])
    estimator = second_order.pop("estimator", "gram")
    passes = 0
    if uses_fisher(options.get("selection", "greedy"), options["update"]):
        plan = plan_passes(
            weights,
            block_size,
            fisher_dtype,
            max_memory,
            num_grads,
            streamed=samples_per_grad is not None,
            pattern=find_pattern(options["pattern"]),
            estimator=estimators.find(estimator),
        )
        passes = len(plan.passes)
    if passes == 1 and options.get("steps", 1) == 1:
        second_order["fisher"] = estimate_fisher(
            model,
            batches,
            params=options["params"],
            pattern=options["pattern"],
            estimator=estimator,
            progress=progress,
            **estimation,
        )
        score_once(second_order["fisher"], next(iter(weights.values())).device, max_memory)
    elif passes:
        second_order |= {"max_memory": max_memory, "estimator": estimator, **estimation}
    trials: list[Trial] = []
    table = []
    try:
        if options["damping"] == "auto" and "fisher" in second_order:
            # Where most is removed the damping matters most; elsewhere it may be the same.
            report = prune(
                model, sparsity=max(sparsities), progress=progress, **second_order
            ).report
            second_order["damping"] = report.settings["damping"] or "auto"
            trials = report.damping_trials
        for sparsity in sorted(sparsities):
            for method, arguments in (("magnitude", magnitude), ("obert_kernels", second_order)):
                model.load_state_dict(dense)
                result = prune(model, sparsity=sparsity, progress=progress, **arguments)
                if method != "magnitude" and trials:
                    result.report.damping_trials = trials
                if recover is not None:
                    recover(result)
                row = Measurement(
                    method,
                    sparsity,
                    result.report.sparsity,
                    evaluate(model),
                    result.report.predicted_increase,
                    result.report.settings["damping"],
                )
                table.append(row)
                if on_result is not None:
                    on_result(row, result)
    finally:
        model.load_state_dict(dense)
    return table
