"""Blocks that break down, and values that are not finite: found by every operator everywhere."""

import math

import pytest
import torch
from problems import DAMPING, fresh_inverse, gradients, gram_of, relative_error

from obert_kernels import ops
from obert_kernels.ops import reference
from obert_kernels.ops.living import gram_accumulate_living
from obert_kernels.ops.packing import pack_inverse

pytestmark = pytest.mark.usefixtures("one_thread")

INF, NAN = float("inf"), float("nan")
HALVES = [torch.bfloat16, torch.float16]


# ---- gradients of 16 bits ------------------------------------------------------------


def every_half(dtype: torch.dtype) -> torch.Tensor:
    """All 65,536 of them, infinities and every NaN among them."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("block_size", [128, 100])
def test_every_half_is_read_as_what_it_is(isa, dtype, block_size):
    """The first weight of each block has the gradient 1: its products are the other gradients."""
    halves = every_half(dtype)
    blocks = -(-len(halves) // (block_size - 1))
    rows = torch.zeros(blocks * (block_size - 1), dtype=dtype)
    rows[: len(halves)] = halves
    rows = rows.view(blocks, block_size - 1)
    g = torch.cat([torch.ones(blocks, 1, dtype=dtype), rows], dim=1).view(1, -1)
    first_column = [i * (i + 1) // 2 for i in range(1, block_size)]
    gram = torch.zeros(blocks, block_size * (block_size + 1) // 2)
    living = torch.zeros_like(gram)
    tables = (
        torch.arange(blocks) * gram.shape[1],
        torch.arange(blocks + 1) * block_size,
        torch.arange(blocks * block_size, dtype=torch.int32),
    )
    ops.gram_accumulate(gram, g, block_size)
    gram_accumulate_living(living.view(-1), g, *tables)
    for found in (gram, living):
        # Zeros have lost their sign in the sum.
        torch.testing.assert_close(
            found[:, first_column], rows.float(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("value", [-INF, NAN])
@pytest.mark.parametrize("block_size", [4, 20, 50])
def test_a_gradient_that_is_not_finite_is_reported(isa, dtype, value, block_size):
    n, spoilt = 5 * block_size, 3 * block_size + block_size // 2
    g = gradients(6, n, 1.0, dtype)
    g[4, spoilt] = value
    assert not g[4, spoilt].isfinite()
    gram = torch.zeros(5, block_size * (block_size + 1) // 2, dtype=torch.float64)
    ops.gram_accumulate(gram, g, block_size)
    entries = torch.ones(block_size, block_size).tril().nonzero()
    touched = (entries == block_size // 2).any(dim=1)
    assert not gram[3, touched].isfinite().any() and gram[3, ~touched].isfinite().all()
    assert gram[[0, 1, 2, 4]].isfinite().all()

    inverse, status = fresh_inverse(5, block_size), ops.new_status()
    before = inverse.clone()
    ops.woodbury_update(inverse, g, 6.0, status)
    assert status.item() == 3
    assert torch.equal(inverse[3], before[3]), "a failed block keeps its state"
    assert inverse.isfinite().all() and not torch.equal(inverse[4], before[4])

    weight, keep, fisher = torch.randn(n), torch.arange(n) % 2 == 0, (block_size, 6.0, DAMPING)
    made = (n, *fisher, torch.float64)
    for call in (
        lambda status: ops.gram_diagonal(gram, *made, status),
        lambda status: ops.gram_inverse(gram, *made, status),
        lambda status: ops.gram_solve(gram, weight, *fisher, status),
        lambda status: ops.gram_scores(gram, weight, 1, *fisher, status),
        lambda status: ops.gram_scores(gram, weight, 2, *fisher, status),
        lambda status: ops.gram_greedy_scores(gram, weight, keep, 1, *fisher, status),
        lambda status: ops.gram_n_of_m(gram, weight, keep | True, 1, 2, *fisher, status),
        lambda status: ops.gram_update(gram, weight, keep, 1, True, *fisher, status),
        lambda status: ops.gram_update(gram, weight, keep, 1, False, *fisher, status),
    ):
        status = ops.new_status()
        call(status)
        # The spoilt weight may have been pruned before: its row is not looked at then.
        assert status.item() == 3 or (call.__code__.co_names[1] == "gram_greedy_scores")


# ---- pivots --------------------------------------------------------------------------


def gram_with(block_size: int, dtype: torch.dtype, excess: float) -> torch.Tensor:
    """Three blocks; in the middle one the last weight is the one before it and a little more.

    Its last pivot is ``excess`` times what rounding in the sums of that type may leave.
    """
    f = torch.eye(block_size, dtype=torch.float64).repeat(3, 1, 1)
    rounding = torch.finfo(dtype).eps * block_size
    f[1, -1, -2] = f[1, -2, -1] = 1
    f[1, -1, -1] = 1 + excess * rounding
    lower = torch.ones(block_size, block_size, dtype=torch.bool).tril()
    gram = f[:, lower].to(dtype)
    assert torch.equal(gram.double(), f[:, lower]), "held exactly"
    return gram


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [2, 4, 16, 36, 50, 64])
@pytest.mark.parametrize("excess", [0.5, 1.5])
def test_a_gram_singular_to_rounding_is_refused(isa, dtype, block_size, excess):
    gram = 1024 * gram_with(block_size, dtype, excess)
    n = 3 * block_size
    weight, keep = torch.randn(n), torch.ones(n, dtype=torch.bool)
    fisher = (block_size, 1.0, 1e-30)  # so little damping changes no bit
    made = (n, *fisher, torch.float64)
    lost = keep.clone()
    lost[block_size : block_size + 1] = False  # of the middle block, not of the two alike
    if block_size == 2:
        lost[block_size : block_size + 1] = True
        lost[block_size] = False
    calls = {
        "diagonal": lambda status: ops.gram_diagonal(gram, *made, status),
        "inverse": lambda status: ops.gram_inverse(gram, *made, status),
        "solve": lambda status: ops.gram_solve(gram, weight, *fisher, status),
        "scores": lambda status: ops.gram_scores(gram, weight, 1, *fisher, status),
        "group scores": lambda status: ops.gram_scores(gram, weight, 2, *fisher, status),
        "greedy": lambda status: ops.gram_greedy_scores(gram, weight, keep, 1, *fisher, status),
        "N:M": lambda status: ops.gram_n_of_m(gram, weight, keep, 1, 2, *fisher, status),
        "sum": lambda status: ops.gram_update(gram, weight, lost, 1, False, *fisher, status),
    }
    if block_size > 2:
        calls["joint"] = lambda status: ops.gram_update(
            gram, weight, lost, 1, True, *fisher, status
        )
    for name, call in calls.items():
        status = ops.new_status()
        call(status)
        assert status.item() == (1 if excess < 1 else -1), name


@pytest.mark.parametrize("block_size", [4, 8, 20, 48, 64])
def test_a_pivot_that_removals_lose_is_refused(isa, block_size):
    """The first weight is the next two and a little more; no pivot of the factor says so."""
    rounding = torch.finfo(torch.float32).eps * block_size
    share = 2.0 ** math.ceil(math.log2(2 * rounding) / 2)
    f = torch.eye(block_size, dtype=torch.float64)
    f[0, 0], f[1, 0], f[2, 0] = 1 + share**2, 1, share
    lower = torch.ones(block_size, block_size, dtype=torch.bool).tril()
    gram = torch.stack([torch.eye(block_size, dtype=torch.float64)[lower], f[lower]]).float()
    weight, keep = torch.ones(2 * block_size), torch.ones(2 * block_size, dtype=torch.bool)
    weight[block_size + 1 : block_size + 3] = 0  # go before the first
    for damping, expected in ((4 * rounding * share**2, 1), (2 * rounding, -1)):
        fisher = (block_size, 1.0, damping)
        for call in (
            lambda status, f=fisher: ops.gram_greedy_scores(gram, weight, keep, 1, *f, status),
            lambda status, f=fisher: ops.gram_n_of_m(gram, weight, keep, 1, 4, *f, status),
        ):
            status = ops.new_status()
            call(status)
            assert status.item() == expected


@pytest.mark.parametrize(("block_size", "scale"), [(4, 1e4), (20, 600.0), (50, 400.0)])
def test_pruned_weights_need_no_pivot_of_the_size_of_the_others(isa, block_size, scale):
    """In place of their rows stands the identity, far below the rounding of large diagonals."""
    n = 2 * block_size
    gram = gram_of(gradients(40, n, scale), block_size, torch.float32)
    fisher = (block_size, 40.0, 0.1 * scale**2)
    assert gram.max() / 40 > 2**23 / block_size
    weight = torch.randn(n, dtype=torch.float64)
    keep = (torch.arange(n) % 4 < 2) & (weight != 0)
    calls = {
        "joint": (lambda on, s: on.gram_update(gram, weight, keep, 1, True, *fisher, s)),
        "greedy": (lambda on, s: on.gram_greedy_scores(gram, weight, keep, 1, *fisher, s)),
        "greedy groups": (lambda on, s: on.gram_greedy_scores(gram, weight, keep, 2, *fisher, s)),
        "N:M": (lambda on, s: on.gram_n_of_m(gram, weight, keep, 1, 2, *fisher, s)),
    }
    for name, call in calls.items():
        status = ops.new_status()
        found, expected = call(ops, status), call(reference, ops.new_status())
        assert status.item() == -1, name
        if name != "joint":
            found, expected = (found,), (expected,)
        for ours, theirs in zip(found, expected, strict=True):
            assert relative_error(ours, theirs) < 1e-6, name


# ---- a given inverse -----------------------------------------------------------------


# group_size, joint, with_increase
RULES = [(1, False, False), (1, False, True), (2, False, False), (2, False, True),
         (1, True, False), (1, True, True)]  # fmt: skip


def given_inverse(block_size: int) -> torch.Tensor:
    gram = gram_of(gradients(30, block_size), block_size)
    fisher = (block_size, block_size, 30.0, DAMPING)
    return reference.gram_inverse(gram, *fisher, torch.float32, ops.new_status())


@pytest.mark.parametrize("block_size", [6, 20])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_what_is_not_finite_in_an_inverse_reaches_no_weight(isa, block_size, value):
    """One entry after the other: the block is refused, or nothing depends on the entry."""
    exact, weight = given_inverse(block_size), torch.randn(block_size)
    keep = torch.arange(block_size) % 5 < 3
    places = range(exact.shape[1]) if block_size < 10 else range(0, exact.shape[1], 7)
    for place in places:
        inverse, clean = exact.clone(), exact.clone()
        inverse[0, place], clean[0, place] = value, 0.0
        for rule in RULES:
            status = ops.new_status()
            new, increase = ops.inverse_update(inverse, weight, keep, *rule, status)
            assert new.isfinite().all() and increase.isfinite().all()
            if status.item() == 0:
                assert torch.equal(new, weight), "a failed block keeps its weights"
            else:
                same = ops.inverse_update(clean, weight, keep, *rule, ops.new_status())
                assert status.item() == -1 and torch.equal(new, same[0]), (place, rule)
        for group in (1, 2):
            status = ops.new_status()
            scores = ops.inverse_scores(inverse, weight, group, status)
            same = ops.inverse_scores(clean, weight, group, ops.new_status())
            assert status.item() == 0 or torch.equal(scores, same), (place, group)


@pytest.mark.parametrize("block_size", [4, 20, 50])
@pytest.mark.parametrize("value", [INF, 0.0, -1.0, NAN])
def test_an_inverse_whose_diagonal_is_not_positive_and_finite_is_refused(isa, block_size, value):
    """By everything that looks at that entry."""
    n, here = 4 * block_size, 2 * block_size + block_size // 2
    inverse = given_inverse(block_size).repeat(4, 1)
    inverse[2, block_size // 2] = value
    weight, keep = torch.randn(n), torch.ones(n, dtype=torch.bool)
    keep[here] = False
    state, none = inverse.clone(), torch.zeros(1, n)
    calls = {
        "scores": lambda status: ops.inverse_scores(inverse, weight, 1, status),
        "group scores": lambda status: ops.inverse_scores(inverse, weight, 2, status),
        "woodbury": lambda status: ops.woodbury_update(state, none, 1.0, status),
    }
    for rule in RULES:
        calls[str(rule)] = lambda status, rule=rule: ops.inverse_update(
            inverse, weight, keep, *rule, status
        )
    for name, call in calls.items():
        status = ops.new_status()
        found = call(status)
        assert status.item() == 2, name
        if isinstance(found, tuple):
            assert torch.equal(found[0], weight), "no other block loses a weight"
    torch.testing.assert_close(state, inverse, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("block_size", "group"), [(4, 2), (20, 4), (20, 20), (50, 2), (50, 10)])
def test_a_group_whose_inverse_is_indefinite_is_refused(isa, block_size, group):
    """Its diagonal is positive: that of the second weight is too small for what they share."""
    inverse = pack_inverse((torch.eye(block_size) * 2).repeat(5, 1, 1))
    n = 5 * block_size
    first = block_size - group  # of the last group of a block
    dense = torch.eye(block_size) * 2
    dense[first, first + 1] = dense[first + 1, first] = 3
    inverse[3] = pack_inverse(dense[None])[0]
    weight, keep = torch.randn(n), torch.ones(n, dtype=torch.bool)
    keep[3 * block_size + first :][:2] = False
    size = group
    for name, call in {
        "scores": lambda s: ops.inverse_scores(inverse, weight, size, s),
        "sum": lambda s: ops.inverse_update(inverse, weight, keep, size, False, False, s),
        "sum, increase": lambda s: ops.inverse_update(inverse, weight, keep, size, False, True, s),
        "joint": lambda s: ops.inverse_update(inverse, weight, keep, 1, True, True, s),
    }.items():
        status = ops.new_status()
        found = call(status)
        assert status.item() == 3, name
        if name != "scores":
            assert torch.equal(found[0].view(5, -1)[3], weight.view(5, -1)[3])
            assert found[0].isfinite().all() and found[1].isfinite().all()


@pytest.mark.parametrize("block_size", [4, 20, 50])
def test_a_diagonal_that_no_float64_holds_is_refused(isa, block_size):
    """Gradients of zero and next to no damping: F^-1 is more than 1e308."""
    n = 3 * block_size
    gram = gram_of(gradients(80, n), block_size)
    gram[1] = 0
    weight, keep = torch.randn(n), torch.arange(n) // 2 % 2 == 0
    fisher = (block_size, 30.0, 1e-315)
    for name, call in {
        "diagonal": lambda s: ops.gram_diagonal(gram, n, *fisher, torch.float64, s),
        "scores": lambda s: ops.gram_scores(gram, weight, 1, *fisher, s),
        "group scores": lambda s: ops.gram_scores(gram, weight, 2, *fisher, s),
        "greedy": lambda s: ops.gram_greedy_scores(gram, weight, keep, 1, *fisher, s),
        "sum": lambda s: ops.gram_update(gram, weight, keep, 1, False, *fisher, s),
        "group sum": lambda s: ops.gram_update(gram, weight, keep, 2, False, *fisher, s),
    }.items():
        status = ops.new_status()
        call(status)
        assert status.item() == 1, name
