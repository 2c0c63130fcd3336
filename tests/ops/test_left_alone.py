"""What operators must not look at, and failures that only some of a block's groups see."""

import pytest
import torch
from problems import DAMPING, gradients, gram_of, relative_error

from obert_kernels import ops
from obert_kernels.ops import reference

SIZES = [4, 8, 20, 50, 64, 70]


@pytest.mark.parametrize("block_size", SIZES)
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("joint", [False, True])
def test_a_block_that_loses_nothing_is_not_looked_at(isa, block_size, group, joint):
    """Its Gram may be lost: its weights stay, as do those of a block that loses zeros alone."""
    n = 4 * block_size
    gram, weight = gram_of(gradients(30, n), block_size), torch.randn(n)
    keep = torch.arange(n) // group % 2 == 1
    keep[block_size : 2 * block_size] = True
    weight[2 * block_size : 3 * block_size] *= keep[2 * block_size : 3 * block_size]
    inverse = reference.gram_inverse(
        gram, n, block_size, 30.0, DAMPING, torch.float32, ops.new_status()
    )
    fisher = (block_size, 30.0, DAMPING)
    expected = reference.gram_update(gram, weight, keep, group, joint, *fisher, ops.new_status())
    gram[1:3], inverse[1:3] = float("nan"), float("nan")
    status = ops.new_status()
    for new, increase in (
        ops.gram_update(gram, weight, keep, group, joint, *fisher, status),
        ops.inverse_update(inverse, weight, keep, group, joint, True, status),
    ):
        assert status.item() == -1
        assert torch.equal(new[block_size : 3 * block_size], weight[block_size : 3 * block_size])
        assert not increase[1:3].any()
        assert relative_error(new, expected[0]) < 1e-4


@pytest.mark.parametrize("block_size", SIZES)
@pytest.mark.parametrize("group", [2, 4])
@pytest.mark.parametrize("last", [False, True])
def test_one_group_that_no_float64_holds_fails_its_block(isa, block_size, group, last):
    """Its entries of the inverse are infinite, those of the other groups are not."""
    n = 3 * block_size
    dense = torch.eye(block_size, dtype=torch.float64).repeat(3, 1, 1)
    lost = slice(block_size - 1, block_size) if last else slice(0, 1)
    dense[1, lost, lost] = 0
    lower = torch.ones(block_size, block_size, dtype=torch.bool).tril()
    gram, weight = dense[:, lower], torch.randn(n)
    everything, fisher = torch.ones(n, dtype=torch.bool), (block_size, 1.0, 1e-315)
    keep = torch.arange(n) % block_size < 0
    if n % group:
        group = 2
    for name, call in {
        "scores": lambda s: ops.gram_scores(gram, weight, group, *fisher, s),
        "greedy": lambda s: ops.gram_greedy_scores(gram, weight, everything, group, *fisher, s),
        "sum": lambda s: ops.gram_update(gram, weight, keep, group, False, *fisher, s),
    }.items():
        status = ops.new_status()
        call(status)
        assert status.item() == 1, name
