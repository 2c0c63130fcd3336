"""Trials in the time there is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import tiny
from test_grid import SETTINGS, tiny_grid
from tiny import GREEDY

from obert_kernels import (
    PruningConfig,
    register_saliency,
)
from obert_kernels.trials import grid
from obert_kernels.trials.budget import Budget
from obert_kernels.trials.grid import TrialLoop


def estimates_take_5_minutes(monkeypatch, clock):
    real = TrialLoop._prepare

    def slow(loop: TrialLoop, config: PruningConfig) -> Any:
        clock.now += 300 * config.uses_fisher
        return real(loop, config)

    monkeypatch.setattr(TrialLoop, "_prepare", slow)


def test_no_work_starts_when_the_budget_is_over(estimates, monkeypatch):
    clock = tiny.FakeClock()
    real = TrialLoop._trial

    def takes_50_seconds(*arguments: Any) -> None:
        clock.now += 50
        return real(*arguments)

    monkeypatch.setattr(TrialLoop, "_trial", takes_50_seconds)
    result = tiny_grid(tiny.TinyEncoder(), SETTINGS, [0.5, 0.75], budget=2, clock=clock)
    # Two of magnitude take 100 seconds; of those with a Fisher nothing is known, so one starts.
    assert len(result.outcomes) == 3
    assert [outcome.config.selection for outcome in result.outcomes[:2]] == ["magnitude"] * 2
    assert len(result.outcomes) + len(result.left_out) == 2 * len(SETTINGS)
    assert len(estimates) == 1
    nothing = tiny_grid(tiny.TinyEncoder(), SETTINGS, [0.5], budget=0, clock=clock)
    assert not nothing.outcomes and len(nothing.left_out) == len(SETTINGS)
    assert len(estimates) == 1


def test_an_estimate_is_not_counted_for_those_without_one(monkeypatch):
    @register_saliency("glancing", uses_fisher=False)
    def glancing(problem):
        return {name: problem.flat(name).abs() for name in problem.names()}

    clock = tiny.FakeClock()
    estimates_take_5_minutes(monkeypatch, clock)
    looks_at_texts = replace(GREEDY, selection="glancing", update="none")
    other_blocks = replace(GREEDY, fisher=replace(GREEDY.fisher, block_size=4))
    settings = [GREEDY, looks_at_texts, other_blocks]
    result = tiny_grid(tiny.TinyEncoder(), settings, [0.5], budget=9, clock=clock)
    assert [o.config.selection for o in result.outcomes] == ["greedy", "glancing"]
    assert len(result.left_out) == 1


def test_the_budget_counts_on_what_was_before():
    clock = tiny.FakeClock()
    budget = Budget(10, clock)
    assert budget.allows(("estimate", 1e9)), "nothing is known yet"
    for seconds in (120, 60):
        with budget.timed("estimate", 100):
            clock.now += seconds
    assert budget.allows(("estimate", 700))  # 60 seconds for 100 texts, 7 minutes left
    assert not budget.allows(("estimate", 701))
    assert not budget.allows(("estimate", 650), ("estimate", 60))
    clock.now += 420
    assert not budget.allows(("unknown", 1))
    assert Budget(None, clock).allows(("estimate", 1e9))


def test_an_estimate_that_ate_the_budget_is_not_used(monkeypatch, estimates):
    clock = tiny.FakeClock()
    estimates_take_5_minutes(monkeypatch, clock)
    result = tiny_grid(tiny.TinyEncoder(), [GREEDY], [0.5, 0.75], budget=4, clock=clock)
    assert not result.outcomes and len(result.left_out) == 2 and len(estimates) == 1


def test_seconds_by_stage():
    known = {
        "gradients": 1, "fisher": 2, "damping": 4, "scores": 8, "masks": 16, "update": 32,
        "reconstruction": 64,
    }  # fmt: skip
    assert grid.seconds_of(known) == {
        "gradients_seconds": 1, "fisher_seconds": 2, "damping_seconds": 4, "selection_seconds": 56,
        "reconstruction_seconds": 64,
    }  # fmt: skip
