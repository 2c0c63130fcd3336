"""Killed, interrupted, or out of room at every file operation: nothing is lost, and the next start
goes through."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from file_operations import Killed, failing
from tiny_text import save_model

from obert_kernels import load_masks, prune, save_pruned
from obert_kernels.commands import run, sweep
from obert_kernels.commands.config import RunConfig, load_task
from obert_kernels.files import check_replaceable, recover, write_whole
from obert_kernels.trials.outcome import make_grid

pytestmark = pytest.mark.usefixtures("one_thread", "temporary")

FULL = OSError(28, "No space left on device")
ENDS = [Killed(), pytest.param(KeyboardInterrupt(), marks=pytest.mark.slow), FULL]


def weights_in(folder: Path) -> bytes:
    """Of a checkpoint that is whole: its files are those that its report lists."""
    check_replaceable(folder)
    listed = json.loads((folder / "report.json").read_text())["files"]
    assert listed.keys() == {path.name for path in folder.iterdir()}
    assert len(load_masks(folder)) == 12
    return (folder / "model.safetensors").read_bytes()


def whole_somewhere(folder: Path) -> bytes:
    """The weights of a checkpoint under its name, or where the next save finds it."""
    aside = list(folder.parent.glob(f".{folder.name}-*/old"))
    return weights_in(folder if folder.exists() else aside[0])


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_a_save_that_ends_at_any_operation(tmp_path: Path, end: BaseException) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        save_model(tmp_path / "model", head=True)
    )
    before = save_pruned(prune(model, sparsity=0.5, selection="magnitude"), None, tmp_path / "old")
    result = prune(model, sparsity=0.75, selection="magnitude")
    after = save_pruned(result, None, tmp_path / "new")
    old, new = weights_in(before), weights_in(after)
    assert old != new
    for at in range(1, 1000):
        folder = tmp_path / str(at) / "half"
        shutil.copytree(before, folder)
        raised: BaseException | None = None
        with failing(folder.parent, at, end) as watch:
            try:
                save_pruned(result, None, folder)
            except (Killed, KeyboardInterrupt, OSError) as error:
                raised = error
        assert whole_somewhere(folder) in (old, new), at
        if isinstance(raised, OSError):
            place = re.search(r"whole in (\S+) instead", str(raised))
            assert place and weights_in_other(Path(place[1])) == new
        recover(folder.parent, "half")  # the next start, which might fail before it saves
        assert weights_in(folder) in (old, new), at
        save_pruned(result, None, folder)
        assert weights_in(folder) == new and visible(folder.parent) == ["half"], at
        if watch.count < at:
            assert raised is None and at > 10
            return
    pytest.fail("it never ended")


def weights_in_other(folder: Path) -> bytes:
    """Of a checkpoint that was saved elsewhere, without a list of its files."""
    assert len(load_masks(folder)) == 12
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture
def settings(tmp_path: Path, data_file: str, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """Of a quick run; the model is loaded once, and a picture is a file of a few bytes."""
    made = RunConfig(
        model=str(save_model(tmp_path / "model", head=True)), data=data_file, sparsity=(0.5, 0.75),
        output=tmp_path / "out", selection="magnitude", max_length=16,
    )  # fmt: skip
    task = load_task(made, hold_back=False)
    for module, plot in ((run, "plot_accuracy"), (sweep, "plot_sweep")):
        monkeypatch.setattr(module, "load_task", lambda *_, **__: task)
        monkeypatch.setattr(module, plot, lambda *given: write_whole(given[-2], b"a picture"))
    return made


def ended_at_each_operation(
    settings: RunConfig, end: BaseException, work: Callable[[Any], object], check: Any
) -> None:
    """Do work in copies of an output folder that an earlier one has filled, and again."""
    for at in range(1, 1000):
        out = settings.output.with_name(str(at))
        if settings.output.exists():
            shutil.copytree(settings.output, out)
        with failing(out, at, end) as watch:
            try:
                work(replace(settings, output=out))
                raised = None
            except (Killed, KeyboardInterrupt, OSError) as error:
                raised = error
        check(out, False)
        work(replace(settings, output=out))
        check(out, True)
        shutil.rmtree(out)
        if watch.count < at:
            assert raised is None and at > 10
            return
    pytest.fail("it never ended")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("earlier", "end"),
    [(False, Killed()), (True, Killed()), (True, KeyboardInterrupt()), (True, FULL)],
)
def test_a_run_that_ends_at_any_operation(
    settings: RunConfig, earlier: bool, end: BaseException
) -> None:
    def work(how: RunConfig) -> None:
        run.prune_classifier(how, echo=lambda _: None)

    if earlier:
        work(settings)

    def check(out: Path, finished: bool) -> None:
        if finished:
            assert visible(out) == ["accuracy.png", "report.json", "sparsity-0.5", "sparsity-0.75"]
            assert len(json.loads((out / "report.json").read_text())["results"]) == 4
        if earlier or finished:
            for sparsity in settings.sparsity:
                whole_somewhere(out / f"sparsity-{sparsity}")

    ended_at_each_operation(settings, end, work, check)


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_a_sweep_that_ends_at_any_operation(settings: RunConfig, end: BaseException) -> None:
    grid = make_grid(selection=["magnitude"], base=settings.pruning_config())

    def work(how: RunConfig) -> None:
        sweep.sweep_classifier(how, grid, echo=lambda _: None)

    def check(out: Path, finished: bool) -> None:
        if finished:
            assert visible(out) == ["sweep.csv", "sweep.json", "sweep.md", "sweep.png"]
            with (out / "sweep.csv").open(newline="") as stream:
                assert [row["target"] for row in csv.DictReader(stream)] == ["0.5", "0.75"]

    ended_at_each_operation(settings, end, work, check)
