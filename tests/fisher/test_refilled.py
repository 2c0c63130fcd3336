"""Fishers whose living weights are cut into full blocks anew."""

from __future__ import annotations

import pytest
import torch
from problems import DAMPING, gradients, relative_error
from tiny import TinyEncoder, batches

from obert_kernels import GramFisher, LiveFisher, NumericalError, find_weights, prune
from obert_kernels.fisher.estimators import estimators
from obert_kernels.fisher.living import block_fisher, fisher_bytes


def refilled(alive: torch.Tensor, size: int, c: int = 1) -> LiveFisher:
    fisher = block_fisher(alive, size, c, refill=True)
    assert isinstance(fisher, LiveFisher)
    assert fisher.num_bytes == fisher_bytes(alive, size, c, refill=True)
    return fisher


@pytest.mark.parametrize(("size", "c"), [(50, 1), (50, 4), (16, 16), (8, 12)])
@pytest.mark.parametrize("share", [0.97, 0.5, 0.1])
def test_results_are_those_of_the_living_weights_in_a_row(isa, size, c, share):
    """Groups do not lie in two blocks: of 50 there are twelve of four in a block."""
    n = 40 * 48
    alive = (torch.rand(n // c) < share).repeat_interleave(c)
    weight, g = torch.randn(n) * alive, gradients(60, n)
    fisher = refilled(alive, size, c)
    fisher.accumulate(g)
    whole = max(1, size // c) * c
    expected = GramFisher(int(alive.sum()), whole, device=alive.device)
    expected.accumulate(g[:, alive])
    left, keep = weight[alive], torch.ones(int(alive.sum()), dtype=torch.bool)
    assert fisher.num_gradients == 60
    assert fisher.mean_squares() == pytest.approx(expected.mean_squares())
    scores = fisher.greedy_scores(weight, alive, DAMPING, c)
    by_group = alive.view(-1, c).all(1)
    assert not scores[~by_group].any()
    assert relative_error(scores[by_group], expected.greedy_scores(left, keep, DAMPING, c)) < 1e-6
    kept = alive & (scores > scores[by_group].median()).repeat_interleave(c)
    new, increase = fisher.update(weight, kept, DAMPING, c)
    known, predicted = expected.update(left, kept[alive], DAMPING, c)
    assert relative_error(new[alive], known) < 1e-6
    assert not new[~alive].any()
    assert increase == pytest.approx(predicted, rel=1e-6)


def test_groups_of_which_a_part_is_left_stay_groups():
    n, alive = 960, torch.rand(960) < 0.5
    weight, g = torch.randn(n) * alive, gradients(60, n)
    fisher = refilled(alive, 24, 4)
    fisher.accumulate(g)
    some = alive.view(-1, 4).any(1).repeat_interleave(4)
    expected = GramFisher(int(some.sum()), 24, device=some.device)
    expected.accumulate((g * alive)[:, some])
    arguments = (DAMPING, 2, 4)
    known = expected.n_of_m(weight[some], alive[some], *arguments)
    found = fisher.n_of_m(weight, alive, *arguments)
    assert torch.equal(found[some], known) and not found[~some].any()


def test_all_weights_make_an_ordinary_fisher_and_no_weight_an_empty_one():
    everything = torch.ones(200, dtype=torch.bool)
    assert isinstance(block_fisher(everything, 50, refill=True), GramFisher)
    nothing = refilled(~everything, 50)
    nothing.accumulate(gradients(3, 200))
    assert not nothing.scores(torch.zeros(200), DAMPING).any()


def test_groups_larger_than_the_largest_block_take_full_blocks():
    alive = torch.ones(600, dtype=torch.bool)
    alive[:300] = False
    assert isinstance(block_fisher(alive, 50, 300, refill=True), GramFisher)


def test_a_failed_block_is_named_by_its_first_weight():
    alive = torch.rand(500) < 0.3
    alive[300] = True
    g = gradients(20, 500)
    g[3, 300] = torch.nan
    fisher = refilled(alive, 10)
    fisher.accumulate(g)
    rank = int(alive[:300].sum())
    first = alive.nonzero().flatten()[rank // 10 * 10]
    with pytest.raises(NumericalError, match=f"block {int(first) // 10} is not"):
        fisher.scores(torch.randn(500) * alive, DAMPING)


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
def test_sub_steps_with_refilled_blocks(pattern):
    options = {"num_grads": 12, "steps": 3, "damping": 1e-3, "block_size": 20}
    pruned = {}
    for estimator in ("gram", "refilled"):
        torch.manual_seed(0)
        model = TinyEncoder()
        result = prune(model, batches(), 0.8, pattern, estimator=estimator, **options)
        assert result.report.sparsity == pytest.approx(0.8, abs=0.002)
        for name, weight in find_weights(model).items():
            assert torch.equal(weight != 0, result.masks[name])
        pruned[estimator] = torch.cat([w.flatten() for w in find_weights(model).values()])
    assert not torch.equal(pruned["gram"], pruned["refilled"])  # they had other company


def test_the_memory_plan_knows_them():
    alive = torch.rand(5000) < 0.1
    planned = estimators.find("refilled").num_bytes(alive, 50, 1, torch.float32)
    assert planned == block_fisher(alive, 50, dtype=torch.float32, refill=True).num_bytes
