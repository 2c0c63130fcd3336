"""The PTX that nvcc makes of the CUDA kernels, interpreted, against the float64 oracle.

Each operator runs up to the launch; the launch, with exactly the parameters, grid and shared
memory it asked for, then runs on the PTX, see tests/support/ptx.
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from problems import DAMPING, gradients, gram_of, relative_error
from ptx import Program, PtxError
from ptx_replay import NVCC, program_of_changed, replay
from test_ptx import check_living
from torch import Tensor

from obert_kernels import LiveFisher, ops
from obert_kernels.ops import reference
from obert_kernels.ops.packing import num_blocks, pack_inverse

pytestmark = [pytest.mark.slow, NVCC]
F64, F32 = 1e-11, 3e-7  # as in test_ops.py
# Fisher blocks that are the work of a quarter of a warp, of a warp, and of two; compiled for the
# size and general.
FACTORED = [8, 20, 50, 36]


def weights_in(block_size: int) -> int:
    """Several blocks, more than one thread block, the last one short; a multiple of four."""
    return 44 * block_size + 4 if block_size <= 8 else 2 * block_size + 8


def problem(block_size: int) -> tuple[Tensor, Tensor, Tensor, tuple[int, float, float]]:
    """Gram, weights, mask, and the last arguments of an operator on them."""
    n = weights_in(block_size)
    gram = gram_of(gradients(40, n), block_size)
    weight = torch.randn(n)
    weight[::7] = 0
    keep = (torch.rand(n) < 0.5) & (weight != 0)
    return gram, weight, keep, (block_size, 40.0, DAMPING)


def inverse_of(gram: Tensor, n: int, args: tuple[int, float, float]) -> Tensor:
    return reference.gram_inverse(gram, n, *args, torch.float32, ops.new_status())


def check_gram(
    host: ModuleType, block_size: int, g: Tensor, dtype: torch.dtype, changed: Program | None = None
) -> None:
    start = torch.randn(gram_of(g, block_size).shape).to(dtype)
    gram = start.clone()
    expected = start.double() + gram_of(g.double(), block_size)
    call = lambda: ops.gram_accumulate(gram, g, block_size)  # noqa: E731
    for _ in replay(host, call, gram, g, changed=changed):
        allowed = 1e-14 if dtype == torch.float64 else 1e-6
        assert relative_error(gram, expected) < allowed
        assert not torch.equal(gram, start)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("block_size", [8, 50, 20, 37])
def test_gram(cuda_on_host, block_size, dtype):
    check_gram(cuda_on_host, block_size, gradients(3, weights_in(block_size), 1.0), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gram_of_living_weights(cuda_on_host, dtype):
    """A few, and more than a warp has lanes for the tiles of."""
    n = 300
    alive = torch.rand(n) < torch.linspace(0.0, 1.2, n)
    live, g = LiveFisher(alive, 50, dtype=dtype), gradients(12, n, 1.0)
    tables = (live._gram_start, live._first_place, live._source)
    expected = torch.zeros_like(live._gram, dtype=torch.float64)
    reference.gram_accumulate_living(expected, g, *tables)
    for _ in replay(cuda_on_host, lambda: live.accumulate(g), live._gram, g, *tables):
        assert relative_error(live._gram, expected) < (1e-14 if dtype == torch.float64 else 1e-6)


def test_gram_with_more_tiles_than_threads(cuda_on_host):
    held = 130 * 131 // 2 * 8 + 2 * 132 * 8 + 8  # the triangle and two gradients
    cuda_on_host.set_shared_memory_limit(held)
    try:
        check_gram(cuda_on_host, 130, gradients(3, 151, 1.0), torch.float64)
    finally:
        cuda_on_host.set_shared_memory_limit(231424)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_any_type(cuda_on_host, dtype):
    g = gradients(3, 107, 1.0, dtype)  # odd: the rows start anywhere in a vector
    check_gram(cuda_on_host, 50, g, torch.float64)
    check_woodbury(cuda_on_host, 50, g)


def check_woodbury(
    host: ModuleType, block_size: int, g: Tensor, changed: Program | None = None
) -> None:
    k, n = g.shape
    blocks = num_blocks(n, block_size)
    start = pack_inverse((torch.eye(block_size) / DAMPING).repeat(blocks, 1, 1))
    inverse, naive, status = start.clone(), start.clone(), ops.new_status()
    reference.woodbury_update(naive, g.float(), float(k), ops.new_status())
    exact = reference.gram_inverse(
        gram_of(g.double(), block_size), n, block_size, float(k), DAMPING, torch.float64,
        ops.new_status(),
    )  # fmt: skip
    call = lambda: ops.woodbury_update(inverse, g, float(k), status)  # noqa: E731
    for _ in replay(host, call, inverse, g, status, changed=changed):
        assert relative_error(inverse, exact) < 4 * relative_error(naive, exact) + 1e-6
        assert status.item() == -1


# 18 gradients: more than wait in shared memory at a time.
@pytest.mark.parametrize("block_size, k", [(4, 18), (32, 3), (50, 3), (64, 3), (96, 2), (20, 3)])
def test_woodbury(cuda_on_host, block_size, k):
    check_woodbury(cuda_on_host, block_size, gradients(k, weights_in(block_size)))


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("block_size", FACTORED)
def test_gram_scores(cuda_on_host, block_size, group_size):
    gram, weight, _, args = problem(block_size)
    status = ops.new_status()
    expected = reference.gram_scores(gram, weight, group_size, *args, status)
    for scores in replay(
        cuda_on_host,
        lambda: ops.gram_scores(gram, weight, group_size, *args, status),
        gram, weight, status,
    ):  # fmt: skip
        assert relative_error(scores, expected) < F32
        assert status.item() == -1


def check_greedy(
    host: ModuleType, block_size: int, group_size: int, changed: Program | None = None
) -> None:
    gram, weight, keep, args = problem(block_size)
    status = ops.new_status()
    arguments = (gram, weight, keep, group_size, *args, status)
    expected = reference.gram_greedy_scores(*arguments)
    call = lambda: ops.gram_greedy_scores(*arguments)  # noqa: E731
    for scores in replay(host, call, gram, weight, keep, status, changed=changed):
        assert relative_error(scores, expected) < F32
        assert status.item() == -1


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("block_size", FACTORED)
def test_gram_greedy_scores(cuda_on_host, block_size, group_size):
    check_greedy(cuda_on_host, block_size, group_size)


def check_n_of_m(
    host: ModuleType, block_size: int, kept: int, group: int, changed: Program | None = None
) -> None:
    n = 2 * block_size + group if block_size > 8 else weights_in(8)
    gram, weight = gram_of(gradients(40, n), block_size), torch.randn(n)
    keep, status = torch.rand(n) < 0.9, ops.new_status()
    arguments = (gram, weight, keep, kept, group, block_size, 40.0, DAMPING, status)
    expected = reference.gram_n_of_m(*arguments)
    call = lambda: ops.gram_n_of_m(*arguments)  # noqa: E731
    for found in replay(host, call, gram, weight, keep, status, changed=changed):
        assert torch.equal(found, expected)
        assert status.item() == -1


@pytest.mark.parametrize(
    "block_size, kept, group",
    [(8, 2, 4), (20, 2, 4), (50, 1, 2), (36, 2, 4), (16, 4, 8), (20, 2, 10)],
)
def test_gram_n_of_m(cuda_on_host, block_size, kept, group):
    """Also patterns with more sets than threads, and than there is room for."""
    check_n_of_m(cuda_on_host, block_size, kept, group)


@pytest.mark.parametrize(
    "block_size, dtype", [(8, torch.float64), (20, torch.float32), (50, torch.float64)], ids=str
)
def test_gram_inverse(cuda_on_host, block_size, dtype):
    gram, weight, _, args = problem(block_size)
    n, status = weight.numel(), ops.new_status()
    expected = reference.gram_inverse(gram, n, *args, torch.float64, status)
    for inverse in replay(
        cuda_on_host, lambda: ops.gram_inverse(gram, n, *args, dtype, status), gram, status
    ):
        assert relative_error(inverse, expected) < (F64 if dtype == torch.float64 else F32)
        assert status.item() == -1


@pytest.mark.parametrize("block_size", FACTORED)
def test_gram_solve(cuda_on_host, block_size):
    gram, weight, _, args = problem(block_size)
    v, status = weight.double(), ops.new_status()
    expected = reference.gram_solve(gram, v, *args, status)
    for solution in replay(
        cuda_on_host, lambda: ops.gram_solve(gram, v, *args, status), gram, v, status
    ):
        assert relative_error(solution, expected) < F64
        assert status.item() == -1


@pytest.mark.parametrize("group_size, joint", [(1, False), (4, False), (1, True)])
@pytest.mark.parametrize("block_size", FACTORED)
def test_gram_update(cuda_on_host, block_size, group_size, joint):
    gram, weight, keep, args = problem(block_size)
    status = ops.new_status()
    arguments = (gram, weight, keep, group_size, joint, *args, status)
    expected = reference.gram_update(*arguments)
    for new, increase in replay(
        cuda_on_host, lambda: ops.gram_update(*arguments), gram, weight, keep, status
    ):
        assert relative_error(new, expected[0]) < F32
        assert relative_error(increase, expected[1]) < F64
        assert not new[~keep].any() and status.item() == -1


@pytest.mark.parametrize("group_size", [1, 4])
@pytest.mark.parametrize("block_size", FACTORED)
def test_inverse_scores(cuda_on_host, block_size, group_size):
    gram, weight, _, args = problem(block_size)
    inverse, status = inverse_of(gram, weight.numel(), args), ops.new_status()
    arguments = (inverse, weight, group_size, status)
    expected = reference.inverse_scores(*arguments)
    for scores in replay(
        cuda_on_host, lambda: ops.inverse_scores(*arguments), inverse, weight, status
    ):
        assert relative_error(scores, expected) < F32
        assert status.item() == -1


@pytest.mark.parametrize(
    "group_size, joint, with_increase",
    [(1, False, False), (1, False, True), (4, False, False), (1, True, True)],
)
@pytest.mark.parametrize("block_size", FACTORED)
def test_inverse_update(cuda_on_host, block_size, group_size, joint, with_increase):
    gram, weight, keep, args = problem(block_size)
    inverse, status = inverse_of(gram, weight.numel(), args), ops.new_status()
    arguments = (inverse, weight, keep, group_size, joint, with_increase, status)
    expected = reference.inverse_update(*arguments)
    for new, increase in replay(
        cuda_on_host, lambda: ops.inverse_update(*arguments), inverse, weight, keep, status
    ):
        assert relative_error(new, expected[0]) < F32
        assert increase.shape == expected[1].shape
        assert not with_increase or relative_error(increase, expected[1]) < F64
        assert not new[~keep].any() and status.item() == -1


@pytest.mark.parametrize("block_size", [8, 50])
def test_the_first_failed_block_is_recorded(cuda_on_host, block_size):
    gram, weight, _, args = problem(block_size)
    gram[1:, 0] = float("nan")
    status = ops.new_status()
    for _ in replay(
        cuda_on_host, lambda: ops.gram_solve(gram, weight, *args, status), gram, weight, status
    ):
        assert status.item() == 1


@pytest.mark.parametrize(("source", "file", "statement", "size"), [
    ("gram", "gram.cu", "__syncthreads();", 50),
    ("greedy", "removals.cuh", "T::sync();  // in one warp, too: shuffles order no memory", 8),
    ("n_of_m", "triangle.cuh", "T::sync();", 8),
    ("n_of_m", "removals.cuh", "T::sync();", 20),
    ("gram_living", "gram_living.cu", "Workers::sync();", 8),
    ("woodbury", "woodbury.cu", "T::sync();", 8),
])  # fmt: skip
def test_without_its_barriers_a_kernel_is_called_a_race(
    cuda_on_host, tmp_path, source, file, statement, size
):
    """Also where shuffles bring the lanes of a warp together, which order no memory."""
    changed = program_of_changed(tmp_path, source, file, statement, "")
    with pytest.raises(PtxError, match=r"race|nobody wrote"):
        if source == "gram":
            check_gram(cuda_on_host, size, gradients(3, 108), torch.float32, changed)
        elif source == "woodbury":
            check_woodbury(cuda_on_host, size, gradients(2, 3 * size), changed)
        elif source == "greedy":
            check_greedy(cuda_on_host, size, 4, changed)
        elif source == "n_of_m":
            check_n_of_m(cuda_on_host, size, 2, 4, changed)
        else:
            check_living(cuda_on_host, size, torch.float32, changed)
