"""The CUDA kernels, executed on the host: specialisations, refusals, determinism, failures.

That their results are right is tested with all other operators, see the fixture ``isa``; what
they read and write, in test_cuda_traffic.py.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from problems import DAMPING, fresh_inverse, gradients, gram_of, onto_nan, relative_error

from benchmarks.kernels import occupancy
from obert_kernels import ops
from obert_kernels.ops import reference
from obert_kernels.ops.packing import num_blocks, to_blocks

SIZES = [4, 8, 16, 32, 48, 50, 64, 96, 100, 128]


def team_of(size: int) -> int:
    """Threads that work on a block in the general kernels."""
    return next(threads for threads in (8, 16, 32, 64, 128, 256) if size <= threads)


def triangle(n: int) -> int:
    return n * (n + 1) // 2


@contextlib.contextmanager
def shared_memory(module, limit: int):
    """On a device with that much for a thread block."""
    module.set_shared_memory_limit(limit)
    try:
        yield
    finally:
        module.set_shared_memory_limit(231424)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 16, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_specialisation_type_and_number_of_gradients(cuda_on_host, size, k, dtype):
    cuda_on_host.set_seed(size * 1000 + k)
    for n in (max(1, size // 3), 2 * size + 1):
        g = gradients(k, n + 3, 0.1).to(dtype)[:, 2 : n + 2]  # any alignment, rows apart
        blocks = num_blocks(n, size)
        for gram_dtype, allowed in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
            gram = torch.zeros(blocks, triangle(size), dtype=gram_dtype)
            ops.gram_accumulate(gram, g, size)
            assert relative_error(gram, gram_of(g.double(), size)) < allowed
        inverse = fresh_inverse(blocks, size)
        expected, status = inverse.clone(), ops.new_status()
        ops.woodbury_update(inverse, g, float(k), status)
        reference.woodbury_update(expected, g.float(), float(k), ops.new_status())
        assert status.item() == -1
        assert relative_error(inverse, expected) < 1e-4


# Block sizes whose triangles have more tiles than a thread block has threads.
LARGE = [(129, torch.float64), (150, torch.float64), (199, torch.float64),
         (250, torch.float32), (256, torch.float32)]  # fmt: skip


@pytest.mark.parametrize(("size", "gram_dtype"), LARGE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_the_gram_of_large_blocks(cuda_on_host, size, gram_dtype, dtype, k):
    """Also in shared memory that holds four gradients at a time, and only one."""
    cuda_on_host.set_seed(size + k)
    for n, gradients_held in ((size, 4), (2 * size + size // 3, 4), (size // 2, 1)):
        g = gradients(k, n + 3, 0.1).to(dtype)[:, 2 : n + 2]  # any alignment, rows apart
        entries = num_blocks(n, size) * triangle(size)
        start = torch.randn(entries + 1, dtype=gram_dtype)
        gram = start.clone()
        wide = -(-size // 8) * 8 * gram_dtype.itemsize
        held = -(-triangle(size) * gram_dtype.itemsize // 16) * 16 + gradients_held * wide
        with shared_memory(cuda_on_host, held):
            ops.gram_accumulate(gram[1:].view(-1, triangle(size)), g, size)
        expected = start.double()
        expected[1:] += gram_of(g.double(), size).flatten()
        assert gram[0] == start[0]
        allowed = 1e-14 if gram_dtype == torch.float64 else 1e-6
        assert relative_error(gram, expected) < allowed


def some_of(n: int, offset: int = 0) -> torch.Tensor:
    """A mask that keeps most, at any alignment."""
    return (torch.rand(n + offset) < 0.9)[offset:]


@pytest.mark.parametrize("size", [4, 8, 16, 24, 32, 48, 64, 96, 100, 128])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_team_and_type_of_an_n_of_m_mask(cuda_on_host, size, gram_dtype, dtype):
    cuda_on_host.set_seed(size)
    for n, offset in ((max(4, size // 8 * 4), 0), (2 * size + 4, 3)):
        gram = gram_of(gradients(40, n), size, gram_dtype)
        keep, weight = some_of(n, offset), torch.randn(n + offset, dtype=dtype)[offset:]
        status = ops.new_status()
        arguments = (gram, weight, keep, 2, 4, size, 40.0, DAMPING, status)
        found = onto_nan(ops.gram_n_of_m, *arguments)
        assert torch.equal(found, reference.gram_n_of_m(*arguments))
        assert status.item() == -1


@pytest.mark.parametrize("kept", [1, 2, 5, 8, 15])
@pytest.mark.parametrize("size", [16, 32, 80])
def test_patterns_with_more_sets_than_threads(cuda_on_host, size, kept):
    gram, weight, keep = gram_of(gradients(40, size), size), torch.randn(size), some_of(size)
    arguments = (gram, weight, keep, kept, 16, size, 40.0, DAMPING, ops.new_status())
    found = onto_nan(ops.gram_n_of_m, *arguments)
    assert torch.equal(found, reference.gram_n_of_m(*arguments))


@pytest.mark.parametrize("size", [*occupancy.BLOCK_SIZES, *occupancy.GENERAL])
def test_common_sizes_have_kernels_of_their_own(cuda_on_host, size):
    general = (", 0>", "::general_kernel", "::large_kernel<double, 4>")
    expected = (f" {size}>", f"<{size}>") if size in occupancy.BLOCK_SIZES else general
    for family, call in occupancy.operators(size).items():
        kernel = occupancy.record(cuda_on_host, call)[1]["kernel"].partition("(obert")[0]
        any_size = ("::single_scores_kernel<float>", f"::n_of_m_kernel<{team_of(size)}>",
                    "::living_kernel<float>", "::living_kernel<double>")  # fmt: skip
        assert kernel.endswith((*expected, *any_size)), family


def test_a_size_the_device_cannot_hold_is_refused_with_the_largest_that_fits(cuda_on_host):
    gram, status = torch.zeros(1, triangle(256), dtype=torch.float64), ops.new_status()
    made = (256, 256, 1.0, DAMPING, torch.float32, status)
    with pytest.raises(ValueError, match=r"gram_inverse: block size 256 needs \d+ bytes") as caught:
        ops.gram_inverse(gram, *made)
    largest = int(str(caught.value).rsplit(" ", 1)[1])
    gram = torch.zeros(1, triangle(largest), dtype=torch.float64)
    made = (largest, largest, 1.0, DAMPING, torch.float32, status)
    expected = fresh_inverse(1, largest)
    torch.testing.assert_close(ops.gram_inverse(gram, *made), expected)
    message = rf"block size {largest} .* 65536 for a thread block"
    with shared_memory(cuda_on_host, 64 * 1024), pytest.raises(ValueError, match=message):
        ops.gram_inverse(gram, *made)  # as on compute 7.5


def test_threads_do_not_disturb_each_other(cuda_on_host):
    """One kernel, launched at the same time with different amounts of shared memory."""
    sizes = (130, 160)
    right = [torch.randn(size, dtype=torch.float64) for size in sizes]
    grams = [gram_of(gradients(40, size), size) for size in sizes]

    def solve(index: int) -> torch.Tensor:
        which = index % 2
        made = (sizes[which], 40.0, DAMPING, ops.new_status())
        return ops.gram_solve(grams[which], right[which], *made)

    expected = [solve(0), solve(1)]
    with ThreadPoolExecutor(8) as callers:
        found = list(callers.map(solve, range(200)))
    assert all(torch.equal(x, expected[i % 2]) for i, x in enumerate(found))


@pytest.mark.parametrize(
    ("limit", "dtype", "largest"),
    [
        (231424, torch.float64, 239),  # compute 9.0
        (99 * 1024, torch.float64, 157),  # compute 8.6
        (64 * 1024, torch.float64, 127),  # compute 7.5
        (64 * 1024, torch.float32, 180),
    ],
)
def test_a_gram_the_device_cannot_hold_is_refused(cuda_on_host, limit, dtype, largest):
    with shared_memory(cuda_on_host, limit):
        for size in (256, largest + 1):
            gram = torch.zeros(1, triangle(size), dtype=dtype)
            message = rf"gram_accumulate: block size {size} needs .* fits is {largest}$"
            with pytest.raises(ValueError, match=message):
                ops.gram_accumulate(gram, gradients(2, size), size)
            assert not gram.any()
        g, gram = gradients(2, largest), torch.zeros(1, triangle(largest), dtype=dtype)
        ops.gram_accumulate(gram, g, largest)
        assert relative_error(gram, gram_of(g, largest)) < 1e-6


@pytest.mark.parametrize(
    ("limit", "group", "largest"),
    [
        (231424, 1, 235),  # compute 9.0
        (231424, 4, 233),  # room for the systems of the groups
        (64 * 1024, 1, 123),  # compute 7.5
        (64 * 1024, 4, 121),
    ],
)
def test_greedy_scores_the_device_cannot_hold_are_refused(cuda_on_host, limit, group, largest):
    message = r"gram_greedy_scores: block size {} needs .* fits is {}$"
    with shared_memory(cuda_on_host, limit):
        for size in (256, largest + 1, largest):
            n, status = size // group * group, ops.new_status()
            gram, weight = torch.zeros(1, triangle(size), dtype=torch.float64), torch.randn(n)
            keep = torch.ones(n, dtype=torch.bool)
            arguments = (gram, weight, keep, group, size, 1.0, DAMPING, status)
            if size > largest:
                with pytest.raises(ValueError, match=message.format(size, largest)):
                    ops.gram_greedy_scores(*arguments)
                continue
            scores = ops.gram_greedy_scores(*arguments)
            expected = 0.5 * DAMPING * weight.square().view(-1, group).sum(dim=1)
            torch.testing.assert_close(scores, expected)
            assert status.item() == -1


@pytest.mark.parametrize(
    ("limit", "kept", "group", "largest"),
    [
        (231424, 2, 4, 235),  # compute 9.0
        (231424, 8, 16, 233),  # more room for the sets
        (64 * 1024, 2, 4, 122),  # compute 7.5
        (64 * 1024, 8, 16, 119),
    ],
)
def test_n_of_m_masks_the_device_cannot_hold_are_refused(cuda_on_host, limit, kept, group, largest):
    message = r"gram_n_of_m: block size {} needs .* fits is {}$"
    fits = largest // group * group
    with shared_memory(cuda_on_host, limit):
        for size in (256, fits + group, fits):
            gram, status = torch.zeros(1, triangle(size), dtype=torch.float64), ops.new_status()
            weight, keep = torch.arange(1.0, size + 1), torch.ones(size, dtype=torch.bool)
            arguments = (gram, weight, keep, kept, group, size, 1.0, DAMPING, status)
            if size > fits:
                with pytest.raises(ValueError, match=message.format(size, largest)):
                    ops.gram_n_of_m(*arguments)
                continue
            smallest_go = torch.arange(size) % group >= group - kept
            assert torch.equal(ops.gram_n_of_m(*arguments), smallest_go)
            assert status.item() == -1


@pytest.mark.parametrize("size", [4, 16, 50, 64, 70])
def test_order_of_threads_does_not_change_a_bit(cuda_on_host, size):
    n = 6 * size
    g, weight, keep = gradients(20, n), torch.randn(n), torch.rand(n) < 0.5
    blocks = num_blocks(n, size)
    results = []
    for seed in range(4):
        cuda_on_host.set_seed(seed)
        gram = torch.zeros(blocks, triangle(size))
        inverse = fresh_inverse(blocks, size)
        status = ops.new_status()
        fisher = (size, 20.0, DAMPING, status)
        ops.gram_accumulate(gram, g, size)
        ops.woodbury_update(inverse, g, 20.0, status)
        results.append([
            gram,
            inverse,
            ops.gram_scores(gram, weight, 2, *fisher),
            *ops.gram_update(gram, weight, keep, 2, False, *fisher),
            *ops.gram_update(gram, weight, keep, 2, True, *fisher),
            ops.gram_greedy_scores(gram, weight, keep, 1, *fisher),
            ops.gram_greedy_scores(gram, weight, keep, 2, *fisher),
            ops.gram_n_of_m(gram, weight, torch.ones_like(keep), 1, 2, *fisher),
            *ops.inverse_update(inverse, weight, keep, 2, False, True, status),
        ])  # fmt: skip
        assert status.item() == -1
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("size", [4, 16, 20, 50])
def test_the_first_failed_block_is_reported_and_keeps_its_state(cuda_on_host, size):
    blocks = 40
    g = gradients(3, size * blocks)
    g[1, 23 * size + size // 3] = float("nan")
    g[2, 11 * size] = float("inf")
    before = fresh_inverse(blocks, size)
    expected = before.clone()
    reference.woodbury_update(expected, g, 3.0, ops.new_status())
    for seed in range(3):
        cuda_on_host.set_seed(seed)
        inverse, status = before.clone(), ops.new_status()
        ops.woodbury_update(inverse, g, 3.0, status)
        assert status.item() == 11
        assert torch.equal(inverse[[11, 23]], before[[11, 23]])
        assert relative_error(inverse, expected) < 1e-4


@pytest.mark.parametrize("size", [4, 20, 50, 64])
@pytest.mark.parametrize("offset", [1, 2, 3])
def test_a_state_may_begin_anywhere(cuda_on_host, size, offset):
    n = 5 * size - 1
    g, start = gradients(3, n), fresh_inverse(5, size)
    storage = torch.full((start.numel() + 8,), float("nan"))
    inverse = storage[offset : offset + start.numel()].view(start.shape)
    inverse.copy_(start)
    assert inverse.data_ptr() % 16 == 4 * offset
    status = ops.new_status()
    ops.woodbury_update(inverse, g, 3.0, status)
    reference.woodbury_update(start, g, 3.0, ops.new_status())
    assert status.item() == -1
    assert relative_error(inverse, start) < 1e-4
    assert storage[:offset].isnan().all() and storage[offset + start.numel() :].isnan().all()


@pytest.mark.parametrize("size", [4, 20, 50])
@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("group", [1, 2])
def test_updates_write_the_weights_of_every_block(cuda_on_host, size, joint, group):
    """Also of a block that fails, and of one that loses nothing: there they do not change."""
    n, fails, whole = 5 * size - 2, 1, 3
    g = gradients(30, n)
    gram, weight = gram_of(g, size), torch.randn(n)
    keep = (torch.arange(n) // group) % 2 == 1
    keep[whole * size : (whole + 1) * size] = True
    inverse = reference.gram_inverse(gram, n, size, 30.0, DAMPING, torch.float32, ops.new_status())
    gram[fails], inverse[fails] = float("nan"), float("nan")
    fisher = (size, 30.0, DAMPING)
    for call in (
        lambda status: ops.gram_update(gram, weight, keep, group, joint, *fisher, status),
        lambda status: ops.inverse_update(inverse, weight, keep, group, joint, True, status),
    ):
        status = ops.new_status()
        new, increase = onto_nan(call, status)
        assert status.item() == fails
        assert torch.isfinite(new).all() and torch.isfinite(increase).all()
        old, new = to_blocks(weight, size), to_blocks(new, size)
        kept = to_blocks(keep, size)
        for block in range(5):
            if block in (fails, whole):
                assert torch.equal(new[block], old[block])
            else:
                assert not new[block][~kept[block]].any()
                assert not torch.equal(new[block], old[block])


@pytest.mark.parametrize("size", [4, 20, 50])
@pytest.mark.parametrize("group", [1, 2])
def test_greedy_scores_of_a_failed_block_are_zero(cuda_on_host, size, group):
    n, fails = 40 * size, [11, 23]
    weight, keep = torch.randn(n), torch.rand(n) < 0.7
    gram, fisher = gram_of(gradients(30, n), size), (size, 30.0, DAMPING)
    expected = reference.gram_greedy_scores(gram, weight, keep, group, *fisher, ops.new_status())
    expected = expected.view(40, -1)
    expected[fails] = 0
    keep.view(40, size)[fails] = True
    gram[fails[0], triangle(size - 1)] = float("inf")
    gram[fails[1], 0] = float("nan")
    for seed in range(3):
        cuda_on_host.set_seed(seed)
        status = ops.new_status()
        scores = onto_nan(ops.gram_greedy_scores, gram, weight, keep, group, *fisher, status)
        assert status.item() == fails[0]
        assert not scores.view(40, -1)[fails].any()
        assert relative_error(scores, expected.flatten()) < 1e-6


@pytest.mark.parametrize("size", [4, 20, 48])
def test_the_mask_of_a_failed_block_does_not_change(cuda_on_host, size):
    """Not even where it fails in its last group, when the others have been pruned."""
    n, fails = 40 * size, [11, 23, 30]
    weight, keep = torch.randn(n), some_of(n)
    gram, fisher = gram_of(gradients(30, n), size), (size, 30.0, DAMPING)
    expected = reference.gram_n_of_m(gram, weight, keep, 1, 2, *fisher, ops.new_status())
    for block in fails:
        keep.view(40, size)[block] = expected.view(40, size)[block] = True
    gram[fails[0], triangle(size - 1)] = float("inf")
    gram[fails[1], 0] = float("nan")
    weight[(fails[2] + 1) * size - 2 : (fails[2] + 1) * size] = float("inf")
    for seed in range(3):
        cuda_on_host.set_seed(seed)
        status = ops.new_status()
        found = onto_nan(ops.gram_n_of_m, gram, weight, keep, 1, 2, *fisher, status)
        assert status.item() == fails[0]
        assert torch.equal(found, expected)
    last, status = slice(fails[2] * size, (fails[2] + 1) * size), ops.new_status()
    arguments = (gram[fails[2]][None], weight[last], keep[last], 1, 2, *fisher, status)
    assert ops.gram_n_of_m(*arguments).all()
    assert status.item() == 0


# 1030: whole thread blocks and a part of one.
@pytest.mark.parametrize("n", [50, 1030])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_single_scores_are_all_written(cuda_on_host, n, dtype, offset):
    inverse = fresh_inverse(num_blocks(n, 20), 20)
    inverse[:, :20] *= torch.rand(len(inverse), 20) + 1
    weight = torch.randn(n + offset, dtype=dtype)[offset:]
    expected = reference.inverse_scores(inverse, weight, 1, ops.new_status())
    status = ops.new_status()
    scores = onto_nan(ops.inverse_scores, inverse, weight, 1, status)
    assert status.item() == -1
    assert relative_error(scores, expected) < 3e-7
    inverse[1, 4] = -1.0
    scores = onto_nan(ops.inverse_scores, inverse, weight, 1, status)
    assert status.item() == 1
    assert torch.isfinite(scores).all()
