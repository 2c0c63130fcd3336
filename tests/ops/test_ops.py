"""Every operator against its float64 oracle: block sizes, types, tails, alignment."""

import pytest
import torch
from devices import CUDA, CUDA_ON_HOST
from problems import (
    DAMPING,
    fresh_inverse,
    gradients,
    gram_of,
    onto_nan,
    relative_error,
    sizes,
)

from obert_kernels import ops
from obert_kernels.ops import reference
from obert_kernels.ops.packing import gram_shape, num_blocks, pack_inverse, unpack_inverse

BLOCK_SIZES = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 48, 50, 63, 64, 96, 100, 128, 150, 255,
               256]  # fmt: skip
# F is damping I + G/m with gradients of about 1e-2: its condition number stays below 1e3, so
# float64 work is good to about 1e3 * B * eps, and scores are rounded to float32.
F64 = 1e-11
F32 = 3e-7


def skip_if_refused(isa: str, block_size: int) -> None:
    if isa in (CUDA, CUDA_ON_HOST) and block_size > 190:
        pytest.skip("more shared memory than a device has: refused, see test_cuda_kernels.py")


def group_for(n: int) -> int:
    return next(c for c in (4, 3, 2, 1) if n % c == 0)


def problem(n: int, block_size: int, k: int = 40, dtype: torch.dtype = torch.float64):
    gram = gram_of(gradients(k, n), block_size, dtype)
    return gram, (block_size, float(k), DAMPING)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gram(isa, block_size, dtype):
    if dtype == torch.float64:
        skip_if_refused(isa, block_size)
    for n in sizes(block_size):
        g = gradients(70, n)
        gram = gram_of(torch.zeros(1, n), block_size, dtype)
        ops.gram_accumulate(gram, g, block_size)
        expected = gram_of(g, block_size)
        if dtype == torch.float64:
            assert relative_error(gram, expected) < 1e-14
        else:  # no worse than a few times what torch gets in float32
            naive = torch.zeros_like(gram)
            reference.gram_accumulate(naive, g, block_size)
            allowed = 4 * relative_error(naive, expected) + 1e-6
            assert relative_error(gram, expected) < allowed


@pytest.mark.parametrize("k", [1, 2, 15, 16, 17, 64, 65, 129, 300])
def test_gram_adds_any_number_of_gradients(isa, k):
    n, block_size = 130, 50
    g = gradients(k, n, dtype=torch.float64)
    start = torch.randn(3, 1275, dtype=torch.float64)
    gram = start.clone()
    ops.gram_accumulate(gram, g, block_size)
    used = gram_of(torch.ones(1, n), block_size) != 0  # the rest is past the short last block
    assert relative_error(gram - start, gram_of(g, block_size)) < 1e-12
    assert torch.equal(gram[~used], start[~used])


@pytest.mark.parametrize("block_size", [1, 4, 16, 20, 50, 64])
def test_no_gradients_change_nothing(isa, block_size):
    none, status = torch.empty(0, 130), ops.new_status()
    gram, inverse = (
        gram_of(gradients(3, 130), block_size),
        fresh_inverse(-(-130 // block_size), block_size),
    )
    for state, call in (
        (gram, lambda: ops.gram_accumulate(gram, none, block_size)),
        (inverse, lambda: ops.woodbury_update(inverse, none, 8.0, status)),
    ):
        before = state.clone()
        call()
        assert torch.equal(state, before) and status.item() == -1


@pytest.mark.parametrize("block_size", [3, 8, 16, 50])
def test_a_state_is_checked_behind_the_last_weight_too(isa, block_size):
    """By all kernels, so that none takes what another refuses."""
    inverse = fresh_inverse(3, block_size)
    inverse[2, block_size - 1] = 0.0
    before, status = inverse.clone(), ops.new_status()
    ops.woodbury_update(inverse, gradients(4, 3 * block_size - 1), 8.0, status)
    assert status.item() == 2 and torch.equal(inverse[2], before[2])
    assert not torch.equal(inverse[:2], before[:2])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("offset", [0, 1, 3])
def test_gradients_of_any_type_alignment_and_stride(isa, dtype, offset):
    n, block_size, k = 117, 50, 9
    storage = torch.full(((k + 1) * 200,), float("nan"), dtype=dtype)
    g = storage[offset : offset + k * 200].view(k, 200)[:, :n]
    g.copy_(gradients(k, n, 1.0))
    assert g.stride(0) == 200 and g.storage_offset() == offset
    gram = torch.zeros(3, 1275, dtype=torch.float64)
    ops.gram_accumulate(gram, g, block_size)
    assert relative_error(gram, gram_of(g.double(), block_size)) < 1e-14
    inverse = fresh_inverse(3, block_size)
    expected = inverse.clone()
    status = ops.new_status()
    ops.woodbury_update(inverse, g, float(k), status)
    reference.woodbury_update(expected, g.float(), float(k), ops.new_status())
    assert status.item() == -1
    assert relative_error(inverse, expected) < 1e-4


def test_transposed_gradients(isa):
    g = gradients(60, 9).T  # [9, 60] with stride 1 between gradients
    gram = torch.zeros(2, 1275, dtype=torch.float64)
    ops.gram_accumulate(gram, g, 50)
    assert relative_error(gram, gram_of(g, 50)) < 1e-14


def test_every_half_value_is_converted_exactly(isa):
    for dtype in (torch.float16, torch.bfloat16):
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
        values = bits.view(dtype)
        values = values[torch.isfinite(values)].clone()
        gram = torch.zeros(values.numel(), 1, dtype=torch.float64)
        ops.gram_accumulate(gram, values.unsqueeze(0), 1)
        assert torch.equal(gram.flatten(), values.double().square())


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_inverse_diagonal_solve(isa, block_size):
    skip_if_refused(isa, block_size)
    for n in sizes(block_size):
        gram, args = problem(n, block_size)
        status = ops.new_status()
        v = torch.randn(n, dtype=torch.float64)
        for op, arguments in [
            (ops.gram_inverse, (gram, n, *args, torch.float64, status)),
            (ops.gram_diagonal, (gram, n, *args, torch.float64, status)),
            (ops.gram_solve, (gram, v, *args, status)),
        ]:
            oracle = getattr(reference, op._schema.name.split("::")[1])
            assert relative_error(onto_nan(op, *arguments), oracle(*arguments)) < F64
        inverse = onto_nan(ops.gram_inverse, gram, n, *args, torch.float32, status)
        dense = unpack_inverse(inverse)
        fisher = reference.unpack_fisher(gram, args[1], DAMPING)
        identity = torch.eye(block_size, dtype=torch.float64).expand_as(fisher)
        assert relative_error(fisher @ dense.double(), identity) < 2e-3  # float32 inverse
        past = (torch.arange(fisher.shape[0] * block_size) >= n).view(-1, block_size)
        assert torch.equal(dense[past], (torch.eye(block_size) / DAMPING).expand_as(dense)[past])
        assert status.item() == -1


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64])
def test_scores_and_updates(isa, block_size, weight_dtype):
    skip_if_refused(isa, block_size)
    for n in sizes(block_size):
        gram, args = problem(n, block_size)
        weight = torch.randn(n, dtype=weight_dtype)
        weight[::7] = 0
        keep = (torch.rand(n) < 0.5) & (weight != 0)
        status = ops.new_status()
        inverse = ops.gram_inverse(gram, n, *args, torch.float32, status)
        tolerance = F64 if weight_dtype == torch.float64 else F32
        for c in {1, group_for(n)}:
            scores = onto_nan(ops.gram_scores, gram, weight, c, *args, status)
            assert (
                relative_error(scores, reference.gram_scores(gram, weight, c, *args, status)) < F32
            )
            scores = onto_nan(ops.inverse_scores, inverse, weight, c, status)
            assert (
                relative_error(scores, reference.inverse_scores(inverse, weight, c, status)) < F32
            )
            for joint in (False, True):
                new, increase = ops.gram_update(gram, weight, keep, c, joint, *args, status)
                want = reference.gram_update(gram, weight, keep, c, joint, *args, status)
                assert relative_error(new, want[0]) < tolerance
                assert relative_error(increase, want[1]) < F64
                assert not new[~keep].any()
                new, increase = ops.inverse_update(inverse, weight, keep, c, joint, True, status)
                want = reference.inverse_update(inverse, weight, keep, c, joint, True, status)
                assert relative_error(new, want[0]) < tolerance
                assert relative_error(increase, want[1]) < F64
                bare = ops.inverse_update(inverse, weight, keep, c, joint, False, status)
                assert torch.equal(bare[0], new) and bare[1].numel() == 0
        assert status.item() == -1


@pytest.mark.parametrize("c", [2, 3, 4, 8, 16, 32])
@pytest.mark.parametrize("block_size", [4, 10, 32, 50])
def test_groups_across_block_borders(isa, block_size, c):
    """Groups need not fit into blocks: F^-1 is zero across a border, so parts add up."""
    n = 96
    gram, args = problem(n, block_size)
    weight = torch.randn(n, dtype=torch.float64)
    status = ops.new_status()
    inverse = reference.gram_inverse(gram, n, *args, torch.float64, status)
    dense = torch.block_diag(*unpack_inverse(inverse))
    expected = []
    for start in range(0, n, c):
        q = slice(start, start + c)
        expected.append(0.5 * weight[q] @ torch.linalg.solve(dense[q, q], weight[q]))
    scores = ops.gram_scores(gram, weight, c, *args, status)
    assert relative_error(scores, torch.stack(expected)) < F32


@pytest.mark.parametrize("block_size", [1, 4, 17, 50, 64, 100])
def test_woodbury_agrees_with_gram(isa, block_size):
    for n in sizes(block_size):
        g = gradients(48, n)
        blocks = num_blocks(n, block_size)
        inverse = fresh_inverse(blocks, block_size)
        status = ops.new_status()
        for part in g.split(5):
            ops.woodbury_update(inverse, part, 48.0, status)
        assert status.item() == -1
        exact = reference.gram_inverse(
            gram_of(g, block_size), n, block_size, 48.0, DAMPING, torch.float64, status
        )
        naive = fresh_inverse(blocks, block_size)
        reference.woodbury_update(naive, g, 48.0, ops.new_status())
        assert relative_error(inverse, exact) < 4 * relative_error(naive, exact) + 1e-6


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 50, 64, 100])
def test_many_blocks(isa, block_size, monkeypatch):
    """So many that one thread takes several at once, some with nothing to prune."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    n = 420 if isa == CUDA_ON_HOST else 2100
    n -= 60 * (n % block_size == 0)  # a short block in the end, where there can be one
    g = gradients(20, n)
    gram = torch.zeros(gram_shape(n, block_size), dtype=torch.float64)
    ops.gram_accumulate(gram, g, block_size)
    assert relative_error(gram, gram_of(g, block_size)) < 1e-14
    status = ops.new_status()
    exact = reference.gram_inverse(gram, n, block_size, 20.0, DAMPING, torch.float64, status)
    inverse = ops.gram_inverse(gram, n, block_size, 20.0, DAMPING, torch.float64, status)
    assert relative_error(inverse, exact) < F64
    state, naive = fresh_inverse(len(gram), block_size), fresh_inverse(len(gram), block_size)
    ops.woodbury_update(state, g, 20.0, status)
    reference.woodbury_update(naive, g, 20.0, status)
    assert relative_error(state, exact) < 4 * relative_error(naive, exact) + 1e-6
    weight = torch.randn(n, dtype=torch.float64)
    some = torch.rand(len(gram)).repeat_interleave(block_size)[:n] < 0.5
    keep = (torch.rand(n) < 0.5) | some
    for c in (1, 4, 20):
        scores = ops.inverse_scores(state, weight, c, status)
        assert relative_error(scores, reference.inverse_scores(state, weight, c, status)) < F32
        for joint in (False, True):
            new, increase = ops.inverse_update(state, weight, keep, c, joint, True, status)
            want = reference.inverse_update(state, weight, keep, c, joint, True, status)
            assert relative_error(new, want[0]) < F64
            assert relative_error(increase, want[1]) < F64
            assert torch.equal(new[some], weight[some]), "nothing to prune, nothing changes"
    assert status.item() == -1


def test_threads_do_not_change_the_result(isa):
    if isa in (CUDA, CUDA_ON_HOST):
        pytest.skip("the number of CPU threads has no meaning there")
    n, block_size = 20_000, 10
    g = gradients(20, n)
    weight = torch.randn(n)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            gram = torch.zeros(n // block_size, 55, dtype=torch.float64)
            ops.gram_accumulate(gram, g, block_size)
            status = ops.new_status()
            scores = ops.gram_scores(gram, weight, 16, block_size, 20.0, 1e-4, status)
            results.append((gram, scores))
    finally:
        torch.set_num_threads(threads)
    for gram, scores in results[1:]:
        assert torch.equal(gram, results[0][0])
        assert torch.equal(scores, results[0][1])


def test_first_failed_block_is_reported(isa):
    n, block_size = 500, 10
    gram = gram_of(gradients(30, n), block_size)
    gram[7, 0] = gram[31, 5] = float("nan")
    gram[40] *= -1
    weight, keep = torch.randn(n), torch.rand(n) < 0.5
    args = (block_size, 30.0, DAMPING)
    for call in (
        lambda s: ops.gram_inverse(gram, n, *args, torch.float32, s),
        lambda s: ops.gram_diagonal(gram, n, *args, torch.float32, s),
        lambda s: ops.gram_solve(gram, weight, *args, s),
        lambda s: ops.gram_scores(gram, weight, 1, *args, s),
        lambda s: ops.gram_scores(gram, weight, 4, *args, s),
        lambda s: ops.gram_update(gram, weight, keep, 1, False, *args, s),
        lambda s: reference.gram_diagonal(gram, n, *args, torch.float32, s),
    ):
        status = ops.new_status()
        call(status)
        assert status.item() == 7
        call(status)  # a failure once recorded stays
        assert status.item() == 7
        status.fill_(3)
        call(status)
        assert status.item() == 3
        status.fill_(9)
        call(status)
        assert status.item() == 7, "the first of all calls"
    new, increase = ops.gram_update(gram, weight, keep, 1, False, *args, ops.new_status())
    assert torch.equal(new[70:80], weight[70:80]), "a failed block keeps its weights"
    assert increase[7] == 0


def test_bad_arguments_are_named():
    gram = torch.zeros(2, 55, dtype=torch.float64)
    weight = torch.zeros(20)
    good = (10, 1.0, 1e-7, ops.new_status())
    cases = [
        (TypeError, "weight must be one of",
         lambda: ops.gram_scores(gram, weight.half(), 1, *good)),
        (ValueError, "gram must have shape", lambda: ops.gram_scores(gram, weight[:9], 1, *good)),
        (ValueError, "group_size must divide", lambda: ops.gram_scores(gram, weight, 3, *good)),
        (ValueError, "damping must be positive",
         lambda: ops.gram_scores(gram, weight, 1, 10, 1.0, 0.0, ops.new_status())),
        (ValueError, "block_size must be between 1 and 256",
         lambda: ops.gram_accumulate(gram, torch.zeros(1, 20), 257)),
        (ValueError, "block_size must be between",
         lambda: ops.gram_accumulate(gram, torch.zeros(1, 20), 0)),
        (TypeError, "gradients must be one of",
         lambda: ops.gram_accumulate(gram, torch.zeros(1, 20, dtype=torch.int32), 10)),
        (ValueError, "gram must be contiguous",
         lambda: ops.gram_accumulate(gram.T.contiguous().T, torch.zeros(1, 20), 10)),
        (TypeError, "keep must be one of bool",
         lambda: ops.gram_update(gram, weight, weight, 1, True, *good)),
        (TypeError, "status must be one of int64",
         lambda: ops.gram_scores(gram, weight, 1, 10, 1.0, 1e-7, torch.zeros(1))),
    ]  # fmt: skip
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_offsets_beyond_two_to_the_31(isa):
    """The last block starts past 2^31 entries; memory nobody touches costs nothing."""
    block_size = 256
    width = block_size * (block_size + 1) // 2
    blocks = 2**31 // width + 2
    n = block_size * blocks
    try:
        inverse = torch.empty(blocks, width)
    except RuntimeError:
        pytest.skip("no 8.6 GB of address space")
    last = (torch.randn(block_size, block_size) * 0.01 + torch.eye(block_size)) * 3
    inverse[-1:] = pack_inverse(((last + last.T) / 2).unsqueeze(0))
    weight, keep = torch.ones(n), torch.ones(n, dtype=torch.bool)
    keep[-100:] = torch.rand(100) < 0.5
    status = ops.new_status()
    new, _ = ops.inverse_update(inverse, weight, keep, 1, False, False, status)
    assert status.item() == -1
    tail = slice(n - block_size, n)
    expected, _ = reference.inverse_update(
        inverse[-1:], weight[tail], keep[tail], 1, False, False, ops.new_status()
    )
    assert torch.equal(new[: n - block_size], weight[: n - block_size])
    assert relative_error(new[tail], expected) < F32


@pytest.mark.parametrize("block_size", [4, 50, 64])
def test_woodbury_state_at_any_address(isa, block_size):
    k, n = 5, 2 * block_size
    start = fresh_inverse(2, block_size)
    inverse = torch.empty(start.numel() + 1)[1:].view_as(start).copy_(start)
    expected, g, status = inverse.clone(), gradients(k, n), ops.new_status()
    ops.woodbury_update(inverse, g, float(k), status)
    reference.woodbury_update(expected, g, float(k), ops.new_status())
    assert status.item() == -1
    assert relative_error(inverse, expected) < 1e-5
