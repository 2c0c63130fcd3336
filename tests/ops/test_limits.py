"""Blocks just inside and just outside of what operators accept, the same on every processor."""

import pytest
import torch
from problems import fresh_inverse, gradients, gram_of, relative_error

from obert_kernels import ops
from obert_kernels.ops import reference
from obert_kernels.ops.packing import pack_inverse

SIZES = [4, 8, 20, 50, 64, 70]


@pytest.mark.parametrize("block_size", SIZES)
def test_a_denominator_below_half_of_m_is_refused(isa, block_size):
    """Though it is positive, and so is the diagonal afterwards."""
    inverse = pack_inverse((torch.eye(block_size) * 10).repeat(3, 1, 1))
    dense = torch.eye(block_size) * 10
    dense[0, 1] = dense[1, 0] = -14
    inverse[1] = pack_inverse(dense[None])[0]
    g = torch.zeros(2, 3 * block_size)
    g[0, [0, 1, block_size, block_size + 1]] = 1  # g^T F^-1 g = -8 in the second block
    for m, expected in ((10.0, 1), (15.0, 1), (17.0, -1)):
        state, status = inverse.clone(), ops.new_status()
        ops.woodbury_update(state, g, m, status)
        assert status.item() == expected, m
        assert torch.equal(state[1], inverse[1]) == (expected == 1)
        assert not torch.equal(state[0], inverse[0]) and torch.equal(state[2], inverse[2])


@pytest.mark.parametrize("block_size", SIZES)
def test_a_denominator_that_no_float32_holds_is_refused(isa, block_size):
    """One gradient of many: those behind it do not make up for it."""
    g = gradients(7, 3 * block_size)
    g[3, block_size + block_size // 2] = 1e20
    before = fresh_inverse(3, block_size)
    state, status = before.clone(), ops.new_status()
    ops.woodbury_update(state, g, 7.0, status)
    assert status.item() == 1 and torch.equal(state[1], before[1])
    expected = before.clone()
    reference.woodbury_update(expected, g, 7.0, ops.new_status())
    assert relative_error(state, expected) < 1e-4


@pytest.mark.parametrize("block_size", SIZES)
def test_an_infinite_diagonal_is_refused(isa, block_size):
    """Alone: no entry beside it says so, and its inverse would be zero."""
    n = 3 * block_size
    gram, v, fisher = gram_of(gradients(40, n), block_size), torch.randn(n), (block_size, 40.0, 1.0)
    everything, keep = torch.ones(n, dtype=torch.bool), torch.arange(n) % block_size > 0
    for i in (0, block_size - 1):
        spoilt = gram.clone()
        row = i * (i + 1) // 2
        spoilt[1, row : row + i] = 0
        spoilt[1, row + i] = float("inf")
        for name, call in {
            "inverse": lambda s: ops.gram_inverse(spoilt, n, *fisher, torch.float64, s),  # noqa: B023
            "solve": lambda s: ops.gram_solve(spoilt, v, *fisher, s),  # noqa: B023
            "diagonal": lambda s: ops.gram_diagonal(spoilt, n, *fisher, torch.float64, s),  # noqa: B023
            "scores": lambda s: ops.gram_scores(spoilt, v, 1, *fisher, s),  # noqa: B023
            "greedy": lambda s: ops.gram_greedy_scores(spoilt, v, everything, 1, *fisher, s),  # noqa: B023
            "N:M": lambda s: ops.gram_n_of_m(spoilt, v, everything, 1, 2, *fisher, s),  # noqa: B023
            "sum": lambda s: ops.gram_update(spoilt, v, keep, 1, False, *fisher, s),  # noqa: B023
        }.items():
            status = ops.new_status()
            call(status)
            assert status.item() == 1, (name, i)


@pytest.mark.parametrize("block_size", [2, 4, 20, 48, 64])
@pytest.mark.parametrize("other", [1, -1])
def test_costs_are_compared_in_float64(isa, block_size, other):
    """Of two that a float32 does not tell apart the smaller goes, wherever it stands."""
    n = 2 * block_size
    gram = torch.zeros(2, block_size * (block_size + 1) // 2, dtype=torch.float64)
    weight = torch.ones(n, dtype=torch.float64)
    weight[1::2] += other * 1e-9
    everything, fisher = torch.ones(n, dtype=torch.bool), (block_size, 1.0, 1.0)
    found = ops.gram_n_of_m(gram, weight, everything, 1, 2, *fisher, ops.new_status())
    assert torch.equal(found, torch.arange(n) % 2 == (other == 1))


@pytest.mark.parametrize("block_size", SIZES)
def test_a_weight_that_stays_may_lack_all_information(cuda_on_host, block_size):
    """Its entry of the inverse is infinite, and nothing depends on it.

    CUDA alone: CPU kernels work on several weights at once, and refuse such a block.
    """
    n = 3 * block_size
    gram = torch.eye(block_size, dtype=torch.float64)
    gram[1, 1] = 0
    lower = torch.ones(block_size, block_size, dtype=torch.bool).tril()
    gram = gram[lower].repeat(3, 1)
    weight, keep = torch.randn(n), torch.arange(n) % block_size != 0
    for group in (1, 2):
        if group == 2:
            keep[:] = torch.arange(n) % block_size < 2
        status = ops.new_status()
        new, increase = ops.gram_update(
            gram, weight, keep, group, False, block_size, 1.0, 1e-315, status
        )
        assert status.item() == -1
        assert torch.equal(new, weight * keep)
        expected = 0.5 * (weight * ~keep).double().square().view(3, -1).sum(1)
        assert relative_error(increase, expected) < 1e-6


@pytest.mark.parametrize("block_size", [5, 6, 50])
def test_every_entry_of_a_diagonal_names_its_own_block(isa, block_size):
    """Also where four weights that are scored together lie in two blocks."""
    n = 4 * block_size
    start, weight = fresh_inverse(4, block_size), torch.randn(n)
    for i in range(n):
        inverse, status = start.clone(), ops.new_status()
        inverse[i // block_size, i % block_size] = -1.0
        ops.inverse_scores(inverse, weight, 1, status)
        assert status.item() == i // block_size, i


@pytest.mark.parametrize("block_size", [4, 20, 64])
@pytest.mark.parametrize("last", [False, True])
def test_sets_that_all_cost_more_than_a_float64_holds_are_refused(isa, block_size, last):
    """The weights are finite, their squares are not.  Groups that have been pruned come back."""
    n = 3 * block_size
    gram = gram_of(gradients(40, n), block_size)
    weight, everything = torch.randn(n, dtype=torch.float64), torch.ones(n, dtype=torch.bool)
    begin = 2 * block_size - 4 if last else block_size
    weight[begin : begin + 4] = 1e200
    status = ops.new_status()
    found = ops.gram_n_of_m(gram, weight, everything, 2, 4, block_size, 40.0, 1.0, status)
    assert status.item() == 1 and found[block_size : 2 * block_size].all()
    assert found.sum() == n // 2 + block_size // 2


def nearly_two_others(block_size: int, share: float, more: float) -> torch.Tensor:
    """The packed Gram of a block whose first weight is the next two and ``more``."""
    f = torch.eye(block_size, dtype=torch.float64)
    f[0, 0], f[1, 0], f[2, 0] = 1 + share + more, 1, share**0.5
    return f[torch.ones(block_size, block_size, dtype=torch.bool).tril()].view(1, -1)


@pytest.mark.parametrize("block_size", [8, 20, 64])
@pytest.mark.parametrize("scale", [1, 2**60])
def test_a_set_whose_pivot_is_lost_refuses_its_block(isa, block_size, scale):
    """Though another set would cost less; what is lost may be zero, or less than it."""
    weight, everything = torch.ones(block_size), torch.ones(block_size, dtype=torch.bool)
    weight[1], weight[2] = 1000, 0
    tried = 0
    for step in range(24):
        gram = nearly_two_others(block_size, 2**-26 * (1 + step / 8), 2**-54 * (1 + step / 6))
        gram, fisher, status = scale * gram, (block_size, 1.0, 1e-300), ops.new_status()
        ops.gram_diagonal(gram, block_size, *fisher, torch.float64, status)
        if status.item() == -1:  # no pivot of the factor says so
            tried += 1
            found = ops.gram_n_of_m(gram, weight, everything, 1, 4, *fisher, status)
            assert status.item() == 0 and found.all()
    assert tried >= 10


@pytest.mark.parametrize("block_size", [4, 20, 64])
def test_a_singular_block_is_refused_though_its_last_weight_stays_anyway(isa, block_size):
    """It is alone in its group, and the same as one of the group before."""
    gram = torch.eye(block_size, dtype=torch.float64)
    gram[-1, -3] = 1
    gram = gram[torch.ones(block_size, block_size, dtype=torch.bool).tril()].view(1, -1)
    keep, status = torch.arange(block_size) != block_size - 2, ops.new_status()
    weight = keep.float()
    found = ops.gram_n_of_m(gram, weight, keep, 1, 2, block_size, 1.0, 1e-300, status)
    assert status.item() == 0 and torch.equal(found, keep)


@pytest.mark.parametrize("block_size", SIZES)
def test_an_infinite_diagonal_is_refused_without_a_gradient(isa, block_size):
    inverse, status = fresh_inverse(3, block_size), ops.new_status()
    inverse[1, block_size - 1] = float("inf")
    ops.woodbury_update(inverse, torch.zeros(0, 3 * block_size), 1.0, status)
    assert status.item() == 1


@pytest.mark.parametrize("block_size", [4, 20, 64])
def test_an_update_does_not_look_at_the_diagonal_of_what_stays(cuda_on_host, block_size):
    """CUDA alone: CPU kernels work on several weights at once, and refuse such a block."""
    weight, keep = torch.randn(block_size), torch.arange(block_size) % 2 == 1
    inverse, status = fresh_inverse(1, block_size), ops.new_status()
    inverse[0, block_size:] = 1.0
    expected, _ = ops.inverse_update(inverse, weight, keep, 1, False, False, status)
    inverse[0, 1] = -1.0
    found, _ = ops.inverse_update(inverse, weight, keep, 1, False, False, status)
    assert status.item() == -1 and torch.equal(found, expected)
    assert not torch.equal(found, weight * keep)


def test_at_the_border_a_block_is_refused_or_has_the_pattern(isa):
    """Where the cost of a set and its removal may disagree on a pivot by a rounding."""
    weight, everything = torch.tensor([1.0, 0, 0, 1]), torch.ones(4, dtype=torch.bool)
    seen = set()
    for share in torch.logspace(-30, -22, 12, base=2).tolist():
        for more in torch.logspace(-52, -49.5, 25, base=2).tolist():
            gram, status = nearly_two_others(4, share, more), ops.new_status()
            found = ops.gram_n_of_m(gram, weight, everything, 1, 4, 4, 1.0, 1e-300, status)
            assert found.sum() == (1 if status.item() == -1 else 4)
            seen.add(status.item())
    assert seen == {-1, 0}


@pytest.mark.parametrize("block_size", SIZES)
def test_the_last_weight_of_a_block_may_not_lack_all_information(isa, block_size):
    """Nobody comes after it who would find what its removal leaves."""
    n = 3 * block_size
    gram = torch.zeros(3, block_size * (block_size + 1) // 2, dtype=torch.float64)
    keep, status = torch.zeros(n, dtype=torch.bool), ops.new_status()
    keep[block_size + 1] = True
    weight = torch.randn(n) * keep
    ops.gram_greedy_scores(gram, weight, keep, 1, block_size, 1.0, 1e-315, status)
    assert status.item() == 1
