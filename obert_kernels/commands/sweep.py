"""The work behind ``obert-prune sweep``: load, try the grid, write table and plot."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..extras import import_extra
from ..fisher.estimators import estimators
from ..progress import Progress
from ..tasks.batches import (
    calibration_batches,
    check_texts,
    held_back,
    tokens_at_once,
    with_held_back,
)
from ..tasks.classification import describe, load_classifier
from ..tasks.demo_sets import DEMO_PREFIX
from ..tasks.evaluate import accuracy, quality
from ..tasks.loaders import encode, make_loader
from ..tasks.precision import LOSSES
from ..tasks.readers import load_text_data
from ..tasks.text_data import TextData
from ..trials.grid import check_grid, run_grid
from ..trials.outcome import Outcome, Scores, Setting, label
from ..trials.table import CSV_FILE, TABLE_FILE, TrialTable, check_basis, format_table, write_basis
from .config import EVALUATION_BATCH, Settings, check_output
from .plots import plot_sweep

PLOT_FILE = "sweep.png"

# A tokenizer is recognised by these; to tokenise them takes a fraction of a second.
_TEXTS_FOR_DIGEST = 1000


def sweep_classifier(
    settings: Settings,
    grid: Sequence[Setting],
    budget: float | None = None,
    progress: Progress | None = None,
    echo: Callable[[str], object] = print,
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """Try a grid on a text classifier, go on where an earlier call ended, and show what is best.

    Args:
        settings: of the model, the data and all trials; what the grid has is taken from there.
        grid: see :func:`obert_kernels.trials.outcome.make_grid`.
        budget: minutes from the call on, see :func:`obert_kernels.trials.grid.run_grid`.
        progress: called as ``progress(stage, done, total)``.
        echo: called with each finished line of the results.
        clock: what measures the budget, in seconds.

    Returns:
        Outcomes of all trials in the output folder, which has them in ``sweep.csv``,
        ``sweep.md`` and ``sweep.png``.

    Raises:
        ValueError, OSError, MemoryError, ImportError, DownloadError: something about the
            settings, files or installation, or the output folder holds trials of another model
            or data; the message names it and the remedy.
    """
    started = clock()
    check_output(settings.output)
    estimators.find(settings.estimator)
    for package in ("transformers", "tqdm", "matplotlib"):
        import_extra(package)
    data = load_text_data(
        settings.data, settings.text_column, settings.pair_column, settings.label_column
    )
    tokenizer, model, data = load_classifier(settings, data)
    data = with_held_back(data, settings.seed)
    shared = {"pattern": settings.pattern, "scope": settings.scope, "params": settings.params}
    check_grid(model, grid, settings.sparsity, **shared)
    most = max((setting.texts_per_grad or 0 for setting in grid), default=0)
    check_texts(most, data.train, "--texts-per-grad")
    basis = _basis(settings, tokenizer, model, data)
    known = check_basis(settings.output, basis)
    echo(describe(settings, model, data))
    evaluate = _evaluation(settings, tokenizer, data, progress)
    dense = evaluate(model) if known is None else Scores(**known["dense"])
    echo(f"dense accuracy {dense.dev_accuracy:.1%} on held-back texts, {_test(dense)}\n")

    def with_the_first_trial() -> None:  # until then nothing stands in the way of other settings
        if check_basis(settings.output, basis) is None:
            source = {"model": settings.model, "data": settings.data}
            write_basis(settings.output, basis, dense=dense._asdict(), source=source)

    table = TrialTable(settings.output / CSV_FILE)
    report = _Reporter(table, grid, settings.sparsity, echo, with_the_first_trial)
    left_out = run_grid(
        model,
        lambda num_grads, texts: calibration_batches(
            tokenizer,
            data.train,
            num_grads,
            texts,
            max_length=settings.max_length,
            max_tokens=tokens_at_once(model.config.hidden_size),
            by_length=settings.gradients_of == "predictions",
            seed=settings.seed,
        ),
        evaluate,
        grid,
        settings.sparsity,
        **shared,
        estimator=settings.estimator,
        calibration=held_back(tokenizer, data, max_length=settings.max_length),
        loss_fn=LOSSES[settings.gradients_of],
        fisher_dtype=getattr(torch, settings.fisher_dtype),
        max_memory=settings.max_memory,
        finished=table.outcomes,
        budget=None if budget is None else budget - (clock() - started) / 60,
        clock=clock,
        on_outcome=report,
        progress=progress,
    ).left_out
    _write_summary(settings, table.outcomes, dense, echo)
    if left_out:
        echo(_left_out(left_out, grid, budget, report.new))
    return table.outcomes


def _evaluation(
    settings: Settings, tokenizer: Any, data: TextData, progress: Progress | None
) -> Callable[[nn.Module], Scores]:
    dev, test = (
        make_loader(
            tokenizer, part, EVALUATION_BATCH, max_length=settings.max_length, by_length=True
        )
        for part in (data.dev, data.test)
    )

    def evaluate(model: nn.Module) -> Scores:
        held = quality(model, dev, progress=progress)
        return Scores(*held, accuracy(model, test, progress=progress))

    return evaluate


def _basis(settings: Settings, tokenizer: Any, model: nn.Module, data: TextData) -> dict[str, Any]:
    """Everything a trial depends on besides its setting and sparsity, JSON-ready."""
    texts = repr((data.label_names, data.train, data.dev, data.test))
    # A tokenizer is what it makes of texts; its files differ between versions of transformers.
    some = data.dev.subset(range(min(len(data.dev), _TEXTS_FOR_DIGEST)))
    tokens = repr(encode(tokenizer, some))
    return {
        "the model's weights": _weights_digest(model.state_dict()),
        "the model's configuration": _config_digest(model),
        "the tokenizer": _digest(tokens.encode()),
        "the data": _digest(texts.encode()),
        "pattern": settings.pattern,
        "scope": settings.scope,
        "params": None if settings.params is None else sorted(settings.params),
        "estimator": settings.estimator,
        "plugins": [_plugin_digest(source) for source in settings.plugin or ()],
        "fisher-dtype": settings.fisher_dtype,
        "gradients-of": settings.gradients_of,
        "max-length": settings.max_length,
        "seed": settings.seed,
        "version of obert-kernels": version("obert-kernels"),
    }


# Where it came from and what wrote it.
_NOT_CONFIGURATION = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def _config_digest(model: nn.Module) -> str:
    config = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_CONFIGURATION}
    return _digest(json.dumps(config, sort_keys=True, default=repr).encode())


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _plugin_digest(source: str) -> str:
    """A file's content; of a module only the name."""
    path = Path(source)
    return f"{path.name} {_digest(path.read_bytes())}" if path.suffix == ".py" else source


def _weights_digest(state: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name, value in state.items():
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return f"sha256:{found.hexdigest()}"


class _Reporter:
    """Adds each new outcome to the table on disk and says what came of it."""

    def __init__(
        self,
        table: TrialTable,
        grid: Sequence[Setting],
        sparsities: Sequence[float],
        echo: Callable[[str], object],
        at_first: Callable[[], None],
    ) -> None:
        wanted = {(setting, target) for setting in grid for target in sparsities}
        self.done = len(wanted & {outcome.key for outcome in table.outcomes})
        self.count = len(wanted)
        self.new = 0
        self._table, self._grid, self._echo, self._at_first = table, grid, echo, at_first
        if self.done:
            echo(f"{self.done} of {self.count} trials are in {table.path} and not done again")

    def __call__(self, outcome: Outcome) -> None:
        if self.new == 0:
            self._at_first()
        self._table.append(outcome)
        self.done += 1
        self.new += 1
        name = f"[{self.done}/{self.count}] {_name((outcome.setting, outcome.target), self._grid)}"
        if outcome.error:
            self._echo(f"{name}: failed, {outcome.error}")
        else:
            held = f"{outcome.dev_accuracy:.1%} on held-back texts"
            self._echo(f"{name}: {held}, {_test(outcome)}, {outcome.trial_seconds:.0f} s")


def _test(scores: Scores | Outcome) -> str:
    return f"{scores.test_accuracy:.1%} on test"


def _name(trial: tuple[Setting, float], grid: Sequence[Setting]) -> str:
    return f"{trial[1]:.1%} {label(trial[0], grid)}"


def _write_summary(
    settings: Settings, outcomes: Sequence[Outcome], dense: Scores, echo: Callable[[str], object]
) -> None:
    if not outcomes:
        return
    text = format_table(outcomes)
    (settings.output / TABLE_FILE).write_text(text + "\n", encoding="utf-8")
    model, source = (
        Path(name.removeprefix(DEMO_PREFIX)).name for name in (settings.model, settings.data)
    )
    title = f"{model} on {source}: {settings.pattern}, {settings.scope} ranking"
    files = [CSV_FILE, TABLE_FILE]
    if any(not outcome.error for outcome in outcomes):
        plot_sweep(outcomes, dense.dev_accuracy, settings.output / PLOT_FILE, title)
        files.append(PLOT_FILE)
    echo(f"\n{text}\n\n* best on the held-back texts. Written to {settings.output}: "
         f"{', '.join(files)}")  # fmt: skip


def _left_out(
    left_out: Sequence[tuple[Setting, float]],
    grid: Sequence[Setting],
    budget: float | None,
    new: int,
) -> str:
    names = "; ".join(_name(trial, grid) for trial in left_out[:3])
    more = f"; and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    hint = "" if new else " It was too short for a single trial: give it more."
    return (
        f"\nTrials that the budget of {budget:g} minutes left out: {len(left_out)} "
        f"({names}{more}). The same command goes on with them.{hint}"
    )
