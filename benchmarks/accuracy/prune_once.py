"""One pruning at one point: with the package, or as oBERT's authors published it."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from benchmarks.accuracy.experiment import Point, reconstruction
from benchmarks.accuracy.sparsegpt import prune_as_sparsegpt
from benchmarks.accuracy.tables import Row
from benchmarks.support.contender import prune_as_reference
from obert_kernels import PruneReport, prune
from obert_kernels.gradients.losses import LossFn
from obert_kernels.tasks.batches import fisher_batches, tokens_at_once
from obert_kernels.tasks.classification import ClassificationTask


def loss_and_batches(
    task: ClassificationTask, point: Point, one_by_one: bool = False
) -> tuple[LossFn, Callable[..., list[Any]]]:
    """What gradients are taken of, and what returns the batches for m gradients of g texts.

    Args:
        one_by_one: one gradient in a batch, in place of as many as fit.
    """
    gradients_of = point.get("gradients_of", "predictions")
    by_length = point.get("by_length", gradients_of == "predictions")
    tokens = 1 if one_by_one else tokens_at_once(task.model.config.hidden_size)

    def batches(num_grads: int, texts_per_grad: int, steps: int = 1) -> list[Any]:
        return fisher_batches(
            task.tokenizer, task.data.train, num_grads, texts_per_grad, steps=steps,
            max_length=task.max_length, max_tokens=tokens, by_length=by_length, seed=task.seed,
        )  # fmt: skip

    return replace(task, gradients_of=gradients_of).loss_fn, batches


def prepared(task: ClassificationTask, point: Point) -> Callable[[], PruneReport]:
    """Everything but the pruning, which the returned function does."""
    num_grads, steps = point["texts"] // point["texts_per_grad"], point.get("steps", 1)
    loss_fn, batches_of = loss_and_batches(task, point)
    fit = reconstruction(point)
    if point["selection"] == "sparsegpt":
        texts = batches_of(num_grads, point["texts_per_grad"])
        return lambda: (
            prune_as_sparsegpt(task.model, texts, point["sparsity"], point["pattern"]).report
        )
    looks_at_none = point["selection"] == "magnitude" and fit is None
    batches = None if looks_at_none else batches_of(num_grads, point["texts_per_grad"], steps)
    options = {n: point[n] for n in ("pattern", "selection", "schedule", "estimator") if n in point}
    options["fisher_dtype"] = getattr(torch, point.get("fisher_dtype", "float64"))
    if point["selection"] == "diagonal":
        options["update"] = "sum"
    if point.get("damping", "auto") != "auto":
        options["damping"] = point["damping"]
    if fit is not None or (point["selection"] == "greedy" and "damping" not in options):
        options["calibration"] = task.damping_batches()
    return lambda: prune(
        task.model, batches, point["sparsity"], num_grads=num_grads,
        samples_per_grad=point["texts_per_grad"], steps=steps, loss_fn=loss_fn, reconstruction=fit,
        **options,
    ).report  # fmt: skip


@contextmanager
def prune_once(task: ClassificationTask, point: Point) -> Iterator[Row]:
    """Prune, and put the model back when the block ends."""
    dense = {name: value.clone() for name, value in task.model.state_dict().items()}
    try:
        report = prepared(task, point)()
        dampings = [trial.relative for trial in report.damping_trials if trial.chosen]
        yield {"dampings": dampings, **stages(report.seconds)}
    finally:
        task.model.load_state_dict(dense)


def stages(seconds: dict[str, float]) -> Row:
    row = {f"{name}_seconds": seconds.get(name, 0.0) for name in ("gradients", "fisher", "damping")}
    selection = sum(seconds.get(name, 0.0) for name in ("scores", "masks", "update"))
    row["selection_seconds"] = selection
    fitted = seconds.get("reconstruction")
    return row if fitted is None else {**row, "reconstruction_seconds": fitted}


def prune_whole(task: ClassificationTask, point: Point) -> Row:
    """Seconds of the pruning alone, peak memory of this process, and accuracy."""
    reference = point["selection"] == "reference"
    work = prepared_reference(task, point) if reference else prepared(task, point)
    start = time.perf_counter()
    done = work()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    accuracy = task.evaluate(task.model, "test").accuracy
    by_stage = stages(done.seconds if isinstance(done, PruneReport) else done)
    return {"test_accuracy": accuracy, "seconds": seconds, **by_stage, "peak_gib": peak}


def prepared_reference(task: ClassificationTask, point: Point) -> Callable[[], dict[str, float]]:
    """The published procedure: one backward pass, einsum and baddbmm for each gradient."""
    loss_fn, batches_of = loss_and_batches(task, point, one_by_one=True)
    g = point["texts_per_grad"]
    batches = batches_of(point["texts"] // g, g)
    return lambda: prune_as_reference(
        task.model, batches, loss_fn, point["sparsity"], point["damping"]
    )
