"""Greedy selection: the order of exact removals, from the oracle up to the model."""

import functools

import pytest
import torch
from problems import DAMPING, gradients, gram_of, onto_nan, relative_error, sizes
from test_ops import BLOCK_SIZES, group_for, skip_if_refused
from tiny import TinyEncoder, batches, train

from obert_kernels import GramFisher, estimate_fisher, find_weights, ops, prune
from obert_kernels.ops import reference


def problem(n, block_size, k=40):
    return gram_of(gradients(k, n), block_size), (block_size, float(k), DAMPING)


def both(gram, weight, keep, c, fisher):
    found = onto_nan(ops.gram_greedy_scores, gram, weight, keep, c, *fisher, ops.new_status())
    expected = reference.gram_greedy_scores(
        gram, weight.double(), keep, c, *fisher, ops.new_status()
    )
    return found, expected


@functools.cache
def cases(block_size, device):
    """Problems and their solutions, which take longer than the kernels: once for all of them."""
    found = []
    for n in sizes(block_size) if block_size < 60 else [block_size + block_size // 3]:
        gram, fisher = problem(n, block_size)
        for share, c in ((1.0, 1), (1.0, group_for(n)), (0.4, 1), (0.4, group_for(n))):
            keep = torch.rand(n) < share
            weight = torch.randn(n) * keep
            status = ops.new_status()
            expected = reference.gram_greedy_scores(gram, weight.double(), keep, c, *fisher, status)
            assert int(status) == -1
            found.append((gram, weight, keep, c, fisher, expected))
    return found


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_against_the_oracle(isa, block_size):
    """Which works everything out anew at each step."""
    skip_if_refused(isa, block_size)
    for gram, weight, keep, c, fisher, expected in cases(block_size, torch.get_default_device()):
        status = ops.new_status()
        found = onto_nan(ops.gram_greedy_scores, gram, weight, keep, c, *fisher, status)
        assert int(status) == -1
        assert found.dtype == torch.float32
        assert relative_error(found, expected) < 1e-6
        alive = keep.view(-1, c).any(dim=1)
        assert not found[~alive].any(), "what is gone already costs nothing"


@pytest.mark.parametrize("c", [2, 3, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("block_size", [4, 10, 32, 50])
def test_groups_across_block_borders(isa, block_size, c):
    n = c * max(3, 2 * block_size // c + 1)
    gram, fisher = problem(n, block_size)
    keep = torch.rand(n) < 0.8
    found, expected = both(gram, torch.randn(n) * keep, keep, c, fisher)
    assert relative_error(found, expected) < 1e-6


def dense_fisher(n, k=40):
    gram, fisher = problem(n, n, k)
    return gram, fisher, reference.unpack_fisher(gram, k, DAMPING)[0]


@pytest.mark.parametrize("c", [1, 2, 3])
def test_the_order_is_that_of_exact_removals(isa, c):
    """By hand: remove the cheapest group, let the rest adapt, go on."""
    n = 12
    gram, fisher, dense = dense_fisher(n)
    start = torch.randn(n, dtype=torch.float64)
    groups, weight, most = list(range(n // c)), start.clone(), 0.0
    expected = torch.zeros(n // c)
    while groups:
        left = [g * c + i for g in groups for i in range(c)]
        inverse = dense[left][:, left].inverse()
        costs = []
        for index, g in enumerate(groups):
            own = slice(index * c, index * c + c)
            w = weight[g * c : g * c + c]
            costs.append(0.5 * w @ torch.linalg.solve(inverse[own, own], w))
        index = int(torch.stack(costs).argmin())
        own, g = slice(index * c, index * c + c), groups.pop(index)
        expected[g] = most = max(most, float(costs[index]))
        gone = torch.linalg.solve(inverse[own, own], weight[g * c : g * c + c])
        weight[left] -= inverse[:, own] @ gone
    found, _ = both(gram, start, torch.ones(n, dtype=torch.bool), c, fisher)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def increase(dense, weight, keep):
    """Loss increase of the best update for a mask."""
    pruned = ~keep
    schur = dense.inverse()[pruned][:, pruned].inverse()
    return 0.5 * weight[pruned] @ schur @ weight[pruned]


def test_the_update_of_a_mask_costs_what_was_predicted(isa):
    n = 20
    gram, fisher, dense = dense_fisher(n)
    weight = torch.randn(n, dtype=torch.float64)
    keep = torch.ones(n, dtype=torch.bool)
    found, _ = both(gram, weight, keep, 1, fisher)
    order = found.argsort(stable=True)
    for count in (1, 5, 13):
        after = keep.clone()
        after[order[:count]] = False
        _, predicted = ops.gram_update(gram, weight, after, 1, True, *fisher, ops.new_status())
        assert float(predicted) == pytest.approx(float(increase(dense, weight, after)), rel=1e-6)
    # The first removal is the diagonal's; later ones are no worse in the end.
    scores = ops.gram_scores(gram, weight, 1, *fisher, ops.new_status())
    assert int(scores.argmin()) == int(found.argmin())
    diagonal, greedy = keep.clone(), keep.clone()
    diagonal[scores.argsort()[:13]] = False
    greedy[order[:13]] = False
    assert increase(dense, weight, greedy) < increase(dense, weight, diagonal)


def test_twins_are_not_both_removed(isa):
    """Two weights that do the same: either can go for nothing, both cannot."""
    n = 4
    g = torch.randn(200, n)
    g[:, 1] = g[:, 0]
    gram, fisher = gram_of(g, n), (n, 200.0, 1e-6)
    weight, keep = torch.ones(n), torch.ones(n, dtype=torch.bool)
    diagonal = ops.gram_scores(gram, weight, 1, *fisher, ops.new_status())
    assert set(diagonal.argsort()[:2].tolist()) == {0, 1}
    greedy, _ = both(gram, weight, keep, 1, fisher)
    assert len({0, 1} & set(greedy.argsort()[:2].tolist())) == 1


@pytest.mark.parametrize("block_size", [3, 6, 10])
def test_a_lost_block_is_reported(isa, block_size):
    n = 3 * block_size
    gram, fisher = problem(n, block_size)
    gram[1, 0] = float("nan")
    keep, status = torch.ones(n, dtype=torch.bool), ops.new_status()
    ops.gram_greedy_scores(gram, torch.randn(n), keep, 1, *fisher, status)
    assert int(status) == 1
    # Not where the failing weight is gone already.
    keep[block_size], status = False, ops.new_status()
    ops.gram_greedy_scores(gram, torch.randn(n) * keep, keep, 1, *fisher, status)
    assert int(status) == -1


@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("block_size", [6, 10, 70])
def test_a_weight_whose_cost_is_no_number_is_reported(isa, c, value, block_size):
    """1e200: its square is infinite.  One of 70 weights moves up meanwhile."""
    n = 3 * block_size
    gram, fisher = problem(n, block_size)
    weight, keep, status = torch.randn(n).double(), torch.ones(n).bool(), ops.new_status()
    weight[block_size + 4] = value
    ops.gram_greedy_scores(gram, weight, keep, c, *fisher, status)
    assert int(status) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_types_alignment_and_many_blocks(isa, dtype):
    n = 37 * 16
    gram, fisher = problem(n, 16)
    storage = torch.randn(n + 1, dtype=dtype)
    keep = (torch.rand(n + 1) < 0.9)[1:]
    weight = storage[1:]
    found, expected = both(gram.float(), weight, keep, 4, fisher)
    assert relative_error(found, expected) < 1e-6  # the oracle has the same Gram
    found, expected = both(gram, weight, keep, 4, fisher)
    assert relative_error(found, expected) < 1e-6


@pytest.mark.parametrize("block_size", [4, 5, 10])
def test_nothing_left_and_zero_weights(isa, block_size):
    gram, fisher = problem(20, block_size)
    keep = torch.zeros(20, dtype=torch.bool)
    found, expected = both(gram, torch.zeros(20), keep, 1, fisher)
    assert not found.any() and not expected.any()
    keep[:] = True
    weight = torch.randn(20)
    weight[3] = weight[15] = 0
    found, expected = both(gram, weight, keep, 1, fisher)
    assert relative_error(found, expected) < 1e-6
    assert found[3] == found[15] == 0, "a weight that is zero goes for nothing"


def test_pruning_loses_less_than_with_the_diagonal():
    """On the loss predicted by the Fisher itself, and by default."""
    model, data = TinyEncoder(width=16), batches(40)
    train(model, data, 10)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fisher = estimate_fisher(model, data, num_grads=40, block_size=16)
    predicted = {}
    for name, options in {
        "default": {},
        "greedy": {"selection": "greedy", "update": "joint"},
        "diagonal": {"selection": "diagonal"},
    }.items():
        model.load_state_dict(before)
        report = prune(model, sparsity=0.7, fisher=fisher, damping=1e-5, **options).report
        predicted[name] = report.predicted_increase
    assert predicted["default"] == predicted["greedy"] < predicted["diagonal"]


@pytest.mark.parametrize("pattern", ["unstructured", "block4"])
def test_what_is_pruned_stays_pruned(pattern):
    model, data = TinyEncoder(), batches(24)
    first = prune(model, data, 0.5, pattern, num_grads=24, damping=1e-5).masks
    second = prune(model, data, 0.8, pattern, num_grads=24, damping=1e-5)
    assert second.report.sparsity == pytest.approx(0.8, abs=0.01)
    for name, weight in find_weights(model).items():
        assert not (second.masks[name] & ~first[name]).any()
        assert torch.equal(weight != 0, second.masks[name])


def test_the_class_says_the_same():
    g = gradients(40, 30)
    fisher = GramFisher(30, 10)
    fisher.accumulate(g)
    weight, keep = torch.randn(30), torch.rand(30) < 0.7
    expected = reference.gram_greedy_scores(
        fisher.gram, weight.double(), keep, 1, 10, 40.0, DAMPING, ops.new_status()
    )
    assert relative_error(fisher.greedy_scores(weight.bfloat16(), keep, DAMPING), expected) < 0.05
    assert relative_error(fisher.greedy_scores(weight, keep, DAMPING), expected) < 1e-6
