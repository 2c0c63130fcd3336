"""What the CUDA kernels read from device memory and write to it, counted on the host."""

from __future__ import annotations

import pytest
import torch
from problems import DAMPING, fresh_inverse, gradients, gram_of
from test_cuda_kernels import LARGE, SIZES, triangle

from obert_kernels import LiveFisher, ops
from obert_kernels.ops import reference
from obert_kernels.ops.packing import num_blocks


def lengths(n: int, size: int) -> list[int]:
    """Weights in each block."""
    return [min(size, n - start) for start in range(0, n, size)]


def moved(module, call) -> tuple[int, int]:
    """Bytes of device memory a call reads and writes, and its result must be no failure."""
    module.reset_counters()
    call()
    counters = module.counters()
    return counters["load_bytes"], counters["store_bytes"]


def count(module, call) -> tuple[int, int]:
    """Its reads and writes, of however many bytes."""
    moved(module, call)
    counters = module.counters()
    return counters["load_count"], counters["store_count"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_and_woodbury_move_every_byte_once(cuda_on_host, size, k, dtype):
    n = 3 * size + size // 2
    g = gradients(k, n).to(dtype)
    blocks = num_blocks(n, size)
    read = k * n * dtype.itemsize
    for gram_dtype in (torch.float32, torch.float64):
        gram = torch.zeros(blocks, triangle(size), dtype=gram_dtype)
        state = gram.numel() * gram_dtype.itemsize
        got = moved(cuda_on_host, lambda gram=gram: ops.gram_accumulate(gram, g, size))
        assert got == (state + read, state)
    inverse = fresh_inverse(blocks, size)
    state = 4 * blocks * triangle(size)
    status = ops.new_status()
    got = moved(cuda_on_host, lambda: ops.woodbury_update(inverse, g, float(k), status))
    assert status.item() == -1
    assert got == (state + read, state)


def table_bytes(live: LiveFisher) -> int:
    """Of a Fisher of living weights, read once."""
    return 3 * 8 * len(live._gram_start) + 4 * len(live._source)


@pytest.mark.parametrize(
    ("share", "size", "above", "most"), [(0.1, 40, 4, 28), (0.5, 40, 4, 28), (0.8, 60, 28, 60)]
)
@pytest.mark.parametrize("k", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gram_of_living_weights_moves_their_bytes_once(
    cuda_on_host, share, size, above, most, k, dtype
):
    """Of blocks that a warp, or a thread block, has threads enough for."""
    alive = torch.rand(2000) < share
    g = gradients(k, 2000).to(dtype)
    for gram_dtype in (torch.float32, torch.float64):
        live = LiveFisher(alive, size, dtype=gram_dtype)
        assert above < live._first_place.diff().max() <= most
        state, read = live._gram.nbytes, k * int(alive.sum()) * dtype.itemsize
        got = moved(cuda_on_host, lambda live=live: live.accumulate(g))
        assert got == (state + table_bytes(live) + read, state)


@pytest.mark.parametrize("k", [1, 40])
def test_gradients_of_more_living_weights_pass_once_for_128_tiles(cuda_on_host, k):
    alive = torch.arange(256) % 4 != 3  # 96 in each of two blocks: 24 tiles high
    live, g = LiveFisher(alive, 128), gradients(k, 256)
    passes = -(-(24 * 25 // 2) // 128)
    state, read = live._gram.nbytes, passes * k * 192 * 4
    got = moved(cuda_on_host, lambda: live.accumulate(g))
    assert got == (state + table_bytes(live) + read, state)


@pytest.mark.parametrize(("size", "gram_dtype"), LARGE)
@pytest.mark.parametrize("k", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gram_of_large_blocks_moves_every_byte_once(cuda_on_host, size, gram_dtype, k, dtype):
    n = size + size // 2
    gram = torch.zeros(2, triangle(size), dtype=gram_dtype)
    state, read = gram.numel() * gram_dtype.itemsize, k * n * dtype.itemsize
    g = gradients(k, n).to(dtype)
    got = moved(cuda_on_host, lambda: ops.gram_accumulate(gram, g, size))
    assert got == (state + read, state)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
def test_what_is_made_of_a_gram_reads_it_once(cuda_on_host, size, gram_dtype):
    n = (3 * size + size // 2) // 2 * 2  # pairs for the pattern
    gram = gram_of(gradients(30, n), size, gram_dtype)
    weight, keep = torch.randn(n), torch.arange(n) % 2 == 0  # every block loses weights
    status = ops.new_status()
    fisher = (size, 30.0, DAMPING, status)
    state = sum(map(triangle, lengths(n, size))) * gram_dtype.itemsize
    blocks = gram.shape[0]
    expected = {
        "diagonal": (state, 4 * n),
        "inverse": (state, 4 * blocks * triangle(size)),
        "solve": (state + 4 * n, 4 * n),
        "scores": (state + 4 * n, 4 * n),
        "sum": (state + 5 * n, 4 * n + 8 * blocks),
        "joint": (state + 5 * n, 4 * n + 8 * blocks),
        "greedy": (state + 5 * n, 4 * n),
        "N:M": (state + 5 * n, n),
    }
    made = (n, size, 30.0, DAMPING, torch.float32, status)
    calls = {
        "diagonal": lambda: ops.gram_diagonal(gram, *made),
        "inverse": lambda: ops.gram_inverse(gram, *made),
        "solve": lambda: ops.gram_solve(gram, weight, *fisher),
        "scores": lambda: ops.gram_scores(gram, weight, 1, *fisher),
        "sum": lambda: ops.gram_update(gram, weight, keep, 1, False, *fisher),
        "joint": lambda: ops.gram_update(gram, weight, keep, 1, True, *fisher),
        "greedy": lambda: ops.gram_greedy_scores(gram, weight, keep, 1, *fisher),
        "N:M": lambda: ops.gram_n_of_m(gram, weight, torch.ones_like(keep), 1, 2, *fisher),
    }
    assert {name: moved(cuda_on_host, call) for name, call in calls.items()} == expected
    assert status.item() == -1


@pytest.mark.parametrize("size", [16, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_vectors_are_passed_over_16_bytes_at_a_time(cuda_on_host, size, dtype):
    """Accesses, not bytes, where every block begins at a 16-byte border."""
    n = 1536
    gram = gram_of(gradients(30, n), size)
    weight, keep = torch.randn(n, dtype=dtype), torch.arange(n) % 2 == 0
    status = ops.new_status()
    inverse = ops.gram_inverse(gram, n, size, 30.0, DAMPING, torch.float32, status)
    fisher, made = (size, 30.0, DAMPING, status), (n, size, 30.0, DAMPING, dtype, status)
    state, given, vector = gram.numel() // 2, inverse.numel() // 4, n * dtype.itemsize // 16
    scores, mask, blocks = n // 4, n // 16, n // size
    expected = {
        "diagonal": (state, vector),
        "inverse": (state, gram.numel() * dtype.itemsize // 16),
        "solve": (state + vector, vector),
        "scores": (state + vector, scores),
        "group scores": (state + vector, scores // 4),
        "update": (state + vector + mask, vector + blocks),
        "greedy": (state + vector + mask, scores),
        "greedy groups": (state + vector + mask, scores // 4),
        "N:M": (state + vector + mask, mask),
        "given: scores": (n // 4 + vector, scores),  # of each block the diagonal
        # Of each group six entries below the diagonal, in runs of one to three.
        "given: group scores": (n // 4 + n // 4 * 6 + vector, scores // 4),
        "given: update": (given + vector + mask, vector + blocks),
    }
    calls = {
        "diagonal": lambda: ops.gram_diagonal(gram, *made),
        "inverse": lambda: ops.gram_inverse(gram, *made),
        "solve": lambda: ops.gram_solve(gram, weight, *fisher),
        "scores": lambda: ops.gram_scores(gram, weight, 1, *fisher),
        "group scores": lambda: ops.gram_scores(gram, weight, 4, *fisher),
        "update": lambda: ops.gram_update(gram, weight, keep, 1, True, *fisher),
        "greedy": lambda: ops.gram_greedy_scores(gram, weight, keep, 1, *fisher),
        "greedy groups": lambda: ops.gram_greedy_scores(gram, weight, keep, 4, *fisher),
        "N:M": lambda: ops.gram_n_of_m(gram, weight, keep, 1, 4, *fisher),
        "given: scores": lambda: ops.inverse_scores(inverse, weight, 1, status),
        "given: group scores": lambda: ops.inverse_scores(inverse, weight, 4, status),
        "given: update": lambda: ops.inverse_update(inverse, weight, keep, 1, True, True, status),
    }
    assert {name: count(cuda_on_host, call) for name, call in calls.items()} == expected
    assert status.item() == -1


def accesses(data: torch.Tensor, runs: list[int]) -> int:
    """To consecutive runs: 16 bytes where alignment allows, single elements before and after."""
    per_vector = 16 // data.itemsize
    count, address = 0, data.data_ptr()
    for length in runs:
        head = min(length, -address % 16 // data.itemsize)
        vectors, tail = divmod(length - head, per_vector)
        count += head + vectors + tail
        address += length * data.itemsize
    return count


@pytest.mark.parametrize("size", [4, 20, 37, 50, 64])
@pytest.mark.parametrize("offset", [0, 1, 13])
def test_runs_that_begin_anywhere_are_passed_over_16_bytes_at_a_time(cuda_on_host, size, offset):
    n, blocks = 9 * size + size // 4 * 2, 10
    runs, triangles = lengths(n, size), [triangle(size)] * blocks
    gram, status = gram_of(gradients(30, n), size), ops.new_status()
    inverse = ops.gram_inverse(gram, n, size, 30.0, DAMPING, torch.float32, status)
    weight, keep = torch.randn(n + offset)[offset:], (torch.arange(n + offset) % 2 == 0)[offset:]
    assert keep.data_ptr() % 16 == offset
    fisher = (size, 30.0, DAMPING, status)
    given = accesses(weight, runs) + accesses(keep, runs)
    # The short block's packed triangle ends where its weights do.
    state = accesses(gram, triangles[1:]) + accesses(gram[-1], [triangle(runs[-1])])
    written = accesses(torch.empty(n), runs)
    # Of single scores four at a time, with their diagonals at once if one block has them all.
    fours = [4] * (n // 4) + [1] * (n % 4)
    places = [divmod(i, size) for i in range(0, n - 3, 4)]
    diagonal = n % 4 + sum(
        accesses(inverse[block, i:], [4]) if i + 4 <= size else 4 for block, i in places
    )
    expected = {
        "update": (given + state, written + blocks),
        "greedy": (given + state, written),
        "given: update": (given + accesses(inverse, triangles), written + blocks),
        "given: scores": (accesses(weight, fours) + diagonal, accesses(torch.empty(n), fours)),
    }
    calls = {
        "update": lambda: ops.gram_update(gram, weight, keep, 1, False, *fisher),
        "greedy": lambda: ops.gram_greedy_scores(gram, weight, keep, 1, *fisher),
        "given: update": lambda: ops.inverse_update(inverse, weight, keep, 1, True, True, status),
        "given: scores": lambda: ops.inverse_scores(inverse, weight, 1, status),
    }
    if size % 2 == 0:
        expected["N:M"] = (given + state, accesses(torch.empty(n, dtype=torch.bool), runs))
        calls["N:M"] = lambda: ops.gram_n_of_m(gram, weight, keep, 1, 2, *fisher)
    assert {name: count(cuda_on_host, call) for name, call in calls.items()} == expected
    assert status.item() == -1


@pytest.mark.parametrize("size", SIZES)
def test_what_is_made_of_an_inverse_reads_what_it_needs(cuda_on_host, size):
    n = 4 * size
    inverse = reference.gram_inverse(
        gram_of(gradients(30, n), size), n, size, 30.0, DAMPING, torch.float32, ops.new_status()
    )
    weight, keep = torch.randn(n), torch.zeros(n, dtype=torch.bool)
    status = ops.new_status()
    lower = 4 * triangle(size) * 4
    rest = (weight, keep, 1)
    assert moved(cuda_on_host, lambda: ops.inverse_scores(inverse, weight, 1, status)) == (
        8 * n,
        4 * n,
    )
    assert moved(cuda_on_host, lambda: ops.inverse_scores(inverse, weight, 4, status))[0] == (
        4 * n + n // 4 * 10 * 4
        if size % 4 == 0
        else pytest.approx(4 * n + n // 4 * 10 * 4, rel=0.1)
    )
    for joint in (False, True):
        got = moved(
            cuda_on_host, lambda j=joint: ops.inverse_update(inverse, *rest, j, True, status)
        )
        assert got == (lower + 5 * n, 4 * n + 8 * 4)
    assert status.item() == -1
