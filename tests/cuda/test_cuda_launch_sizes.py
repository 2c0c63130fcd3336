"""The thread blocks and the shared memory that every operator asks for, to the byte."""

from __future__ import annotations

import pytest
import torch
from problems import DAMPING, fresh_inverse, gradients
from test_cuda_kernels import shared_memory

from benchmarks.kernels.occupancy import BLOCK_SIZES, record
from obert_kernels import ops
from obert_kernels.ops.living import gram_accumulate_living


def team_of(size: int) -> int:
    """Threads that work on a block."""
    least = 4 if size in BLOCK_SIZES else 8
    return max(least, 1 << (size - 1).bit_length())


def triangle(n: int) -> int:
    return n * (n + 1) // 2


def up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def systems(size: int, c: int) -> int:
    """Bytes for the systems of the groups: of whole groups, and of halves of one at borders."""
    return 0 if c == 1 else up(size * (min(c, size) + 1), 2) // 2 * 8


def workspace(size: int, c: int, matrix_bytes: int = 8) -> int:
    """A matrix, four vectors and a mask."""
    matrix = up(triangle(size) * matrix_bytes, 8)
    return matrix + 4 * 8 * size + systems(size, c) + up(size, 8)


def sets(threads: int, kept: int, group: int) -> int:
    """Bytes for the sets that are looked at together."""
    one = triangle(group - kept) + group - kept
    return min(512 // one, 1 << group, threads) * one * 8


@pytest.mark.parametrize("size", [*BLOCK_SIZES, 1, 9, 17, 33, 52, 100, 107])
@pytest.mark.parametrize("blocks", [1, 37])
def test_every_launch_asks_for_what_it_needs(cuda_on_host, size, blocks):
    n, status = size * blocks, ops.new_status()
    gram = torch.zeros(blocks, triangle(size), dtype=torch.float64)
    inverse, weight, keep = fresh_inverse(blocks, size), torch.ones(n), torch.ones(n).bool()
    fisher = (size, 1.0, DAMPING, status)
    made = (n, *fisher[:-1], torch.float32, status)
    own, given = workspace(size, 1), workspace(size, 1, 4)
    expected = [
        (lambda: ops.gram_inverse(gram, *made), own),
        (lambda: ops.gram_diagonal(gram, *made), own),
        (lambda: ops.gram_solve(gram, weight, *fisher), own),
        (lambda: ops.inverse_update(inverse, weight, keep, 1, False, False, status), given),
    ]
    for c in {c for c in (1, 2, 4, 64, n) if n % c == 0}:
        all_groups, of_groups = workspace(size, c), workspace(size, c, 4)
        both = given + 8 * triangle(size), of_groups + 8 * triangle(size)
        for joint in (False, True):
            expected += [
                (lambda c=c, joint=joint: ops.gram_update(gram, weight, keep, c, joint, *fisher),
                 own if joint else all_groups),
                (lambda c=c, joint=joint: ops.inverse_update(
                    inverse, weight, keep, c, joint, True, status), both[not joint]),
            ]  # fmt: skip
        expected += [
            (lambda c=c: ops.gram_scores(gram, weight, c, *fisher), all_groups),
            (lambda c=c: ops.gram_greedy_scores(gram, weight, keep, c, *fisher), all_groups),
            (lambda c=c: ops.inverse_update(inverse, weight, keep, c, False, False, status),
             of_groups),
        ]  # fmt: skip
        if c > 1:
            scores = 3 * 8 * size + systems(size, c)
            expected += [(lambda c=c: ops.inverse_scores(inverse, weight, c, status), scores)]
    threads = team_of(size)
    for kept, group in ((1, 2), (2, 4), (3, 16)):
        if size % group == 0:
            general = max(threads, 8)
            expected += [
                (lambda kept=kept, group=group: ops.gram_n_of_m(
                    gram, weight, keep, kept, group, *fisher), own + sets(general, kept, group))
            ]  # fmt: skip
    for call, bytes_of_a_block in expected:
        _, launch = record(cuda_on_host, call)
        width = max(threads, 8) if "n_of_m" in launch["kernel"] else threads
        teams = max(1, 128 // width) if width <= 32 else 1
        assert launch["grid"] == (-(-blocks // teams), 1, 1), launch
        assert launch["block"] == (max(128, width) if width <= 32 else width, 1, 1), launch
        assert launch["shared_bytes"] == teams * bytes_of_a_block, launch


@pytest.mark.parametrize("size", [1, 4, 8, 20, 32, 33, 50, 64, 100, 128, 129, 239])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("blocks", "k"), [(1, 1), (37, 1), (37, 300)])
def test_the_gram_asks_for_its_tiles(cuda_on_host, size, dtype, blocks, k):
    """A thread for each tile, whole warps, and memory for triangles or gradients."""
    wide = 4 if dtype == torch.float64 or size <= 32 else 8
    tiles = triangle(-(-size // wide))
    most = 544 if dtype == torch.float64 else 128 if wide == 4 else 512
    large = tiles > most
    together = 1 if large else max(1, 128 // tiles)
    row = together * up(size, wide) * dtype.itemsize
    held = up(together * triangle(size) * dtype.itemsize, 16)
    room = 231424 - held if large else 16 * 1024
    staged = min(k, max(1, room // row))
    g, gram = gradients(k, size * blocks), torch.zeros(blocks, triangle(size), dtype=dtype)
    _, launch = record(cuda_on_host, lambda: ops.gram_accumulate(gram, g, size))
    assert launch["grid"] == (-(-blocks // together), 1, 1)
    assert launch["block"] == (most if large else up(together * tiles, 32), 1, 1)
    bytes_asked = held + staged * row if large else max(held, staged * row)
    assert launch["shared_bytes"] == bytes_asked
    inverse, status = fresh_inverse(blocks, size), ops.new_status()
    _, launch = record(cuda_on_host, lambda: ops.woodbury_update(inverse, g, 1.0, status))
    if size not in BLOCK_SIZES:
        assert (launch["grid"], launch["block"]) == ((blocks, 1, 1), (256, 1, 1))
        assert launch["shared_bytes"] == 4 * (triangle(size) + 18 * size + 8)


def test_all_teams_of_a_thread_block_have_to_fit(cuda_on_host):
    """Four blocks of 32 share one."""
    gram, v, status = torch.zeros(1, 528), torch.ones(32), ops.new_status()
    needs = 4 * workspace(32, 1)
    message = f"block size 32 needs {needs} bytes of shared memory, this device has {needs - 1} "
    with shared_memory(cuda_on_host, needs - 1), pytest.raises(ValueError, match=message):
        ops.gram_solve(gram, v, 32, 1.0, DAMPING, status)
    with shared_memory(cuda_on_host, needs):
        ops.gram_solve(gram, v, 32, 1.0, DAMPING, status)
    assert status.item() == -1


def test_the_largest_that_fits_fills_the_device(cuda_on_host):
    gram, v, status = torch.zeros(1, triangle(101)), torch.ones(101), ops.new_status()
    message = "block size 101 needs .* the largest that fits is 99$"
    with (
        shared_memory(cuda_on_host, workspace(99, 1)),
        pytest.raises(ValueError, match=message),
    ):
        ops.gram_solve(gram, v, 101, 1.0, DAMPING, status)


def test_no_weights_are_no_launch(cuda_on_host):
    gram, v, status = torch.zeros(0, 3), torch.zeros(0), ops.new_status()
    assert ops.gram_solve(gram, v, 2, 1.0, DAMPING, status).shape == (0,)
    assert status.item() == -1


def test_no_gradients_are_no_launch(cuda_on_host):
    g, gram, zero = torch.zeros(0, 2), torch.zeros(1, 3), torch.zeros(1, dtype=torch.int64)
    cuda_on_host.set_recording(True)
    try:
        ops.gram_accumulate(gram, g, 2)
        places = torch.arange(2, dtype=torch.int32)
        gram_accumulate_living(gram.view(-1), g, zero, torch.arange(2) * 2, places)
        assert cuda_on_host.launches() == []
    finally:
        cuda_on_host.set_recording(False)
