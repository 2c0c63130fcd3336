"""The work behind ``obert-prune sweep``: load, try the grid, write table and plot."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

from torch import nn

from ..files import expanded, write_whole
from ..progress import Progress, silent
from ..pruning.config import PruningConfig
from ..tasks.digests import digest
from ..tasks.task import Task
from ..trials.budget import Budget
from ..trials.grid import TrialLoop, grouped
from ..trials.outcome import Outcome, Scores, canonical, label, point_of
from ..trials.table import CSV_FILE, TABLE_FILE, TrialTable, check_basis, format_table, write_basis
from .config import RunConfig, load_task
from .output import Echo, Notes, check_drawing, decoration, opened_output
from .plots import plot_sweep

PLOT_FILE = "sweep.png"
_WRITTEN = r"sweep\.(json|md|png)"


def sweep_classifier(
    settings: RunConfig,
    grid: Sequence[PruningConfig],
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
        KeyboardInterrupt: it was interrupted; the message says what was kept.
    """
    started = clock()
    for package in ("transformers", "tqdm"):
        importlib.import_module(package)  # one that is missing is an error now, not later
    check_drawing()
    note = Notes(echo)
    with opened_output(settings.output, _WRITTEN, note):
        _check_replaceable(settings.output)
        try:
            return _sweep(settings, grid, budget, progress, echo, note, clock, started)
        except KeyboardInterrupt as interrupt:
            table = settings.output / CSV_FILE
            kept = f"{table} keeps the trials that were finished, and the same command goes on"
            kept = kept if table.exists() else "no trial was finished"
            raise KeyboardInterrupt(f"interrupted: {kept}") from interrupt


def _check_replaceable(folder: Path) -> None:
    """Raise FileExistsError if what is written beside the trials would take a foreign place."""
    for path in (folder / TABLE_FILE, folder / PLOT_FILE):
        if os.path.lexists(path) and not (folder / CSV_FILE).exists():
            raise FileExistsError(
                f"{path} was not written by obert-prune sweep: choose another --output or move it "
                "away"
            )


def _sweep(
    settings: RunConfig,
    grid: Sequence[PruningConfig],
    budget: float | None,
    progress: Progress | None,
    echo: Echo,
    note: Notes,
    clock: Callable[[], float],
    started: float,
) -> list[Outcome]:
    task = load_task(settings, progress=progress)
    model = task.model
    most = max((point_of(config).texts_per_grad or 0 for config in grid), default=0)
    task.check_samples(most, "--texts-per-grad")

    def evaluate(model: nn.Module) -> Scores:
        return Scores(*task.evaluate(model, "dev"), task.evaluate(model, "test").accuracy)

    loop = TrialLoop(
        model,
        task.fisher_batches,
        evaluate,
        task.damping_batches(),
        task.loss_fn,
        settings.max_memory,
        on_pruned=lambda outcome, result: note(*result.report.notes),
        progress=progress or silent,
    )
    basis = {**task.basis(), **_basis(settings)}
    known = check_basis(settings.output, basis)
    table = TrialTable(settings.output / CSV_FILE, settings.pruning_config())
    done = {outcome.key for outcome in table.outcomes}
    trials = list(product(grid, dict.fromkeys(settings.sparsity)))
    left = [trial for trial in trials if (canonical(trial[0]), trial[1]) not in done]
    loop.check(left)  # what is done needs no memory any more
    echo(task.describe(settings.params))
    dense = evaluate(model) if known is None else known["dense"]
    note(*task.doubts(dense.test_accuracy))
    echo(f"dense accuracy {dense.dev_accuracy:.1%} on held-back texts, {_test(dense)}\n")

    def with_the_first_trial() -> None:  # until then nothing stands in the way of other settings
        if check_basis(settings.output, basis) is None:
            source = {"model": settings.model, "data": settings.data}
            write_basis(settings.output, basis, dense=dense._asdict(), source=source)

    report = _Reporter(table, grid, settings.sparsity, echo, with_the_first_trial)
    loop.on_outcome = report
    loop.budget = Budget(None if budget is None else budget - (clock() - started) / 60, clock)
    left_out = loop.run(grouped(left))
    _write_summary(settings, task, table.outcomes, dense, echo, note)
    if left_out:
        echo(_left_out(left_out, grid, budget, report.new))
    return table.outcomes


def _basis(settings: RunConfig) -> dict[str, Any]:
    """What trials depend on besides the task, their setting and sparsity, JSON-ready."""
    return {
        "pattern": settings.pattern,
        "scope": settings.scope,
        "reconstruction": _fit(settings),
        "params": None if settings.params is None else sorted(settings.params),
        "estimator": settings.estimator,
        "plugins": [_plugin_digest(source) for source in settings.plugin or ()],
        "fisher-dtype": settings.fisher_dtype,
        "max-test-texts": settings.max_test_texts,
        "version of obert-kernels": version("obert-kernels"),
    }


def _fit(settings: RunConfig) -> str | None:
    """None without, as in folders from before there was one."""
    fit = settings.pruning_config().fit
    return None if fit is None else f"auto with {fit.num_samples} fit-texts"


def _plugin_digest(source: str) -> str:
    """A file's content; of a module only the name."""
    path = expanded(source)
    return f"{path.name} {digest(path.read_bytes())}" if path.suffix == ".py" else source


class _Reporter:
    """Adds each new outcome to the table on disk and says what came of it."""

    def __init__(
        self,
        table: TrialTable,
        grid: Sequence[PruningConfig],
        sparsities: Sequence[float],
        echo: Echo,
        at_first: Callable[[], None],
    ) -> None:
        wanted = {(canonical(config), target) for config in grid for target in sparsities}
        self.done = len(wanted & {outcome.key for outcome in table.outcomes})
        self.count = len(wanted)
        self.new = 0
        self._table, self._grid, self._echo, self._at_first = table, grid, echo, at_first
        if self.done:
            echo(f"{self.done} of {self.count} trials are in {table.path} and not done again")

    def __call__(self, outcome: Outcome) -> None:
        name = f"[{self.done + 1}/{self.count}] "
        name += _name((outcome.config, outcome.target), self._grid)
        if outcome.error:
            self._echo(f"{name}: failed, {outcome.error}")
        else:
            held = f"{outcome.dev_accuracy:.1%} on held-back texts"
            self._echo(f"{name}: {held}, {_test(outcome)}, {outcome.trial_seconds:.0f} s")
        if self.new == 0:  # said before it is written: a full disk does not take that away
            self._at_first()
        self._table.append(outcome)
        self.done += 1
        self.new += 1


def _test(scores: Scores | Outcome) -> str:
    return f"{scores.test_accuracy:.1%} on test"


def _name(trial: tuple[PruningConfig, float], grid: Sequence[PruningConfig]) -> str:
    return f"{trial[1]:.1%} {label(point_of(trial[0]), [point_of(config) for config in grid])}"


def _write_summary(
    settings: RunConfig,
    task: Task,
    outcomes: Sequence[Outcome],
    dense: Scores,
    echo: Echo,
    note: Notes,
) -> None:
    if not outcomes:
        return
    text = format_table(outcomes)
    echo(f"\n{text}\n")
    write_whole(settings.output / TABLE_FILE, f"{text}\n".encode())
    title = f"{task.title}: {settings.pattern}, {settings.scope} ranking"
    files = [CSV_FILE, TABLE_FILE]
    if any(not outcome.error for outcome in outcomes):
        assert dense.dev_accuracy is not None  # the grid is judged by it
        picture = settings.output / PLOT_FILE
        with decoration(picture, note):
            plot_sweep(outcomes, dense.dev_accuracy, picture, title)
            files.append(PLOT_FILE)
    echo(f"* best on the held-back texts. Written to {settings.output}: {', '.join(files)}")


def _left_out(
    left_out: Sequence[tuple[PruningConfig, float]],
    grid: Sequence[PruningConfig],
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
