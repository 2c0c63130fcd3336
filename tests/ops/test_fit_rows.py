"""Row systems on supports against the oracle, on every instruction set."""

import pytest
import torch
from devices import INSTRUCTION_SETS
from problems import relative_error
from torch import Tensor

from obert_kernels import ops
from obert_kernels.ops import native, reference


def moments_of(n: int, ridge: float = 0.1) -> Tensor:
    inputs = torch.randn(2 * n + 4, n, dtype=torch.float64)
    return inputs.T @ inputs / len(inputs) + ridge * torch.eye(n, dtype=torch.float64)


def supports_of(n: int, sizes: list[int]) -> Tensor:
    keep = torch.zeros(len(sizes), n, dtype=torch.bool)
    for row, size in zip(keep, sizes, strict=True):
        row[torch.randperm(n)[:size]] = True
    return keep


def problem(n: int, sizes: list[int], rows: list[int]) -> tuple[Tensor, ...]:
    first_row = torch.tensor([0, *rows]).cumsum(0)
    targets = torch.randn(int(first_row[-1]), n, dtype=torch.float64)
    return moments_of(n), targets, supports_of(n, sizes), first_row


def both(arguments: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, int]:
    """What the kernel and the oracle give, and the status, which is the same."""
    status, expected_status = ops.new_status(), ops.new_status()
    fitted = ops.fit_rows(*arguments, status)
    expected = reference.fit_rows(*arguments, expected_status)
    assert status.item() == expected_status.item()
    return fitted, expected, int(status.item())


# Every size up to a few tiles and panels of all widths, and those around the blocks of columns.
SMALL, LARGE = list(range(77)), [95, 96, 97, 98, 119, 120, 121, 191, 192, 193, 200]


@pytest.mark.parametrize("rows", [1, 2, 7, 24, 61])
def test_every_size_and_number_of_rows(isa, rows):
    sizes = SMALL + LARGE if rows < 24 else [1, 5, 23, 24, 25, 40, 48, 97]
    arguments = problem(200, sizes, [rows] * len(sizes))
    fitted, expected, status = both(arguments)
    assert status == -1
    torch.testing.assert_close(fitted, expected, rtol=1e-10, atol=1e-12)
    pruned = ~arguments[2].repeat_interleave(rows, 0)
    assert (fitted[pruned] == 0).all()


def test_supports_have_any_number_of_rows(isa):
    arguments = problem(60, [60, 10, 0, 35, 60], [3, 0, 4, 26, 1])
    fitted, expected, _ = both(arguments)
    torch.testing.assert_close(fitted, expected, rtol=1e-10, atol=1e-12)
    assert (fitted[3:7] == 0).all()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_many_columns(name):
    """Several blocks of columns, and rows in panels of their own."""
    before = native.core().current_instruction_set()
    native.core().select_instruction_set(name)
    fitted, expected, _ = both(problem(400, [400, 288, 301], [30, 1, 2]))
    native.core().select_instruction_set(before)
    torch.testing.assert_close(fitted, expected, rtol=1e-10, atol=1e-12)


def test_ill_conditioned(isa):
    """The residual is that of a stable method, the solution as good as the condition allows."""
    n = 64
    basis = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))[0]
    values = torch.logspace(0, -10, n, dtype=torch.float64)
    moments = (basis * values) @ basis.T
    moments = (moments + moments.T) / 2
    targets = torch.randn(3, n, dtype=torch.float64)
    keep = torch.ones(1, n, dtype=torch.bool)
    status = ops.new_status()
    fitted = ops.fit_rows(moments, targets, keep, torch.tensor([0, 3]), status)
    assert status.item() == -1
    scale = fitted.norm() * torch.linalg.matrix_norm(moments, 2) + targets.norm()
    assert (fitted @ moments - targets).norm() < 10 * n * 2**-53 * scale
    expected = reference.fit_rows(moments, targets, keep, torch.tensor([0, 3]), ops.new_status())
    assert relative_error(fitted, expected) < 10 * n * 2**-53 * 1e10


def failing(n: int, how: str) -> tuple[tuple[Tensor, ...], int]:
    """Four supports, of which those with column 3 fail, and the first of these."""
    moments, targets, keep, first_row = problem(n, [n // 2] * 4, [2] * 4)
    keep[:, 3] = torch.tensor([False, True, False, True])
    keep[:, 5] = True
    if how == "indefinite":
        moments[3, 3] = -1.0
    elif how == "singular":
        moments[3], moments[:, 3] = moments[5], moments[:, 5]
        moments[3, 3] = moments[5, 5]
    elif how == "zero":
        moments[3], moments[:, 3] = 0.0, 0.0
    else:
        moments[3, 3] = float(how)
    return (moments, targets, keep, first_row), 1


@pytest.mark.parametrize("how", ["indefinite", "singular", "zero", "nan", "inf"])
@pytest.mark.parametrize("n", [12, 80, 230])
def test_a_support_that_fails(isa, n, how):
    """Its rows are zero and it is recorded; the others are not touched by it."""
    arguments, first = failing(n, how)
    fitted, expected, status = both(arguments)
    assert status == first
    assert (fitted[[2, 3, 6, 7]] == 0).all()
    torch.testing.assert_close(fitted, expected, rtol=1e-10, atol=1e-12)
    assert fitted[[0, 1, 4, 5]].any(1).all()


def test_an_earlier_failure_stays_recorded(isa):
    arguments, _ = failing(20, "indefinite")
    status = torch.zeros(1, dtype=torch.int64)
    ops.fit_rows(*arguments, status)
    assert status.item() == 0


def test_a_row_of_nan_spoils_no_other_row(isa):
    moments, targets, keep, first_row = problem(50, [33, 50], [3, 40])
    clean = ops.fit_rows(moments, targets, keep, first_row, ops.new_status())
    targets[1], targets[20] = float("nan"), float("inf")
    fitted = ops.fit_rows(moments, targets, keep, first_row, ops.new_status())
    good = torch.ones(43, dtype=torch.bool)
    good[[1, 20]] = False
    assert torch.equal(fitted[good], clean[good])
    assert not fitted[1, keep[0]].isfinite().any()


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_number_of_threads_does_not_matter(name):
    """Bit for bit."""
    arguments = problem(130, [1, 130, 64, 97, 30, 0, 111] * 5, [1, 2, 30, 1, 1, 1, 4] * 5)
    before, threads = native.core().current_instruction_set(), torch.get_num_threads()
    native.core().select_instruction_set(name)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.fit_rows(*arguments, ops.new_status()))
    torch.set_num_threads(threads)
    native.core().select_instruction_set(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_other_strides(isa):
    moments, targets, keep, first_row = problem(40, [20, 33], [2, 2])
    expected = ops.fit_rows(moments, targets, keep, first_row, ops.new_status())
    fitted = ops.fit_rows(
        moments.T, targets.T.contiguous().T, keep.T.contiguous().T, first_row, ops.new_status()
    )
    torch.testing.assert_close(fitted, expected, rtol=1e-12, atol=1e-14)


def test_what_an_argument_should_be():
    moments, targets, keep, first_row = problem(8, [4, 6], [1, 2])
    status = ops.new_status()
    with pytest.raises(TypeError, match="moments must be one of float64"):
        ops.fit_rows(moments.float(), targets, keep, first_row, status)
    with pytest.raises(ValueError, match=r"moments must have shape \(8, 8\)"):
        ops.fit_rows(moments[:7], targets, keep, first_row, status)
    with pytest.raises(ValueError, match=r"first_row must have shape \(3,\)"):
        ops.fit_rows(moments, targets, keep, first_row[:2], status)
    for wrong in ([0, 4, 3], [0, 1, 4], [1, 1, 3], [-1, 1, 3]):
        with pytest.raises(ValueError, match="first_row must rise from 0 to the 3 rows"):
            ops.fit_rows(moments, targets, keep, torch.tensor(wrong), status)


def test_no_supports_and_no_rows_are_no_work(isa):
    fitted, expected, status = both(problem(5, [], []))
    assert fitted.shape == expected.shape == (0, 5) and status == -1
