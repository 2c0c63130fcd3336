"""The run behind the command line: load, fine-tune, prune at every sparsity, save."""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..deploy import checkpoints
from ..files import REPORT_FILE, check_replaceable, check_room, expanded, read_json, write_json
from ..ops.status import NumericalError
from ..progress import Progress, silent
from ..pruning.config import PruningConfig
from ..pruning.oneshot import PruneResult
from ..pruning.report import PruneReport
from ..sparsity.layers import find_weights
from ..sparsity.masks import check_sparsity
from ..tasks.task import Task
from ..trials.grid import TrialLoop
from ..trials.outcome import Outcome, Scores
from .config import RunConfig, load_task, plain
from .output import Echo, Notes, check_drawing, decoration, opened_output, try_size
from .plots import plot_accuracy

PLOT_FILE = "accuracy.png"
DENSE_FOLDER = "dense"
_OF_FITS = ("step", "before", "after", "is_kept")
_WRITTEN = r"dense|sparsity-.*|report\.json|accuracy\.png"


def prune_classifier(
    settings: RunConfig, progress: Progress | None = None, echo: Callable[[str], object] = print
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
        KeyboardInterrupt: it was interrupted; the message says what was saved.
    """
    config = settings.pruning_config()
    for sparsity in settings.sparsity:
        config.shape.target_sparsity(sparsity)
    folders = _check(settings)
    note = Notes(echo)
    saved: list[Path] = []
    with opened_output(settings.output, _WRITTEN, note):
        _check_replaceable(settings, folders)
        try:
            return _prune(settings, config, folders, progress, echo, note, saved)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(_kept(settings, folders, saved)) from interrupt


def _kept(settings: RunConfig, folders: Mapping[float, Path], saved: Sequence[Path]) -> str:
    """What a run that is stopped has saved, and how to go on."""
    if not saved:
        return "interrupted: nothing was saved"
    missing = [f"-s {target:g}" for target, folder in folders.items() if folder not in saved]
    message = f"interrupted: {', '.join(map(str, saved))} saved"
    if missing:
        dense = settings.output / DENSE_FOLDER
        model = "" if dense not in saved else f", with {dense} as the model and no fine-tuning"
        message += f"; what is missing is made by a run with {' '.join(missing)}{model}"
    return message


def _prune(
    settings: RunConfig,
    config: PruningConfig,
    folders: Mapping[float, Path],
    progress: Progress | None,
    echo: Echo,
    note: Notes,
    saved: list[Path],
) -> dict[str, Any]:
    """Do the work; ``saved`` gets each folder when it is whole."""
    started = time.perf_counter()
    # What is held back chooses the damping, and judges the fit of the remaining weights.
    holds_back = (config.damping == "auto" and config.uses_fisher) or config.fit is not None
    task = load_task(settings, hold_back=holds_back, progress=progress)
    model = task.model
    task.check_samples(settings.grad_batch_size, "--grad-batch-size")
    rows: list[dict[str, Any]] = []

    def evaluate(pruned: nn.Module) -> Scores:
        return Scores(None, None, task.evaluate(pruned, "test").accuracy)

    def recover(result: PruneResult) -> None:
        _train(settings, task, settings.recovery_epochs, result.masks)

    def on_outcome(row: Outcome) -> None:
        if row.error:
            raise NumericalError(row.error)

    def on_pruned(row: Outcome, result: PruneResult) -> None:
        method = "magnitude" if row.config is magnitude else "obert_kernels"
        rows.append(_row(method, row, result.report))
        if method == "magnitude":
            return
        beside = next(known["accuracy"] for known in rows if known["target"] == row.target)
        damping = "" if row.damping_used is None else f"{row.damping_used:.2g}"
        echo(f"{row.sparsity:8.1%}  {beside:9.1%}  {row.test_accuracy:13.1%}  {damping:>7}")
        note(*result.report.notes)
        extra = {
            "model": settings.model,
            "data": settings.data,
            "accuracy": row.test_accuracy,
            "dense_accuracy": dense,
            "precision": task.facts()["precision"],
        }
        checkpoints.save_pruned(result, task.tokenizer, folders[row.target], extra)
        saved.append(folders[row.target])
        # Each time: what a run that stops here leaves behind is described.
        _write_summary(settings, task, dense, rows, time.perf_counter() - started, note)

    loop = TrialLoop(
        model,
        lambda num_grads, samples: task.fisher_batches(num_grads, samples, settings.steps),
        evaluate,
        task.damping_batches() if holds_back else (),
        task.loss_fn,
        settings.max_memory,
        recover if settings.recovery_epochs else None,
        on_pruned,
        on_outcome,
        one_damping=True,
        progress=progress or silent,
    )
    magnitude = PruningConfig(
        pattern=config.pattern,
        scope=config.scope,
        params=config.params,
        selection="magnitude",
        reconstruction=None,
    )
    trials = [(how, target) for target in sorted(folders) for how in (magnitude, config)]
    loop.check(trials)
    _check_room(settings, model, folders)
    echo(task.describe(settings.params))
    if settings.finetune_epochs > 0:
        saved.append(_fine_tune(settings, task))
    dense = task.evaluate(model, "test").accuracy
    note(*task.doubts(dense))
    echo(f"dense accuracy {dense:.1%}\n\nsparsity  magnitude  obert_kernels  damping")
    loop.run(trials)
    seconds = time.perf_counter() - started
    report = _write_summary(settings, task, dense, rows, seconds, note)
    picture = f"{PLOT_FILE}, " if (settings.output / PLOT_FILE).exists() else ""
    echo(
        f"\n{seconds:.0f} s. Written to {settings.output}: {picture}report.json, and one "
        "checkpoint for each sparsity (load with from_pretrained)"
    )
    return report


def _check(settings: RunConfig) -> dict[float, Path]:
    """Check what can be checked before any work; return the folder of each sparsity."""
    for name in ("num_grads", "grad_batch_size", "batch_size", "max_length", "steps"):
        if getattr(settings, name) < 1:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} must be at least 1, got {getattr(settings, name)}")
    for name in ("finetune_epochs", "recovery_epochs", "learning_rate"):
        if not 0 <= getattr(settings, name) < math.inf:
            option = name.replace("_", "-")
            raise ValueError(
                f"--{option} must be a finite number of at least 0, got {getattr(settings, name)}"
            )
    trainer = ["accelerate"] if settings.finetune_epochs or settings.recovery_epochs else []
    for package in ("transformers", "tqdm", "safetensors", *trainer):
        importlib.import_module(package)  # one that is missing is an error now, not later
    check_drawing()
    folders = {
        check_sparsity(sparsity): settings.output / f"sparsity-{sparsity:g}"
        for sparsity in settings.sparsity
    }
    if len(set(folders.values())) < len(folders):
        raise ValueError(
            f"--sparsity {', '.join(map(str, folders))}: two of them are written alike with six "
            "digits, and one would replace the other"
        )
    return folders


def _written(settings: RunConfig, folders: Mapping[float, Path]) -> list[Path]:
    dense = [settings.output / DENSE_FOLDER] if settings.finetune_epochs > 0 else []
    return [*dense, *folders.values()]


def _check_replaceable(settings: RunConfig, folders: Mapping[float, Path]) -> None:
    """Raise FileExistsError or ValueError if the run would replace what is not its own."""
    _check_summary_replaceable(settings.output)
    for folder in _written(settings, folders):
        for what, source in (("model", settings.model), ("data", settings.data)):
            place = expanded(source).resolve()
            if folder.resolve() in (place, *place.parents):
                raise ValueError(
                    f"{folder}, where the {what} is, would be replaced: choose another --output"
                )
        check_replaceable(folder)


def _check_summary_replaceable(folder: Path) -> None:
    """Raise FileExistsError if a report on top of the output folder would take a foreign place."""
    if (folder / "config.json").is_file():
        raise FileExistsError(f"--output {folder} holds a model: choose another folder")
    report, plot = folder / REPORT_FILE, folder / PLOT_FILE
    try:
        content = read_json(report)
        ours = isinstance(content, dict) and content.keys() >= {"settings", "results"}
    except FileNotFoundError:
        ours, report = not os.path.lexists(plot), plot
    except ValueError:
        ours = False
    if not ours:
        raise FileExistsError(
            f"{report} was not written by obert-prune run: choose another --output or move it away"
        )


def _check_room(settings: RunConfig, model: nn.Module, folders: Mapping[float, Path]) -> None:
    """Raise OSError if what is to be saved does not fit into the output folder."""
    masked = sum(weight.numel() for weight in find_weights(model, settings.params).values())
    size = checkpoints.checkpoint_bytes(model, masked)
    try_size(settings.output, size)
    written = _written(settings, folders)
    new = sum(not folder.exists() for folder in written)
    count = new + (new < len(written))  # one that is replaced stands beside its successor
    check_room(settings.output, count * size, f"{count} checkpoints")


def _fine_tune(settings: RunConfig, task: Task) -> Path:
    """Fine-tune the dense model, save it in the sub-folder ``dense``, and return that."""
    _train(settings, task, settings.finetune_epochs)

    def write(folder: Path) -> None:
        task.model.save_pretrained(folder)
        task.tokenizer.save_pretrained(folder)
        write_json(folder / REPORT_FILE, {"settings": plain(settings)})

    return checkpoints.save_folder(settings.output / DENSE_FOLDER, write, task.model)


def _train(
    settings: RunConfig, task: Task, epochs: float, masks: dict[str, torch.Tensor] | None = None
) -> None:
    task.fine_tune(
        epochs, learning_rate=settings.learning_rate, batch_size=settings.batch_size, masks=masks
    )


def _write_summary(
    settings: RunConfig,
    task: Task,
    dense: float,
    rows: Sequence[Mapping[str, Any]],
    seconds: float,
    note: Notes,
) -> dict[str, Any]:
    """Write ``report.json`` and ``accuracy.png`` on top of the output folder."""
    curves: dict[str, list[tuple[float, float]]] = {"obert_kernels": [], "magnitude": []}
    table = sorted(rows, key=lambda row: (row["target"], row["method"]))
    for row in table:
        curves[row["method"]].append((row["sparsity"], row["accuracy"]))
    how = "in one shot" if settings.steps == 1 else f"in {settings.steps} steps"
    title = f"{task.title}, pruned {how}"
    if settings.recovery_epochs:
        title += f" + {settings.recovery_epochs:g} epochs of recovery"
    report = {
        "settings": plain(settings),
        **task.facts(),
        "dense_accuracy": dense,
        "results": table,
        "seconds": seconds,
        "versions": {name: version(name) for name in ("obert-kernels", "torch", "transformers")},
    }
    write_json(settings.output / REPORT_FILE, report)
    picture = settings.output / PLOT_FILE
    with decoration(picture, note):
        plot_accuracy(curves, dense, picture, title)
    return report


def _row(method: str, outcome: Outcome, report: PruneReport) -> dict[str, Any]:
    """A line of ``report.json``."""
    fits = [{name: getattr(fit, name) for name in _OF_FITS} for fit in report.fits]
    fitted = {"seconds": outcome.reconstruction_seconds, "divergence": fits} if fits else None
    return {
        "method": method,
        "target": outcome.target,
        "sparsity": outcome.sparsity,
        "accuracy": outcome.test_accuracy,
        "predicted_increase": outcome.predicted_increase,
        "damping": outcome.damping_used,
        "reconstruction": fitted,
    }
