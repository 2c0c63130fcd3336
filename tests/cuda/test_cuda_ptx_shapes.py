"""The interpreted PTX of every kernel on odd shapes: blocks of 1 to 65, memory off borders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from problems import DAMPING, fresh_inverse, gradients, gram_of, relative_error
from ptx_replay import ARCHITECTURES, NVCC, off_border, replay
from torch import Tensor

from obert_kernels import ops
from obert_kernels.ops import reference
from obert_kernels.ops.living import gram_accumulate_living
from obert_kernels.ops.packing import num_blocks

pytestmark = [pytest.mark.slow, NVCC]

SIZES = [1, 2, 3, 5, 6, 7, 9, 12, 15, 17, 24, 31, 33, 48, 64, 65]
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
M = 40.0


class Case:
    """A block size, with what else changes from one to the next."""

    def __init__(self, host: ModuleType, size: int) -> None:
        torch.manual_seed(size)
        self.host, self.size = host, size
        index = SIZES.index(size)
        self.architectures = (ARCHITECTURES[index % 2],)
        self.gradient_type = TYPES[index % 4]
        self.weight_type = TYPES[index // 2 % 2]
        self.gram_type = TYPES[(index + 1) % 2]
        self.off = 1 + index % 3  # elements behind a border
        self.group = next(c for c in (3, 4, 2) if c != size)
        # A whole block and a part of one, in several groups.
        self.n = -(-(size + size // 3 + 1) // self.group) * self.group
        self.fisher = (size, M, DAMPING)

    def put(self, tensor: Tensor) -> Tensor:
        return off_border(tensor, self.off % (16 // tensor.itemsize))

    def replay(self, call: Callable[[], Any], *arguments: Tensor) -> Iterator[Any]:
        return replay(self.host, call, *arguments, architectures=self.architectures)

    @property
    def gram(self) -> Tensor:
        return self.put(gram_of(gradients(40, self.n), self.size, self.gram_type))

    @property
    def weight(self) -> Tensor:
        return self.put(torch.randn(self.n, dtype=self.weight_type))

    @property
    def keep(self) -> Tensor:
        return self.put(torch.rand(self.n) < 0.6)


@pytest.fixture(params=SIZES)
def case(request, cuda_on_host) -> Case:
    return Case(cuda_on_host, request.param)


def test_sums_of_gradients(case):
    g = case.put(gradients(3, case.n, 1.0, case.gradient_type))
    start = torch.randn(num_blocks(case.n, case.size), case.size * (case.size + 1) // 2)
    allowed = 1e-6 if case.gram_type == torch.float32 else 1e-14
    gram = case.put(start.to(case.gram_type))
    expected = gram.double() + gram_of(g.double(), case.size)
    for _ in case.replay(lambda: ops.gram_accumulate(gram, g, case.size), gram, g):
        assert relative_error(gram, expected) < allowed

    places = torch.arange(len(gram) + 1) * case.size
    places[-1] = case.n
    tables = (torch.arange(len(gram)) * gram.shape[1], places,
              case.put(torch.arange(case.n, dtype=torch.int32)))  # fmt: skip
    living = case.put(start.flatten().to(case.gram_type))
    call = lambda: gram_accumulate_living(living, g, *tables)  # noqa: E731
    expected = living.double()
    reference.gram_accumulate_living(expected, g.double(), *tables)
    for _ in case.replay(call, living, g, *tables):
        assert relative_error(living, expected) < allowed


def test_woodbury(case):
    g, status = case.put(gradients(3, case.n, 1e-2, case.gradient_type)), ops.new_status()
    inverse = case.put(fresh_inverse(num_blocks(case.n, case.size), case.size))
    expected = inverse.clone()
    reference.woodbury_update(expected, g.float(), 3.0, ops.new_status())
    call = lambda: ops.woodbury_update(inverse, g, 3.0, status)  # noqa: E731
    for _ in case.replay(call, inverse, g, status):
        assert relative_error(inverse, expected) < 1e-4 and status.item() == -1


def check(case: Case, name: str, arguments: tuple, tolerance: float = 3e-7) -> None:
    """An operator whose last argument is the status, against the oracle."""
    status = arguments[-1]
    expected = getattr(reference, name)(*arguments[:-1], ops.new_status())
    tensors = [a for a in arguments if isinstance(a, Tensor)]
    for found in case.replay(lambda: getattr(ops, name)(*arguments), *tensors):
        assert status.item() == -1, name
        for ours, theirs in zip(
            found if isinstance(found, tuple) else [found],
            expected if isinstance(expected, tuple) else [expected],
            strict=True,
        ):
            if ours.dtype == torch.bool:
                assert torch.equal(ours, theirs), name
            elif ours.numel():
                assert relative_error(ours, theirs) < tolerance, name


def test_scores_and_updates(case):
    gram, weight, keep, status = case.gram, case.weight, case.keep, ops.new_status()
    made = (gram, case.n, *case.fisher, case.weight_type, status)
    check(case, "gram_diagonal", made)
    check(case, "gram_inverse", made)
    check(case, "gram_solve", (gram, weight, *case.fisher, status))
    check(case, "gram_scores", (gram, weight, case.group, *case.fisher, status))
    joint = case.size % 2 == 0
    group = 1 if joint else case.group
    check(case, "gram_update", (gram, weight, keep, group, joint, *case.fisher, status))


def test_choices(case):
    gram, weight, keep, status = case.gram, case.weight, case.keep, ops.new_status()
    group = case.group if case.size % 2 else 1
    check(case, "gram_greedy_scores", (gram, weight, keep, group, *case.fisher, status))
    pattern = next((c for c in (4, 2, 3, 5) if case.size % c == 0 and case.n % c == 0), None)
    if pattern:
        arguments = (gram, weight, keep, 1, pattern, *case.fisher, status)
        check(case, "gram_n_of_m", arguments)


def test_given_inverses(case):
    weight, keep, status = case.weight, case.keep, ops.new_status()
    inverse = case.put(
        reference.gram_inverse(
            case.gram.double(), case.n, *case.fisher, torch.float32, ops.new_status()
        )
    )
    check(case, "inverse_scores", (inverse, weight, 1, status))
    check(case, "inverse_scores", (inverse, weight, case.group, status))
    joint = case.size % 2 == 1
    group = 1 if joint else case.group
    check(case, "inverse_update", (inverse, weight, keep, group, joint, joint, status), 1e-6)
