"""Properties that hold for any data: what the formulas promise, not what the code does."""

import pytest
import torch
from problems import DAMPING, gradients, gram_of, relative_error

from obert_kernels import GramFisher, WoodburyFisher
from obert_kernels.ops import reference


def fisher_and_gradients(n=120, block_size=40, k=60):
    g = gradients(k, n)
    fisher = GramFisher(n, block_size)
    fisher.accumulate(g)
    return fisher, g


def dense_fisher(fisher: GramFisher, damping=DAMPING):
    blocks = reference.unpack_fisher(fisher.gram, fisher.num_gradients, damping)
    return torch.block_diag(*blocks)[: fisher.num_weights, : fisher.num_weights]


def test_fisher_times_inverse_is_identity():
    fisher, _ = fisher_and_gradients()
    inverse = torch.block_diag(*fisher.inverse(DAMPING, torch.float64))
    identity = torch.eye(120, dtype=torch.float64)
    assert relative_error(dense_fisher(fisher) @ inverse, identity) < 1e-12
    assert relative_error(fisher.diagonal(DAMPING, torch.float64), inverse.diagonal()) < 1e-13
    v = torch.randn(120, dtype=torch.float64)
    assert relative_error(fisher.solve(v, DAMPING), inverse @ v) < 1e-12


def test_order_of_gradients_and_merging_do_not_matter():
    fisher, g = fisher_and_gradients()
    shuffled = GramFisher(120, 40)
    for part in g[torch.randperm(60)].split(7):
        shuffled.accumulate(part)
    assert relative_error(shuffled.gram, fisher.gram) < 1e-14
    halves = [GramFisher(120, 40) for _ in range(2)]
    for half, part in zip(halves, g.split(30), strict=True):
        half.accumulate(part)
    halves[0].merge(halves[1])
    assert halves[0].num_gradients == 60
    assert relative_error(halves[0].gram, fisher.gram) < 1e-14
    assert relative_error(halves[0].diagonal(1e-4), fisher.diagonal(1e-4)) < 1e-6


def test_single_gradients_and_fewer_than_a_block():
    """m < B: the Fisher is singular but for the damping."""
    fisher, woodbury = GramFisher(30, 30), WoodburyFisher(30, 3, 30, damping=DAMPING)
    for g in gradients(3, 30):
        fisher.accumulate(g)
        woodbury.accumulate(g)
    assert relative_error(woodbury.diagonal(), fisher.diagonal(DAMPING)) < 1e-4


@pytest.mark.parametrize("kind", ["gram", "woodbury"])
def test_zero_gradients_leave_magnitude(kind):
    """Without information F = damping I: saliency is damping w^2 / 2 and nothing compensates."""
    if kind == "gram":
        fisher = GramFisher(70, 50)
        fisher.accumulate(torch.zeros(4, 70))
        extra = (DAMPING,)
    else:
        fisher = WoodburyFisher(70, 4, 50, damping=DAMPING)
        fisher.accumulate(torch.zeros(4, 70))
        extra = ()
    weight = torch.randn(70)
    scores = fisher.scores(weight, *extra)
    assert relative_error(scores, DAMPING * weight.double().square() / 2) < 1e-6
    keep = torch.rand(70) < 0.5
    for rule in ("sum", "joint"):
        new, increase = fisher.update(weight, keep, *extra, rule=rule)
        assert torch.equal(new, weight * keep)
        assert increase == pytest.approx(float(DAMPING * (weight * ~keep).square().sum() / 2))


@pytest.mark.parametrize("group_size", [1, 4])
def test_single_removal_costs_its_score(group_size):
    """Removing one group alone: both rules are exact and cost the saliency."""
    fisher, _ = fisher_and_gradients()
    weight = torch.randn(120, dtype=torch.float64)
    scores = fisher.scores(weight, DAMPING, group_size)
    for group in (0, 7, 120 // group_size - 1):
        keep = torch.ones(120, dtype=torch.bool)
        keep[group * group_size : (group + 1) * group_size] = False
        for rule in ("sum", "joint"):
            _, increase = fisher.update(weight, keep, DAMPING, group_size, rule)
            assert increase == pytest.approx(float(scores[group]), rel=1e-6)


@pytest.mark.parametrize("group_size", [1, 2, 4, 8])
def test_predicted_increase_is_the_increase_of_a_quadratic_loss(group_size):
    """L(w) = 1/2 (w - w*)^T F (w - w*) at its minimum: the prediction is the truth."""
    fisher, _ = fisher_and_gradients()
    dense = dense_fisher(fisher)
    weight = torch.randn(120, dtype=torch.float64)
    keep = (torch.rand(120 // group_size) < 0.4).repeat_interleave(group_size)
    losses = {}
    for rule in ("sum", "joint"):
        new, increase = fisher.update(weight, keep, DAMPING, group_size, rule)
        change = new - weight
        losses[rule] = float(0.5 * change @ dense @ change)
        assert increase == pytest.approx(losses[rule], rel=1e-9)
        assert not new[~keep].any()
    zeroed = weight * ~keep
    losses["none"] = float(0.5 * zeroed @ dense @ zeroed)
    assert losses["joint"] <= losses["sum"] * (1 + 1e-12)
    assert losses["joint"] < losses["none"]


def test_joint_update_is_the_minimum():
    """At the joint solution the loss has no slope along any surviving weight."""
    fisher, _ = fisher_and_gradients()
    weight, keep = torch.randn(120, dtype=torch.float64), torch.rand(120) < 0.3
    new, _ = fisher.update(weight, keep, DAMPING, rule="joint")
    slope = dense_fisher(fisher) @ (new - weight)
    assert float(slope[keep].abs().max()) < 1e-12 * float(slope.abs().max())


def test_weights_pruned_before_stay_and_count_nothing():
    fisher, _ = fisher_and_gradients()
    weight = torch.randn(120, dtype=torch.float64)
    first = torch.rand(120) < 0.6
    once, _ = fisher.update(weight, first, DAMPING)
    again, increase = fisher.update(once, first, DAMPING)
    assert torch.equal(again, once) and increase == 0
    second = first & (torch.rand(120) < 0.5)
    for rule in ("sum", "joint"):
        new, _ = fisher.update(once, second, DAMPING, rule=rule)
        assert not new[~second].any()
    # Exact sequential removal in two steps equals the joint removal at once.
    twice, _ = fisher.update(once, second, DAMPING, rule="joint")
    at_once, _ = fisher.update(weight, second, DAMPING, rule="joint")
    assert relative_error(twice, at_once) < 1e-9


def test_dead_rows_do_not_change_the_living():
    """Masked gradients: rows and columns of pruned weights drop out of the problem."""
    g = gradients(60, 40)
    dead = torch.rand(40) < 0.6
    full, live = GramFisher(40, 40), GramFisher(int((~dead).sum()), 40)
    full.accumulate(g.masked_fill(dead, 0))
    live.accumulate(g[:, ~dead])
    weight = torch.randn(40).masked_fill(dead, 0)
    scores = full.scores(weight, DAMPING)
    assert relative_error(scores[~dead], live.scores(weight[~dead], DAMPING)) < 1e-6
    assert not scores[dead].any()


def test_everything_and_nothing_pruned():
    fisher, _ = fisher_and_gradients()
    weight = torch.randn(120)
    for rule in ("sum", "joint"):
        new, increase = fisher.update(weight, torch.zeros(120, dtype=torch.bool), 1e-4, rule=rule)
        assert not new.any() and increase > 0
        new, increase = fisher.update(weight, torch.ones(120, dtype=torch.bool), 1e-4, rule=rule)
        assert torch.equal(new, weight) and increase == 0


def test_half_precision_weights_come_back_in_their_type():
    fisher, _ = fisher_and_gradients()
    for dtype in (torch.bfloat16, torch.float16):
        weight = torch.randn(120).to(dtype)
        keep = torch.rand(120) < 0.5
        new, _ = fisher.update(weight, keep, DAMPING)
        exact, _ = fisher.update(weight.double(), keep, DAMPING)
        assert new.dtype == dtype
        assert torch.equal(new, exact.float().to(dtype))


def test_gram_of_gradients_matches_plain_sum():
    g = gradients(11, 24)
    gram = gram_of(g, 24)
    row, column = torch.tril_indices(24, 24)
    assert torch.equal(gram[0], (g.double().T @ g.double())[row, column])
