"""The run behind the command line: load, fine-tune, prune at every sparsity, save."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ..deploy import checkpoints
from ..extras import import_extra
from ..files import REPORT_FILE, check_replaceable, whole_folder, write_json
from ..fisher.estimators import estimators
from ..fisher.memory import plan_passes
from ..progress import Progress
from ..pruning.oneshot import PruneResult, prune
from ..pruning.saliencies import own_update, uses_fisher
from ..sparsity.layers import find_weights
from ..sparsity.masks import check_sparsity
from ..sparsity.patterns import find_pattern
from ..tasks.batches import (
    calibration_batches,
    check_texts,
    held_back,
    tokens_at_once,
    with_held_back,
)
from ..tasks.classification import describe, load_classifier
from ..tasks.demo_sets import DEMO_PREFIX
from ..tasks.evaluate import accuracy
from ..tasks.fine_tune import fine_tune
from ..tasks.loaders import make_loader
from ..tasks.precision import LOSSES
from ..tasks.readers import load_text_data
from ..tasks.text_data import TextData
from ..trials.comparison import Measurement, compare
from .config import EVALUATION_BATCH, Settings, _plain, check_output
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
    data = load_text_data(
        settings.data, settings.text_column, settings.pair_column, settings.label_column
    )
    tokenizer, model, data = load_classifier(settings, data)
    chooses_damping = settings.damping == "auto" and uses_fisher(settings.selection, update)
    if chooses_damping:
        data = with_held_back(data, settings.seed)
    check_texts(settings.grad_batch_size, data.train)
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
    echo(describe(settings, model, data))
    test = make_loader(
        tokenizer, data.test, EVALUATION_BATCH, max_length=settings.max_length, by_length=True
    )
    _fine_tune(settings, model, tokenizer, data, progress)
    dense = accuracy(model, test, progress=progress)
    echo(f"dense accuracy {dense:.1%}\n\nsparsity  magnitude  obert_kernels  damping")
    batches = calibration_batches(
        tokenizer,
        data.train,
        settings.num_grads,
        settings.grad_batch_size,
        max_length=settings.max_length,
        max_tokens=tokens_at_once(model.config.hidden_size),
        steps=settings.steps,
        by_length=settings.gradients_of == "predictions",
        seed=settings.seed,
    )
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
            }
            checkpoints.save_pruned(result, tokenizer, folders[row.target], extra)
            # Each time: what a run that stops here leaves behind is described.
            _write_summary(settings, data, dense, rows, time.perf_counter() - started)

    def recover(result: PruneResult) -> None:
        _train(settings, settings.recovery_epochs, model, tokenizer, data, progress, result.masks)

    compare(
        model,
        batches,
        lambda pruned: accuracy(pruned, test, progress=progress),
        list(folders),
        {
            **options,
            "selection": settings.selection,
            "update": update,
            "estimator": settings.estimator,
        },
        num_grads=settings.num_grads,
        calibration=(
            held_back(tokenizer, data, max_length=settings.max_length) if chooses_damping else ()
        ),
        samples_per_grad=settings.grad_batch_size,
        block_size=block_size,
        loss_fn=LOSSES[settings.gradients_of],
        fisher_dtype=fisher_dtype,
        max_memory=settings.max_memory,
        recover=recover if settings.recovery_epochs else None,
        on_result=on_result,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    report = _write_summary(settings, data, dense, rows, seconds)
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
        import_extra(package)
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


def _fine_tune(
    settings: Settings, model: Any, tokenizer: Any, data: TextData, progress: Progress | None
) -> None:
    """Fine-tune the dense model, if asked, and save it in the sub-folder ``dense``."""
    if settings.finetune_epochs <= 0:
        return
    _train(settings, settings.finetune_epochs, model, tokenizer, data, progress)
    with whole_folder(settings.output / "dense") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / REPORT_FILE, {"settings": _plain(settings)})


def _train(
    settings: Settings,
    epochs: float,
    model: Any,
    tokenizer: Any,
    data: TextData,
    progress: Progress | None,
    masks: dict[str, torch.Tensor] | None = None,
) -> None:
    loader = make_loader(
        tokenizer,
        data.train,
        settings.batch_size,
        max_length=settings.max_length,
        shuffle=True,
        seed=settings.seed,
    )
    fine_tune(
        model,
        loader,
        epochs,
        settings.learning_rate,
        masks=masks,
        seed=settings.seed,
        progress=progress,
        stage="fine-tune" if masks is None else "recover",
    )


def _write_summary(
    settings: Settings,
    data: TextData,
    dense: float,
    table: Sequence[Measurement],
    seconds: float,
) -> dict[str, Any]:
    """Write ``report.json`` and ``accuracy.png`` on top of the output folder."""
    curves: dict[str, list[tuple[float, float]]] = {"obert_kernels": [], "magnitude": []}
    for row in table:
        curves[row.method].append((row.sparsity, row.accuracy))
    model, source = (
        Path(name.removeprefix(DEMO_PREFIX)).name for name in (settings.model, settings.data)
    )
    how = "in one shot" if settings.steps == 1 else f"in {settings.steps} steps"
    title = f"{model} on {source}, pruned {how}"
    if settings.recovery_epochs:
        title += f" + {settings.recovery_epochs:g} epochs of recovery"
    report = {
        "settings": _plain(settings),
        "classes": data.label_names,
        "texts": {part: len(getattr(data, part)) for part in ("train", "dev", "test")},
        "dense_accuracy": dense,
        "results": [asdict(row) for row in table],
        "seconds": seconds,
        "versions": {name: version(name) for name in ("obert-kernels", "torch", "transformers")},
    }
    write_json(settings.output / REPORT_FILE, report)
    plot_accuracy(curves, dense, settings.output / PLOT_FILE, title)
    return report
