"""Every operator against the float64 oracle, on the device that is about to be timed."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.kernels.gpu.kernels import pattern_for
from obert_kernels import ops
from obert_kernels.ops import reference
from obert_kernels.ops.packing import gram_shape

DAMPING = 1e-4
SCALE = 1e-2  # with that damping: condition numbers below 1e3, as in tests/ops/test_ops.py
GRADIENTS = 40
# Largest error over largest value.  Work in float64 is good to condition x B x epsilon.
FLOAT64 = 1e-10
FLOAT32 = 1e-6  # float64 work rounded to float32
WOODBURY = 1e-4  # a float32 recursion


_REFUSED = "bytes of shared memory"  # in the message of csrc/pruning/cuda/launch.h, require_fits


class Mismatch(Exception):
    """An operator does not give what the oracle gives."""


@dataclass(frozen=True)
class Check:
    """A result, what it should be, and how far it may be off."""

    what: str
    actual: Tensor
    expected: Tensor
    allowed: float

    def error(self) -> float:
        """Largest error over the largest expected value; infinite where anything is NaN, or the
        shapes differ."""
        if self.actual.shape != self.expected.shape:
            return float("inf")
        if not bool(self.actual.isfinite().all()):
            return float("inf")
        scale = self.expected.double().abs().max().clamp_min(1e-300)
        return float((self.actual.double() - self.expected.double()).abs().max() / scale)


def is_refusal(error: ValueError) -> bool:
    """Whether this device has too little shared memory for the block size: no mistake."""
    return _REFUSED in str(error)


@contextlib.contextmanager
def unless_refused() -> Iterator[None]:
    """What follows is left out where the device refuses the block size."""
    try:
        yield
    except ValueError as error:
        if not is_refusal(error):
            raise


def correlated_gradients(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    shared = torch.randn(n, device=device)
    own = torch.randn(GRADIENTS, n, device=device)
    return ((torch.randn(GRADIENTS, 1, device=device) * shared + own) * SCALE).to(dtype)


def empty_gram(n: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros(gram_shape(n, size), dtype=dtype, device=device)


def accumulation_checks(g: Tensor, size: int) -> Iterator[Check]:
    """The Gram in both types and the Woodbury recursion, from the same gradients."""
    n, device = g.shape[1], g.device
    exact = empty_gram(n, size, torch.float64, device)
    reference.gram_accumulate(exact, g.double(), size)
    before = torch.randn_like(exact, dtype=torch.float32).double() * exact.abs().mean()
    for dtype in (torch.float32, torch.float64):
        gram, plain = before.to(dtype, copy=True), before.to(dtype, copy=True)
        expected = gram.double() + exact
        # Sums in float32 depend on their order: as good as torch's own, with some room.
        reference.gram_accumulate(plain, g.to(dtype), size)
        own_error = Check("", plain, expected, 0).error()
        floor = FLOAT64 if dtype == torch.float64 else FLOAT32
        with unless_refused():
            ops.gram_accumulate(gram, g, size)
            yield Check(f"gram_accumulate {dtype}", gram, expected, 4 * own_error + floor)
        yield living_check(g, size, dtype, 4 * own_error + floor)
    status = ops.new_status(device)
    state = empty_gram(n, size, torch.float32, device)
    state[:, :size] = 1.0 / DAMPING  # packed: the diagonal comes first
    ops.woodbury_update(state, g, float(GRADIENTS), status)
    expected = reference.gram_inverse(
        exact, n, size, float(GRADIENTS), DAMPING, torch.float64, status
    )
    yield Check("woodbury_update", state, expected, WOODBURY)
    yield status_check("woodbury_update", status)


def living_check(g: Tensor, size: int, dtype: torch.dtype, allowed: float) -> Check:
    """The Gram of blocks of all sizes from a size down, with places where no weight stands."""
    n, device = g.shape[1], g.device
    sizes = size - torch.arange(n // size, device=device) % (size + 1)
    first_place = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
    source = torch.randperm(n, device=device)[: int(first_place[-1])].int()
    source[torch.rand(source.shape, device=device) < 0.1] = -1
    triangles = sizes * (sizes + 1) // 2
    tables = (triangles.cumsum(0) - triangles, first_place, source)
    gram = torch.randn(int(triangles.sum()), dtype=dtype, device=device) * SCALE**2
    expected = gram.double().clone()  # of float64 it is the Gram itself
    ops.gram_accumulate_living(gram, g, *tables)
    reference.gram_accumulate_living(expected, g, *tables)
    return Check(f"gram_accumulate_living {dtype}", gram, expected, allowed)


def status_check(what: str, status: Tensor) -> Check:
    return Check(f"status of {what}", status, torch.full_like(status, -1), 0)


def gram_checks(gram: Tensor, n: int, size: int, group: int) -> Iterator[Check]:
    """What is computed from a Gram."""
    status = ops.new_status(gram.device)
    fisher = (size, float(GRADIENTS), DAMPING)
    for name in ("gram_inverse", "gram_diagonal"):
        for dtype, allowed in ((torch.float32, FLOAT32), (torch.float64, FLOAT64)):
            yield from compare(name, (gram, n, *fisher, dtype, status), allowed)
    for weight, keep, allowed in weights_and_masks(n, group, gram.device):
        yield from compare("gram_solve", (gram, weight, *fisher, status), allowed)
        yield from compare("gram_scores", (gram, weight, group, *fisher, status), FLOAT32)
        arguments = (gram, weight, keep, group, *fisher, status)
        yield from compare("gram_greedy_scores", arguments, FLOAT32)
        if (pattern := pattern_for(size)) and n % pattern[1] == 0:
            yield from compare("gram_n_of_m", (gram, weight, keep, *pattern, *fisher, status), 0)
        for joint in (False, True):
            arguments = (gram, weight, keep, group, joint, *fisher, status)
            yield from compare("gram_update", arguments, allowed)
    yield status_check("operators on the Gram", status)


def inverse_checks(gram: Tensor, n: int, size: int, group: int) -> Iterator[Check]:
    """What is computed from an inverse that exists."""
    status = ops.new_status(gram.device)
    inverse = reference.gram_inverse(
        gram, n, size, float(GRADIENTS), DAMPING, torch.float32, status
    )
    for weight, keep, allowed in weights_and_masks(n, group, gram.device):
        yield from compare("inverse_scores", (inverse, weight, group, status), FLOAT32)
        for joint, with_increase in itertools.product((False, True), repeat=2):
            arguments = (inverse, weight, keep, group, joint, with_increase, status)
            yield from compare("inverse_update", arguments, allowed)
    yield status_check("operators on the inverse", status)


def fit_checks(size: int, device: torch.device) -> Iterator[Check]:
    """Supports that fit in shared memory and that do not; rows that share one, and none."""
    columns = size + 70  # more than a tile
    inputs = torch.randn(2 * columns, columns, dtype=torch.float64, device=device)
    moments = inputs.T @ inputs / columns
    moments.diagonal().add_(DAMPING)
    places = torch.rand(6, columns, device=device).argsort(dim=1)
    sizes = torch.tensor([0, 1, 64, 65, size, columns], device=device)
    keep = places < sizes[:, None]
    first_row = torch.tensor([0, 1, 1, 6, 7, 8, 17], device=device)
    targets = torch.randn(17, columns, dtype=torch.float64, device=device)
    status = ops.new_status(device)
    yield from compare("fit_rows", (moments, targets, keep, first_row, status), FLOAT64)
    yield status_check("fit_rows", status)


def weights_and_masks(
    n: int, group: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Of both types; and how far what has the type of the weights may be off."""
    for dtype, allowed in ((torch.float64, FLOAT64), (torch.float32, FLOAT32)):
        keep = (torch.rand(n // group, device=device) < 0.4).repeat_interleave(group)
        yield torch.randn(n, dtype=dtype, device=device), keep, allowed


def compare(name: str, arguments: tuple, allowed: float) -> Iterator[Check]:
    """Every result of an operator; nothing where the device refuses the block size."""
    with unless_refused():
        actual = getattr(ops, name)(*arguments)
        expected = getattr(reference, name)(*arguments)
        if isinstance(actual, Tensor):
            actual, expected = (actual,), (expected,)
        for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            if theirs.numel() > 0:  # an increase that was not asked for is empty
                yield Check(f"{name}, result {index}", ours, theirs, allowed)


def checks(
    size: int, blocks: int, gradient_type: torch.dtype, device: torch.device
) -> Iterator[Check]:
    """All operators, with a short last block, for single weights and groups of four."""
    multiple_of_four = (blocks * size + size // 3) // 4 * 4
    for n, group in ((multiple_of_four, 4), (multiple_of_four + 1, 1)):
        g = correlated_gradients(n, gradient_type, device)
        yield from accumulation_checks(g, size)
        for gram_type in (torch.float32, torch.float64):
            gram = empty_gram(n, size, gram_type, device)
            reference.gram_accumulate(gram, g.to(gram_type), size)
            yield from gram_checks(gram, n, size, group)
        yield from inverse_checks(gram, n, size, group)
    yield from fit_checks(size, device)


def validate(
    block_sizes: tuple[int, ...],
    gradient_types: tuple[torch.dtype, ...],
    blocks: int,
    device: torch.device,
) -> int:
    """Run all checks; return their number.

    Raises:
        Mismatch: a result is further from the oracle than its type explains.
    """
    torch.manual_seed(0)
    count = 0
    for size in block_sizes:
        for gradient_type in gradient_types:
            for check in checks(size, blocks, gradient_type, device):
                error = check.error()
                if not error <= check.allowed:
                    raise Mismatch(
                        f"{check.what} at block size {size}, {gradient_type} gradients: relative "
                        f"error {error:.1e}, allowed {check.allowed:.1e}; nothing was timed"
                    )
                count += 1
    return count
