"""What a launch asks for, at its limits: shared memory, thread blocks, errors, atomics."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from problems import DAMPING, fresh_inverse, gradients, gram_of, relative_error
from test_cuda_kernels import shared_memory

from benchmarks.kernels import occupancy
from obert_kernels import ops
from obert_kernels.ops import reference

# ---- shared memory -------------------------------------------------------------------

WITHOUT_OPT_IN = 48 * 1024  # bytes that every kernel may ask for
# Of each family the first block size beyond, and what a launch for it asks for.
BORDERS = {
    "gram, float32": (157, 49_616),
    "gram, float64": (111, 49_728),
    "woodbury": (140, 49_592),
    "gram scores, single": (107, 49_760),
    "gram scores, groups of 4": (104, 49_192),
    "gram inverse": (107, 49_760),
    "gram solve": (107, 49_760),
    "gram update": (107, 49_760),
    "gram greedy scores, single": (107, 49_760),
    "gram greedy scores, groups of 4": (104, 49_192),
    "gram N:M, 2:4 or 1:2": (108, 51_296),
    "inverse update, sum": (149, 49_624),
    "inverse update, joint": (88, 49_896),
}


@pytest.mark.parametrize("family", BORDERS)
def test_more_than_48_kib_of_shared_memory_are_opted_in_to(cuda_on_host, family):
    size, bytes_asked = BORDERS[family]
    call = occupancy.operators(size)[family]
    assert occupancy.record(cuda_on_host, call)[1]["shared_bytes"] == bytes_asked > WITHOUT_OPT_IN
    below = occupancy.operators(size - (2 if "N:M" in family else 1))[family]
    assert occupancy.record(cuda_on_host, below)[1]["shared_bytes"] <= WITHOUT_OPT_IN
    cuda_on_host.forget_attributes()
    call()
    with shared_memory(cuda_on_host, bytes_asked):
        call()
    message = rf"block size {size} needs {bytes_asked} bytes .* has {bytes_asked - 1} .* is \d+$"
    with (
        shared_memory(cuda_on_host, bytes_asked - 1),
        pytest.raises(ValueError, match=message) as caught,
    ):
        call()
    assert size - 4 <= int(str(caught.value).rsplit(" ", 1)[1]) < size
    assert cuda_on_host.last_error() == 0


# ---- thread blocks -------------------------------------------------------------------

MOST = 2**31 - 1  # thread blocks of a launch


def without_memory(core: ModuleType, block_size: int) -> dict[str, Callable[[int], Any]]:
    """Every operator by its number of weights; launches are kept, not run: addresses are 0."""

    def fisher(n: int) -> Any:
        return core.Fisher(num_weights=n, block_size=block_size, gram=0, gram_type=1, scale=1.0,
                           damping=1.0, status=0)  # fmt: skip

    vector = {"weight": 0, "weight_type": 0}
    update = core.Update(**vector, keep=0, group_size=1, rule=0, new_weight=0,
                         predicted_increase=0)  # fmt: skip
    rows = {"gradients": 0, "gradient_type": 0, "num_gradients": 1, "gradient_stride": 0}
    scores = {**vector, "scores": 0}

    def blocks(n: int) -> dict[str, int]:
        return {"num_weights": n, "block_size": block_size}

    return {
        "gram": lambda n: core.gram_accumulate(0, **blocks(n), gram=0, gram_type=0, **rows),
        "gram, float64": lambda n: core.gram_accumulate(
            0, **blocks(n), gram=0, gram_type=1, **rows
        ),
        "living": lambda n: core.gram_accumulate_living(
            0, num_blocks=-(-n // block_size), gram_size=0, num_places=0, num_weights=n, gram=0,
            gram_type=0, gram_start=0, first_place=0, weight_at_place=0, **rows,
        ),
        "inverse": lambda n: core.gram_inverse(0, fisher=fisher(n), inverse=0, inverse_type=0),
        "diagonal": lambda n: core.gram_diagonal(0, fisher=fisher(n), diagonal=0, diagonal_type=0),
        "solve": lambda n: core.gram_solve(
            0, fisher=fisher(n), right_hand_side=0, solution=0, vector_type=0
        ),
        "scores": lambda n: core.gram_scores(0, fisher=fisher(n), group_size=1, **scores),
        "greedy": lambda n: core.gram_greedy_scores(
            0, fisher=fisher(n), keep=0, group_size=1, **scores
        ),
        "N:M": lambda n: core.gram_n_of_m(
            0, fisher=fisher(n), **vector, keep=0, kept=1, group=2, new_keep=0
        ),
        "update": lambda n: core.gram_update(0, fisher=fisher(n), update=update),
        "woodbury": lambda n: core.woodbury_update(
            0, **blocks(n), inverse=0, **rows, total_gradients=1.0, status=0
        ),
        "given: scores": lambda n: core.inverse_scores(
            0, **blocks(n), inverse=0, group_size=1, **scores, status=0
        ),
        "given: group scores": lambda n: core.inverse_scores(
            0, **blocks(n), inverse=0, group_size=2, **scores, status=0
        ),
        "given: update": lambda n: core.inverse_update(
            0, **blocks(n), inverse=0, update=update, status=0
        ),
    }  # fmt: skip


@pytest.mark.parametrize("block_size", [4, 20, 50, 130])
def test_no_launch_has_more_than_2_31_thread_blocks(cuda_on_host, block_size):
    """Nor fewer than it needs: numbers of thread blocks are not cut off at 32 bits."""

    def grid(call: Callable[[int], Any], n: int) -> int:
        return occupancy.record(cuda_on_host, lambda: call(n))[1]["grid"][0]

    for name, call in without_memory(cuda_on_host, block_size).items():
        weights = 2**30 * block_size // grid(call, 2**30 * block_size)  # of a thread block
        assert grid(call, 3 * weights) == 3, name
        assert grid(call, 3 * weights + 1) == 4, name
        assert grid(call, MOST * weights) == MOST, name
        with pytest.raises(ValueError, match="more Fisher blocks than one launch can have"):
            grid(call, MOST * weights + 1)
        with pytest.raises(ValueError, match="more Fisher blocks than one launch can have"):
            grid(call, 2 * 2**32 * weights + block_size)  # 1, cut off


# ---- errors --------------------------------------------------------------------------


def test_a_refused_launch_says_why_and_leaves_no_error_behind(cuda_on_host):
    out_of_memory = 2  # cudaErrorMemoryAllocation
    gram, v = gram_of(gradients(40, 100), 50), torch.randn(100)
    fisher = (50, 40.0, DAMPING)
    cuda_on_host.set_launch_error(out_of_memory)
    try:
        with pytest.raises(RuntimeError, match="kernel launch: out of memory"):
            ops.gram_solve(gram, v, *fisher, ops.new_status())
    finally:
        cuda_on_host.set_launch_error(0)
    assert cuda_on_host.last_error() == 0
    status = ops.new_status()
    found = ops.gram_solve(gram, v, *fisher, status)
    expected = reference.gram_solve(gram, v.double(), *fisher, ops.new_status())
    assert status.item() == -1 and relative_error(found, expected) < 1e-6


# ---- atomics -------------------------------------------------------------------------


def atomics(module: ModuleType, call: Callable[[], Any]) -> int:
    module.reset_counters()
    call()
    return module.counters()["atomic_count"]


@pytest.mark.parametrize("block_size", [4, 20, 50])
def test_failures_are_recorded_atomically(cuda_on_host, block_size):
    """Thread blocks run one after the other here: a plain store would look right."""
    n = 6 * block_size
    gram = gram_of(gradients(60, n), block_size)
    weight, keep = torch.randn(n), torch.arange(n) // 2 % 2 == 0
    inverse, g = fresh_inverse(6, block_size), torch.zeros(2, n)
    spoilt, lost = gram.clone(), inverse.clone()
    spoilt[[1, 4], 0] = float("nan")
    lost[[1, 4], 0] = float("nan")
    keep[block_size], keep[4 * block_size] = False, False
    all_there = torch.ones_like(keep)
    fisher = (block_size, 60.0, DAMPING)
    for name, call in {
        "inverse": lambda a, i, s: ops.gram_inverse(a, n, *fisher, torch.float64, s),
        "diagonal": lambda a, i, s: ops.gram_diagonal(a, n, *fisher, torch.float64, s),
        "solve": lambda a, i, s: ops.gram_solve(a, weight, *fisher, s),
        "scores": lambda a, i, s: ops.gram_scores(a, weight, 1, *fisher, s),
        "group scores": lambda a, i, s: ops.gram_scores(a, weight, 2, *fisher, s),
        "greedy": lambda a, i, s: ops.gram_greedy_scores(a, weight, all_there, 1, *fisher, s),
        "N:M": lambda a, i, s: ops.gram_n_of_m(a, weight, all_there, 1, 2, *fisher, s),
        "sum": lambda a, i, s: ops.gram_update(a, weight, keep, 1, False, *fisher, s),
        "woodbury": lambda a, i, s: ops.woodbury_update(i, g, 2.0, s),
        "given: scores": lambda a, i, s: ops.inverse_scores(i, weight, 1, s),
        "given: group scores": lambda a, i, s: ops.inverse_scores(i, weight, 2, s),
        "given: sum": lambda a, i, s: ops.inverse_update(i, weight, keep, 1, False, True, s),
        "given: joint": lambda a, i, s: ops.inverse_update(i, weight, keep, 1, True, True, s),
    }.items():
        status = ops.new_status()
        assert atomics(cuda_on_host, lambda: call(gram, inverse, status)) == 0, name  # noqa: B023
        assert status.item() == -1
        assert atomics(cuda_on_host, lambda: call(spoilt, lost, status)) >= 2, name  # noqa: B023
        assert status.item() == 1, name


@pytest.mark.parametrize("block_size", [6, 50])
def test_parts_of_groups_are_added_atomically(cuda_on_host, block_size):
    """Two for each group that a border cuts; other scores are written plainly."""
    n = 8 * block_size
    gram, weight = gram_of(gradients(60, n), block_size), torch.randn(n)
    status = ops.new_status()
    inverse = ops.gram_inverse(gram, n, block_size, 60.0, DAMPING, torch.float32, status)
    cut = sum(border % 4 != 0 for border in range(block_size, n, block_size))
    assert cut == 4
    fisher = (block_size, 60.0, DAMPING, status)
    keep = torch.ones(n, dtype=torch.bool)
    for call in (
        lambda: ops.gram_scores(gram, weight, 4, *fisher),
        lambda: ops.gram_greedy_scores(gram, weight, keep, 4, *fisher),
        lambda: ops.inverse_scores(inverse, weight, 4, status),
    ):
        assert atomics(cuda_on_host, call) == 2 * cut
    assert status.item() == -1
