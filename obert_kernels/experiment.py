"""The run behind the command line: load, fine-tune, prune at every sparsity, save."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import checkpoints, classification
from .calibration import calibration_batches, check_texts, held_back, tokens_at_once, with_held_back
from .comparison import Measurement, compare
from .downloads import demo_model_folder, import_extra
from .estimate import Progress
from .estimators import estimators
from .layers import find_weights
from .masks import check_sparsity
from .memory import plan_passes
from .patterns import find_pattern
from .plots import plot_accuracy
from .pruner import PruneResult, prune
from .saliencies import own_update, uses_fisher
from .text_data import DEMO_PREFIX, TextData, load_text_data

DEMO_MODEL = DEMO_PREFIX + "minilm"

EVALUATION_BATCH = 64  # texts


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on; the options of ``obert-prune run`` explain each."""

    model: str
    data: str
    sparsity: Sequence[float]
    output: Path
    pattern: str = "unstructured"
    block_size: int | None = None
    num_grads: int = 256
    grad_batch_size: int = 16
    damping: float | str = "auto"
    gradients_of: str = "predictions"
    fisher_dtype: str = "float64"
    selection: str = "greedy"
    estimator: str = "gram"
    plugin: Sequence[str] | None = None  # loaded by then
    update: str = "auto"
    scope: str = "global"
    steps: int = 1
    schedule: str = "geometric"
    params: Sequence[str] | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    finetune_epochs: float = 0.0
    recovery_epochs: float = 0.0
    learning_rate: float = 2e-5
    batch_size: int = 32
    max_length: int = 128
    max_memory: int | None = None
    seed: int = 0


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
    echo(describe(settings, data, sum(weight.numel() for weight in weights.values())))
    test = classification.make_loader(
        tokenizer, data.test, EVALUATION_BATCH, max_length=settings.max_length, by_length=True
    )
    _fine_tune(settings, model, tokenizer, data, progress)
    dense = classification.accuracy(model, test, progress=progress)
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
    latest: dict[str, Measurement] = {}

    def on_result(row: Measurement, result: PruneResult) -> None:
        latest[row.method] = row
        if row.method == "obert_kernels":
            magnitude = latest["magnitude"].accuracy
            damping = "" if row.damping is None else f"{row.damping:.2g}"
            echo(f"{row.sparsity:8.1%}  {magnitude:9.1%}  {row.accuracy:13.1%}  {damping:>7}")
            extra = {"accuracy": row.accuracy, "dense_accuracy": dense}
            checkpoints.save_pruned(result, tokenizer, folders[row.target], extra)

    def recover(result: PruneResult) -> None:
        _train(settings, settings.recovery_epochs, model, tokenizer, data, progress, result.masks)

    table = compare(
        model,
        batches,
        lambda pruned: classification.accuracy(pruned, test, progress=progress),
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
        loss_fn=classification.LOSSES[settings.gradients_of],
        fisher_dtype=fisher_dtype,
        max_memory=settings.max_memory,
        recover=recover if settings.recovery_epochs else None,
        on_result=on_result,
        progress=progress,
    )
    seconds = time.perf_counter() - started
    report = _write_summary(settings, data, dense, table, seconds)
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
    written = [*folders.values(), *([dense] if settings.finetune_epochs > 0 else [])]
    for folder in written:
        checkpoints.check_replaceable(folder)
        for what, source in (("model", settings.model), ("data", settings.data)):
            place = Path(source).resolve()
            if folder.resolve() in (place, *place.parents):
                raise ValueError(
                    f"{folder}, where the {what} is, would be replaced: choose another --output"
                )
    for package in ("transformers", "tqdm", "matplotlib", "safetensors"):
        import_extra(package)
    return folders


def check_output(folder: Path) -> None:
    """Raise NotADirectoryError if the output folder is a file."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"--output {folder}: {path} is a file, choose another folder")


def load_classifier(settings: Settings, data: TextData) -> tuple[Any, Any, TextData]:
    """Return tokenizer, classifier, and the data with its classes in the model's order."""
    transformers = import_extra("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    name = demo_model_folder() if settings.model == DEMO_MODEL else settings.model
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{settings.model} could not be loaded as a model ({reason}): give a folder with "
            "config.json, weights and tokenizer, or a name on the hub (needs the network)"
        ) from error
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", math.inf))
    if settings.max_length > limit:
        raise ValueError(
            f"--max-length {settings.max_length} is more than {settings.model} takes: at most "
            f"{limit} tokens"
        )
    data, labels_fit = _match_labels(settings, config, data)
    names = (
        {}
        if labels_fit
        else {
            "id2label": dict(enumerate(data.label_names)),
            "label2id": {label: index for index, label in enumerate(data.label_names)},
        }
    )
    with classification.seeded(settings.seed):  # a new head is random
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, ignore_mismatched_sizes=not labels_fit, **names
        ).float()  # the argument for the type has two names, by the version of transformers
    return tokenizer, model, data


def _match_labels(settings: Settings, config: Any, data: TextData) -> tuple[TextData, bool]:
    """Return the data in the order of the model's classes, and whether the model has them."""
    architectures = config.architectures or []
    if not any(name.endswith("ForSequenceClassification") for name in architectures):
        problem = f"{settings.model} has no trained classification head"
    else:
        known = [str(config.id2label[index]) for index in range(config.num_labels)]
        lowered = {label.casefold(): label for label in data.label_names}
        if sorted(lowered) == sorted(label.casefold() for label in known):
            return data.with_label_order([lowered[label.casefold()] for label in known]), True
        numbered = [str(index) for index in range(config.num_labels)]
        generic = [f"LABEL_{index}" for index in range(config.num_labels)]
        if len(known) == len(data.label_names) and (
            data.label_names == numbered or known == generic
        ):
            return data, True
        problem = (
            f"{settings.model} knows the classes {_shorten(known)}, but {settings.data} has "
            f"{_shorten(data.label_names)}"
        )
    if settings.finetune_epochs <= 0:
        raise ValueError(
            f"{problem}: fine-tune it first, for example with "
            "obert-prune run and --finetune-epochs 3"
        )
    return data, False


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:6])
    return f"{shown}, … ({len(names)})" if len(names) > 6 else shown


def describe(settings: Settings, data: TextData, weights: int) -> str:
    """Return two lines on the model and the data."""
    return (
        f"{settings.model}: {weights:,} weights to prune\n"
        f"{settings.data}: {len(data.label_names)} classes; {len(data.train):,} texts to train, "
        f"{len(data.dev):,} held back, {len(data.test):,} to test"
    )


def _fine_tune(
    settings: Settings, model: Any, tokenizer: Any, data: TextData, progress: Progress | None
) -> None:
    """Fine-tune the dense model, if asked, and save it in the sub-folder ``dense``."""
    if settings.finetune_epochs <= 0:
        return
    _train(settings, settings.finetune_epochs, model, tokenizer, data, progress)
    with checkpoints.whole_folder(settings.output / "dense") as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        checkpoints.write_json(folder / checkpoints.REPORT_FILE, {"settings": _plain(settings)})


def _plain(settings: Settings) -> dict[str, Any]:
    """JSON-ready."""
    return {**asdict(settings), "output": str(settings.output)}


def _train(
    settings: Settings,
    epochs: float,
    model: Any,
    tokenizer: Any,
    data: TextData,
    progress: Progress | None,
    masks: dict[str, torch.Tensor] | None = None,
) -> None:
    loader = classification.make_loader(
        tokenizer,
        data.train,
        settings.batch_size,
        max_length=settings.max_length,
        shuffle=True,
        seed=settings.seed,
    )
    classification.fine_tune(
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
    """Write ``accuracy.png`` and ``report.json`` on top of the output folder."""
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
    plot_accuracy(curves, dense, settings.output / "accuracy.png", title)
    report = {
        "settings": _plain(settings),
        "classes": data.label_names,
        "texts": {part: len(getattr(data, part)) for part in ("train", "dev", "test")},
        "dense_accuracy": dense,
        "results": [asdict(row) for row in table],
        "seconds": seconds,
        "versions": {name: version(name) for name in ("obert-kernels", "torch", "transformers")},
    }
    checkpoints.write_json(settings.output / checkpoints.REPORT_FILE, report)
    return report
