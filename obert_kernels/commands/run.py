"""The run behind the command line: load, fine-tune, prune at every sparsity, save."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..deploy import checkpoints
from ..files import REPORT_FILE, check_replaceable, whole_folder, write_json
from ..fisher.estimators import estimators
from ..fisher.memory import plan_passes
from ..progress import Progress
from ..pruning.oneshot import PruneResult, prune
from ..pruning.saliencies import own_update, uses_fisher
from ..sparsity.layers import find_weights
from ..sparsity.masks import check_sparsity
from ..sparsity.patterns import find_pattern
from ..tasks.task import Task
from ..trials.comparison import Measurement, compare
from .config import Settings, check_output, load_task, plain
from .plots import plot_accuracy

PLOT_FILE = "accuracy.png"


def prune_classifier(
    settings: Settings, progress: Progress | None = None, echo: Callable[[str], object] = print
) -> dict[str, Any]:
    """Load, fine-tune if asked, prune at every sparsity, and save; what the commands do.

    Args:
        settings: of the run.
        progress: called as ``progress(stage, done, total)``.
        echo: called with each finished line of the results.

    Returns:
        The content of the ``report.json`` on top of the output folder.

    Raises:
        ValueError, OSError, MemoryError, ImportError, NumericalError, DownloadError: something
            about the settings, files or installation; the message names it and the remedy.
    """
    started = time.perf_counter()
    update = settings.update
    if update == "auto":
        update = own_update(settings.selection)
    estimators.find(settings.estimator)
    shape = find_pattern(settings.pattern)
    shape.check_steps(settings.steps)
    block_size = shape.block_size(settings.block_size)
    for sparsity in settings.sparsity:
        shape.prescribed(sparsity)
    folders = _check(settings)
    chooses_damping = settings.damping == "auto" and uses_fisher(settings.selection, update)
    task = load_task(settings, hold_back=chooses_damping, progress=progress)
    model = task.model
    task.check_samples(settings.grad_batch_size, "--grad-batch-size")
    options: dict[str, Any] = {
        "pattern": settings.pattern,
        "damping": settings.damping,
        "scope": settings.scope,
        "params": settings.params,
        "steps": settings.steps,
        "schedule": settings.schedule,
    }
    # Removes nothing, but finds fault with the options before the long work does.
    prune(model, sparsity=0.0, selection="magnitude", **{**options, "pattern": "unstructured"})
    weights = find_weights(model, settings.params)
    for name, weight in weights.items():
        shape.check(name, weight)
    fisher_dtype = getattr(torch, settings.fisher_dtype)
    if uses_fisher(settings.selection, update):  # is there room for it?
        plan_passes(
            weights,
            block_size,
            fisher_dtype,
            settings.max_memory,
            settings.num_grads,
            streamed=True,
            pattern=shape,
            estimator=estimators.find(settings.estimator),
            keeps_weights=settings.steps > 1,
        )
    echo(task.describe(settings.params))
    _fine_tune(settings, task)
    dense = task.evaluate(model, "test").accuracy
    echo(f"dense accuracy {dense:.1%}\n\nsparsity  magnitude  obert_kernels  damping")
    rows: list[Measurement] = []

    def on_result(row: Measurement, result: PruneResult) -> None:
        rows.append(row)
        if row.method == "obert_kernels":
            magnitude = rows[-2].accuracy
            damping = "" if row.damping is None else f"{row.damping:.2g}"
            echo(f"{row.sparsity:8.1%}  {magnitude:9.1%}  {row.accuracy:13.1%}  {damping:>7}")
            extra = {
                "model": settings.model,
                "data": settings.data,
                "accuracy": row.accuracy,
                "dense_accuracy": dense,
                "precision": task.facts()["precision"],
            }
            checkpoints.save_pruned(result, task.tokenizer, folders[row.target], extra)
            # Each time: what a run that stops here leaves behind is described.
            _write_summary(settings, task, dense, rows, time.perf_counter() - started)

    def recover(result: PruneResult) -> None:
        _train(settings, task, settings.recovery_epochs, result.masks)

    compare(
        model,
        task.fisher_batches(settings.num_grads, settings.grad_batch_size, settings.steps),
        lambda pruned: task.evaluate(pruned, "test").accuracy,
        list(folders),
        {
            **options,
            "selection": settings.selection,
            "update": update,
            "estimator": settings.estimator,
        },
        num_grads=settings.num_grads,
        calibration=task.damping_batches() if chooses_damping else (),
        samples_per_grad=settings.grad_batch_size,
        block_size=block_size,
        loss_fn=task.loss_fn,
        fisher_dtype=fisher_dtype,
        max_memory=settings.max_memory,
        recover=recover if settings.recovery_epochs else None,
        on_result=on_result,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    report = _write_summary(settings, task, dense, rows, seconds)
    echo(
        f"\n{seconds:.0f} s. Written to {settings.output}: accuracy.png, report.json, and one "
        "checkpoint for each sparsity (load with from_pretrained)"
    )
    return report


def _check(settings: Settings) -> dict[float, Path]:
    """Check what can be checked before any work; return the folder of each sparsity."""
    for name in ("num_grads", "grad_batch_size", "batch_size", "max_length", "steps"):
        if getattr(settings, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least 1, got {getattr(settings, name)}")
    dense = settings.output / "dense"
    folders = {
        check_sparsity(sparsity): settings.output / f"sparsity-{sparsity:g}"
        for sparsity in settings.sparsity
    }
    check_output(settings.output)
    _check_summary_replaceable(settings.output)
    written = [*folders.values(), *([dense] if settings.finetune_epochs > 0 else [])]
    for folder in written:
        check_replaceable(folder)
        for what, source in (("model", settings.model), ("data", settings.data)):
            place = Path(source).resolve()
            if folder.resolve() in (place, *place.parents):
                raise ValueError(
                    f"{folder}, where the {what} is, would be replaced: choose another --output"
                )
    for package in ("transformers", "tqdm", "matplotlib", "safetensors"):
        importlib.import_module(package)  # one that is missing is an error now, not later
    return folders


def _check_summary_replaceable(folder: Path) -> None:
    """Raise FileExistsError if a report on top of the output folder would take a foreign place."""
    if (folder / "config.json").is_file():
        raise FileExistsError(f"--output {folder} holds a model: choose another folder")
    report, plot = folder / REPORT_FILE, folder / PLOT_FILE
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        ours = isinstance(content, dict) and content.keys() >= {"settings", "results"}
    except FileNotFoundError:
        ours, report = not plot.exists(), plot
    except ValueError:
        ours = False
    if not ours:
        raise FileExistsError(
            f"{report} was not written by obert-prune run: choose another --output or move it away"
        )


def _fine_tune(settings: Settings, task: Task) -> None:
    """Fine-tune the dense model, if asked, and save it in the sub-folder ``dense``."""
    if settings.finetune_epochs <= 0:
        return
    _train(settings, task, settings.finetune_epochs)
    with whole_folder(settings.output / "dense") as folder:
        task.model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)
        write_json(folder / REPORT_FILE, {"settings": plain(settings)})


def _train(
    settings: Settings, task: Task, epochs: float, masks: dict[str, torch.Tensor] | None = None
) -> None:
    task.fine_tune(
        epochs, learning_rate=settings.learning_rate, batch_size=settings.batch_size, masks=masks
    )


def _write_summary(
    settings: Settings, task: Task, dense: float, table: Sequence[Measurement], seconds: float
) -> dict[str, Any]:
    """Write ``report.json`` and ``accuracy.png`` on top of the output folder."""
    curves: dict[str, list[tuple[float, float]]] = {"obert_kernels": [], "magnitude": []}
    for row in table:
        curves[row.method].append((row.sparsity, row.accuracy))
    how = "in one shot" if settings.steps == 1 else f"in {settings.steps} steps"
    title = f"{task.title}, pruned {how}"
    if settings.recovery_epochs:
        title += f" + {settings.recovery_epochs:g} epochs of recovery"
    report = {
        "settings": plain(settings),
        **task.facts(),
        "dense_accuracy": dense,
        "results": [asdict(row) for row in table],
        "seconds": seconds,
        "versions": {name: version(name) for name in ("obert-kernels", "torch", "transformers")},
    }
    write_json(settings.output / REPORT_FILE, report)
    plot_accuracy(curves, dense, settings.output / PLOT_FILE, title)
    return report
