"""Offsets beyond 32 bits in every CUDA kernel: what stands far away gives what it gives near.

Nobody backs the memory in front of it, and no thread block runs for that.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from devices import CUDA_ON_HOST, INSTRUCTION_SETS
from problems import DAMPING, fresh_inverse, gradients, gram_of
from reserved_memory import reserved
from torch import Tensor

from benchmarks.kernels import occupancy
from obert_kernels import ops
from obert_kernels.ops import native, reference
from obert_kernels.ops.living import gram_accumulate_living

# Weights in front: an int counts neither them nor groups of four of them, nor cuts them to zero.
FAR = 2**33 + 2**31 + 2**20
TOGETHER = 4096  # blocks in front: a multiple of those of a thread block
M = 40.0


class Problem:
    """Everything an operator takes, behind so many blocks of nothing."""

    def __init__(self, core: ModuleType, size: int, near: dict[str, Tensor], blocks: int) -> None:
        self.core, self.blocks = core, blocks
        self.weights = blocks * size  # in front
        self.of_weights = {"num_weights": self.weights + near["weight"].numel(),
                           "block_size": size}  # fmt: skip
        per_block = {
            "gram": near["gram"].shape[1],
            "inverse": near["gram"].shape[1],
            "made": near["gram"].shape[1],
            "increase": 1,
        }
        self.tensors: dict[str, Tensor] = {}
        for name, values in near.items():
            if name == "g":
                continue
            before = blocks * per_block.get(name, size)
            before = self.weights // 2 if name == "scores" else before
            self.tensors[name] = reserved(before + values.numel(), values.dtype)
            self.tensors[name][before:] = values.flatten()
        rows = reserved(len(near["g"]) * self.of_weights["num_weights"], near["g"].dtype)
        self.rows = rows.view(len(near["g"]), -1)
        self.rows[:, self.weights :] = near["g"]
        self.status = ops.new_status()

    def __getitem__(self, name: str) -> int:
        return self.tensors[name].data_ptr()

    @property
    def fisher(self) -> Any:
        return self.core.Fisher(
            **self.of_weights, gram=self["gram"], gram_type=1, scale=1 / M, damping=DAMPING,
            status=self.status.data_ptr(),
        )  # fmt: skip

    @property
    def gradients(self) -> dict[str, int]:
        return {"gradients": self.rows.data_ptr(), "num_gradients": len(self.rows),
                "gradient_type": native.DTYPE_CODES[self.rows.dtype],
                "gradient_stride": self.rows.stride(0)}  # fmt: skip

    @property
    def given(self) -> dict[str, int]:
        return {**self.of_weights, "inverse": self["inverse"], "status": self.status.data_ptr()}

    def update(self, group_size: int, rule: int) -> Any:
        return self.core.Update(
            weight=self["weight"], weight_type=0, keep=self["keep"], group_size=group_size,
            rule=rule, new_weight=self["new"], predicted_increase=self["increase"],
        )  # fmt: skip

    def vector(self, name: str = "weight") -> dict[str, int]:
        return {"weight": self[name], "weight_type": 0}


# What each operator writes, and the call.
OPERATORS: dict[str, tuple[list[str], Callable[[Any, Problem], Any]]] = {
    "gram": (["gram"], lambda core, p: core.gram_accumulate(
        0, **p.of_weights, gram=p["gram"], gram_type=1, **p.gradients)),
    "woodbury": (["inverse"], lambda core, p: core.woodbury_update(
        0, **p.given, **p.gradients, total_gradients=M)),
    "inverse": (["made"], lambda core, p: core.gram_inverse(
        0, fisher=p.fisher, inverse=p["made"], inverse_type=0)),
    "diagonal": (["new"], lambda core, p: core.gram_diagonal(
        0, fisher=p.fisher, diagonal=p["new"], diagonal_type=0)),
    "solve": (["new"], lambda core, p: core.gram_solve(
        0, fisher=p.fisher, right_hand_side=p["weight"], solution=p["new"], vector_type=0)),
    "solve, float64": (["wide"], lambda core, p: core.gram_solve(
        0, fisher=p.fisher, right_hand_side=p["wide_weight"], solution=p["wide"], vector_type=1)),
    "scores": (["new"], lambda core, p: core.gram_scores(
        0, fisher=p.fisher, **p.vector(), group_size=1, scores=p["new"])),
    "group scores": (["scores"], lambda core, p: core.gram_scores(
        0, fisher=p.fisher, **p.vector(), group_size=2, scores=p["scores"])),
    "greedy": (["new"], lambda core, p: core.gram_greedy_scores(
        0, fisher=p.fisher, **p.vector(), keep=p["all"], group_size=1, scores=p["new"])),
    "greedy groups": (["scores"], lambda core, p: core.gram_greedy_scores(
        0, fisher=p.fisher, **p.vector(), keep=p["all"], group_size=2, scores=p["scores"])),
    "N:M": (["new_keep"], lambda core, p: core.gram_n_of_m(
        0, fisher=p.fisher, **p.vector(), keep=p["all"], kept=1, group=2, new_keep=p["new_keep"])),
    "sum": (["new", "increase"], lambda core, p: core.gram_update(
        0, fisher=p.fisher, update=p.update(1, 0))),
    "group sum": (["new", "increase"], lambda core, p: core.gram_update(
        0, fisher=p.fisher, update=p.update(2, 0))),
    "joint": (["new", "increase"], lambda core, p: core.gram_update(
        0, fisher=p.fisher, update=p.update(1, 1))),
    "given: scores": (["new"], lambda core, p: core.inverse_scores(
        0, **p.given, **p.vector(), group_size=1, scores=p["new"])),
    "given: group scores": (["scores"], lambda core, p: core.inverse_scores(
        0, **p.given, **p.vector(), group_size=2, scores=p["scores"])),
    "given: sum": (["new", "increase"], lambda core, p: core.inverse_update(
        0, **p.given, update=p.update(2, 0))),
    "given: joint": (["new", "increase"], lambda core, p: core.inverse_update(
        0, **p.given, update=p.update(1, 1))),
}  # fmt: skip


def near_problem(size: int, dtype: torch.dtype) -> dict[str, Tensor]:
    n = 2 * size + size // 2 // 2 * 2
    gram = gram_of(gradients(40, n), size)
    inverse = reference.gram_inverse(
        gram, n, size, M, DAMPING, torch.float32, ops.new_status()
    )  # fmt: skip
    return {
        "gram": gram, "inverse": inverse, "g": gradients(3, n, dtype=dtype),
        "weight": torch.randn(n), "keep": torch.arange(n) // 2 % 2 == 1,
        "all": torch.ones(n, dtype=torch.bool), "new": torch.zeros(n),
        "new_keep": torch.zeros(n, dtype=torch.bool), "scores": torch.zeros(n // 2),
        "increase": torch.zeros(len(gram), dtype=torch.float64), "made": torch.zeros_like(inverse),
        "wide_weight": torch.randn(n, dtype=torch.float64),
        "wide": torch.zeros(n, dtype=torch.float64),
    }  # fmt: skip


def thread_blocks(core: ModuleType, call: Callable[[Any, Problem], Any], problem: Problem) -> int:
    return occupancy.record(core, lambda: call(core, problem))[1]["grid"][0]


def check_far(core: ModuleType, name: str, size: int, dtype: torch.dtype) -> None:
    written, call = OPERATORS[name]
    values = near_problem(size, dtype)
    front = -(-FAR // size // TOGETHER) * TOGETHER
    found = []
    for spoilt in (False, True):
        if spoilt:
            values["gram"][2, 0] = values["inverse"][2, 0] = float("nan")
        near = Problem(core, size, values, 0)
        far = Problem(core, size, values, front)
        call(core, near)
        first = thread_blocks(core, call, far) - thread_blocks(core, call, near)
        core.set_thread_blocks(first, 2**40)
        try:
            call(core, far)
        finally:
            core.set_thread_blocks(0, 2**64 - 1)
        for output in written:
            expected = near.tensors[output]
            actual = far.tensors[output][-len(expected) :]
            torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
            assert spoilt or not torch.equal(expected, values[output].flatten()), "was written"
        failed = near.status.item()
        assert far.status.item() == (failed if failed < 0 else front + failed)
        found.append(failed)
    assert found == [-1, -1 if name == "gram" else 2]


# Teams of a part of a warp, of two warps, and of four; compiled for the size, and general.
@pytest.mark.parametrize(("size", "dtype"), [
    (4, torch.bfloat16), (50, torch.float32), (20, torch.float64), (100, torch.float16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", OPERATORS)
def test_far_is_as_near(cuda_on_host, name, size, dtype):
    check_far(cuda_on_host, name, size, dtype)


def test_a_gram_of_more_tiles_than_threads_lies_far(cuda_on_host):
    check_far(cuda_on_host, "gram", 130, torch.float32)


# ---- gradients and tables, on every processor ----------------------------------------

APART = 2**31 + 5  # elements
HERE = pytest.mark.parametrize("isa", [*INSTRUCTION_SETS, CUDA_ON_HOST], indirect=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [4, 20, 50])
@HERE
def test_gradients_lie_any_distance_apart(isa, size, dtype):
    n = 3 * size - 1
    g = gradients(3, n, dtype=dtype)
    far = reserved(2 * APART + n, dtype).as_strided((3, n), (APART, 1))
    far.copy_(g)
    results = []
    for rows in (g, far):
        gram, inverse = gram_of(torch.zeros(1, n), size), fresh_inverse(3, size)
        status = ops.new_status()
        ops.gram_accumulate(gram, rows, size)
        ops.woodbury_update(inverse, rows, 3.0, status)
        living = torch.zeros_like(gram)
        place = torch.arange(4) * size
        source = torch.arange(n, dtype=torch.int32)
        place[-1] = n
        starts = torch.arange(3) * gram.shape[1]
        gram_accumulate_living(living.view(-1), rows, starts, place, source)
        assert status.item() == -1 and gram.any()
        results.append((gram, inverse, living))
    for near, away in zip(*results, strict=True):
        assert torch.equal(near, away)


@pytest.mark.parametrize("size", [3, 20, 50])
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
@HERE
def test_living_weights_may_stand_anywhere(isa, size, gram_dtype):
    """Grams, places and weights far behind in their tables; many blocks in front that are empty."""
    entries, n = size * (size + 1) // 2, 2 * size
    g = gradients(4, n)
    tables = torch.arange(2) * entries, torch.arange(3) * size, torch.arange(n, dtype=torch.int32)
    near = torch.zeros(2 * entries, dtype=gram_dtype)
    gram_accumulate_living(near, g, *tables)
    last = 2**31 - 1 - n  # the first of the weights, an int32
    far = reserved(FAR + 2 * entries, gram_dtype)
    rows = reserved(4 * (last + n), torch.float32).view(4, -1)
    rows[:, last:] = g
    source = reserved(FAR + n, torch.int32)
    source[FAR:] = tables[2] + last
    gram_accumulate_living(far, rows, tables[0] + FAR, tables[1] + FAR, source)
    assert near.any() and torch.equal(far[FAR:], near)


def test_living_blocks_beyond_32_bits(cuda_on_host):
    size, blocks = 20, 2**33
    entries, n = size * (size + 1) // 2, 2 * size
    g, gram = gradients(4, n), torch.zeros(2 * entries)
    tables = torch.arange(2) * entries, torch.arange(3) * size, torch.arange(n, dtype=torch.int32)
    gram_accumulate_living(gram, g, *tables)
    far = torch.zeros_like(gram)
    starts, places = reserved(blocks - 8, torch.int64), reserved(blocks - 7, torch.int64)
    starts[-2:], places[-3:] = tables[0], tables[1]
    cuda_on_host.set_thread_blocks((blocks - 8) // 4 - 1, 1)
    try:
        gram_accumulate_living(far, g, starts, places, tables[2])
    finally:
        cuda_on_host.set_thread_blocks(0, 2**64 - 1)
    assert torch.equal(far, gram) and gram.any()
