"""The figure of a sweep."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import GREEDY, outcome

pytest.importorskip("matplotlib")

from obert_kernels import PruningConfig
from obert_kernels.commands import plots
from obert_kernels.trials.outcome import Outcome, make_grid


def drawn(monkeypatch: pytest.MonkeyPatch, path: Path, outcomes: list[Outcome]) -> Any:
    """The figure that plot_sweep writes."""
    kept = SimpleNamespace()
    real = plots._open_figure

    def keep(panels: int) -> tuple[Any, list[Any]]:
        kept.figure, axes = real(panels)
        return kept.figure, axes

    monkeypatch.setattr(plots, "_open_figure", keep)
    plots.plot_sweep(outcomes, 0.95, path, "title")
    assert path.read_bytes().startswith(b"\x89PNG")
    return kept.figure


def names(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_plot_of_few_settings(tmp_path, monkeypatch):
    settings = [PruningConfig(selection="magnitude"), GREEDY]
    outcomes = [outcome(setting, target) for setting in settings for target in (0.5, 0.75)]
    figure = drawn(monkeypatch, tmp_path / "x.png", outcomes)
    (axes,) = figure.axes
    assert names(axes) == ["dense 95.0", "magnitude", "greedy"]


def test_plot_of_many_settings_names_the_best(tmp_path, monkeypatch):
    settings = make_grid(
        texts=[32, 64], damping=["auto", 1e-3, 1e-2], selection=["greedy", "diagonal", "magnitude"]
    )
    outcomes = [
        outcome(setting, target, dev_accuracy=0.5 + index / 100 - target / 10, damping_used=1e-4)
        for index, setting in enumerate(settings)
        for target in (0.5, 0.75)
    ]
    outcomes.append(outcome(target=0.9, dev_accuracy=None, error="failed"))
    left, right = drawn(monkeypatch, tmp_path / "x.png", outcomes).axes
    assert names(left) == [
        "dense 95.0", "magnitude", "greedy, n 64, damping 0.01", "diagonal, n 64, damping 0.01",
        "10 other settings",
    ]  # fmt: skip
    assert right.get_xscale() == "log"
    assert names(right) == [
        "50 % greedy", "75 % greedy", "50 % diagonal", "75 % diagonal",
        "chosen automatically",
    ]  # fmt: skip
