"""Scores that several prunings ask for are computed once, and never stale."""

from __future__ import annotations

from collections import Counter

import pytest
import tiny
import torch

from obert_kernels import GramFisher, estimate_fisher
from obert_kernels.trials import scored_once
from obert_kernels.trials.scored_once import ScoredOnce, score_once

N = 60
HALF = torch.arange(N) % 2 == 0
ALL = torch.ones(N, dtype=torch.bool)


class Counting(GramFisher):
    """Counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__(N, 10)
        self.accumulate(torch.randn(20, N))
        self.asked: Counter[str] = Counter()

    def scores(self, *arguments):
        self.asked["scores"] += 1
        return super().scores(*arguments)

    def greedy_scores(self, *arguments):
        self.asked["greedy_scores"] += 1
        return super().greedy_scores(*arguments)


def test_the_same_question_is_answered_once():
    fisher, weight = Counting(), torch.randn(N)
    once = ScoredOnce(fisher)
    for _ in range(3):
        for damping in (0.1, 0.2):
            found = once.greedy_scores(weight.clone(), ALL.clone(), damping, 2)
            assert torch.equal(found, GramFisher.greedy_scores(fisher, weight, ALL, damping, 2))
            found.zero_()  # its own, not the one that is kept
    assert fisher.asked == {"greedy_scores": 2}
    for _ in range(3):
        found = once.scores(weight, 0.1)
        assert torch.equal(found, GramFisher.scores(fisher, weight, 0.1))
    assert fisher.asked == {"greedy_scores": 2, "scores": 1}
    assert once.num_weights == N and once.gram is fisher.gram, "the rest is the Fisher's own"
    assert isinstance(once, GramFisher) and isinstance(once, ScoredOnce)


@pytest.mark.parametrize("changed", ["weight in place", "mask in place", "damping", "group"])
def test_another_question_is_another_answer(changed):
    fisher, weight, keep = Counting(), torch.randn(N), ALL.clone()
    once, damping, group = ScoredOnce(fisher), 0.1, 1
    before = once.greedy_scores(weight, keep, damping, group)
    if changed == "weight in place":
        weight[3] += 1
    elif changed == "mask in place":
        keep[3] = False
    elif changed == "damping":
        damping = 0.11
    else:
        group = 2
    after = once.greedy_scores(weight, keep, damping, group)
    assert torch.equal(after, GramFisher.greedy_scores(fisher, weight, keep, damping, group))
    assert not torch.equal(before, after)
    assert fisher.asked == {"greedy_scores": 2}


def test_only_a_few_scores_are_kept():
    fisher, weight = Counting(), torch.randn(N)
    once = ScoredOnce(fisher)
    dampings = [0.1 * (1 + step) for step in range(scored_once._KEPT + 1)]
    for damping in dampings:
        once.greedy_scores(weight, ALL, damping)
    once.greedy_scores(weight, ALL, dampings[-1])
    assert fisher.asked["greedy_scores"] == len(dampings)
    once.greedy_scores(weight, ALL, dampings[0])  # the one asked for longest ago
    assert fisher.asked["greedy_scores"] == len(dampings) + 1


@pytest.mark.parametrize(("spare", "kept"), [(0, False), (10**6, True)])
def test_without_room_nothing_is_kept(spare, kept):
    model = tiny.TinyEncoder().eval()
    estimate = estimate_fisher(model, tiny.batches(4), num_grads=4, params=["re:layer.*weight"])
    score_once(estimate, torch.device("cpu"), estimate.plan.total_bytes + spare)
    assert {isinstance(f, ScoredOnce) for f in estimate.fishers.values()} == {kept}


def test_by_default_half_of_what_is_free_is_room_enough(monkeypatch):
    model = tiny.TinyEncoder().eval()
    for free, kept in ((100, False), (10**9, True), (None, False)):
        monkeypatch.setattr(scored_once, "available_memory", lambda device, free=free: free)
        estimate = estimate_fisher(model, tiny.batches(4), num_grads=4, params=["re:layer.*weight"])
        score_once(estimate, torch.device("cpu"), None)
        assert {isinstance(f, ScoredOnce) for f in estimate.fishers.values()} == {kept}
