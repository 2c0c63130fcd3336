"""The CUDA kernel of fit_rows, executed on the host: workspaces, launches, failures, traffic.

That its results are right for all that an operator takes is tested with the other processors in
tests/ops; here it is where thread blocks take several supports, and supports several thread blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from problems import onto_nan, relative_error
from reserved_memory import reserved
from test_cuda_barriers import build_without
from torch import Tensor

from benchmarks.kernels import occupancy
from obert_kernels import ops
from obert_kernels.ops import fit, native, reference

TILE = 64
TOGETHER = 4  # rows
SIZES = [0, 1, 31, 63, 64, 65, 127, 128, 129, 192, 193, 200]
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(n: int, sizes: list[int], rows: list[int]) -> Problem:
    """Moments, targets, supports of these sizes, and where their rows begin."""
    inputs = torch.randn(2 * n, n, dtype=torch.float64)
    moments = inputs.T @ inputs / (2 * n) + 0.01 * torch.eye(n, dtype=torch.float64)
    keep = torch.zeros(len(sizes), n, dtype=torch.bool)
    for support, size in enumerate(sizes):
        keep[support, torch.randperm(n)[:size]] = True
    first_row = torch.tensor([0, *rows]).cumsum(0)
    targets = torch.randn(int(first_row[-1]), n, dtype=torch.float64)
    return moments, targets, keep, first_row


@pytest.fixture
def workspaces(monkeypatch) -> Callable[[int, int], Tensor]:
    """Gives the operator so many workspaces for n columns, full of NaN."""

    def give(n: int, count: int) -> Tensor:
        shape = count, fit.workspace_shape(n, count, count)[1]
        workspace = torch.full(shape, float("nan"), dtype=torch.float64)
        monkeypatch.setattr(fit, "_workspaces", lambda targets: workspace)
        return workspace

    return give


def expected_of(given: Problem) -> Tensor:
    status = ops.new_status()
    expected = reference.fit_rows(*given, status)
    assert status.item() == -1
    return expected


@pytest.mark.parametrize("count", [1, 3, 40])
def test_every_size_of_supports(cuda_on_host, workspaces, count):
    """Several supports for a thread block, or several thread blocks for the rows of one."""
    rows = [1 + i % 3 * 4 for i in range(len(SIZES))]
    given = problem(200, SIZES, rows)
    workspaces(200, count)
    results = []
    for seed in range(2):
        cuda_on_host.set_seed(seed)
        status = ops.new_status()
        results.append(onto_nan(ops.fit_rows, *given, status))
        assert status.item() == -1
    assert relative_error(results[0], expected_of(given)) < 1e-12
    assert all(torch.equal(results[0], other) for other in results)
    outside = ~given[2].repeat_interleave(given[3].diff(), dim=0)
    assert not results[0][outside].any()


@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 129, 300])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 9])
def test_rows_that_share_a_support(cuda_on_host, n, rows):
    """One thread block has all of them, or four at a time; with the workspaces of a device."""
    for supports in (1, 3):
        given = problem(n, [n, n // 2, n][:supports], [rows, 1, 2 * rows][:supports])
        found = onto_nan(ops.fit_rows, *given, ops.new_status())
        assert relative_error(found, expected_of(given)) < 1e-12


def test_columns_and_rows_may_be_none(cuda_on_host):
    for n, sizes, rows in ((5, [3, 2], [0, 2]), (0, [0], [2]), (70, [70], [0])):
        given = problem(n, sizes, rows)
        found = onto_nan(ops.fit_rows, *given, ops.new_status())
        torch.testing.assert_close(found, expected_of(given))
    assert ops.fit_rows(*problem(5, [], []), ops.new_status()).shape == (0, 5)


# ---- failures ------------------------------------------------------------------------


@pytest.mark.parametrize("at", [0, 40, 63, 64, 100, 129])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, "copy"])
def test_a_failed_support_is_zero_and_recorded(cuda_on_host, workspaces, at, value):
    """Its pivot breaks down in the first tile, at its borders, or in a later one."""
    n = 130
    moments, targets, keep, first_row = problem(n, [130, 60, 0, 130, 50], [2, 1, 1, 9, 3])
    keep[:, at] = False
    keep[3] = keep[4, at] = True
    keep[0, at] = False
    if value == "copy":  # as good as another column: the pivot is what rounding leaves
        other = (at + 7) % n
        keep[4, other] = True
        moments[at], moments[:, at] = moments[other].clone(), moments[other].clone()
        moments[at, at] = moments[other, other]
    else:
        moments[at, at] = value
    given = moments, targets, keep, first_row
    status = ops.new_status()
    expected = reference.fit_rows(*given, status)
    assert status.item() == 3 and not expected[4:].any()
    workspaces(n, 2)
    for seed in range(3):
        cuda_on_host.set_seed(seed)
        status = ops.new_status()
        found = onto_nan(ops.fit_rows, *given, status)
        assert status.item() == 3
        assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("n", [40, 70])
def test_a_pivot_must_exceed_what_rounding_explains(cuda_on_host, n):
    epsilon = torch.finfo(torch.float64).eps
    for more, expected in ((n * epsilon / 2, 0), (4 * n * epsilon, -1), (1e-9, -1)):
        moments = 16.0 * torch.eye(n, dtype=torch.float64)
        moments[3, n - 2] = moments[n - 2, 3] = 16.0
        moments[n - 2, n - 2] += 16.0 * more
        keep, first_row = torch.ones(1, n, dtype=torch.bool), torch.tensor([0, 1])
        status = ops.new_status()
        ops.fit_rows(moments, torch.ones(1, n).double(), keep, first_row, status)
        assert status.item() == expected


@pytest.mark.parametrize("place", [(129, 3), (100, 70), (40, 3)])
def test_nan_beside_the_diagonal_fails_a_support(cuda_on_host, place):
    moments, targets, keep, first_row = problem(130, [130, 128], [1, 1])
    keep[1] = True
    keep[1, place[0]] = False
    moments[place] = moments[place[::-1]] = float("nan")
    status = ops.new_status()
    found = onto_nan(ops.fit_rows, moments, targets, keep, first_row, status)
    assert status.item() == 0
    assert not found[0].any() and found[1][keep[1]].all()


def test_nobody_looks_at_what_is_not_in_a_support(cuda_on_host):
    moments, targets, keep, first_row = problem(140, [70, 30], [1, 1])
    keep[1] &= keep[0]
    expected = expected_of((moments, targets, keep, first_row))
    gone = ~keep[0]
    moments[gone], moments[:, gone], targets[:, gone] = (float("nan"),) * 3
    status = ops.new_status()
    found = onto_nan(ops.fit_rows, moments, targets, keep, first_row, status)
    assert status.item() == -1 and relative_error(found, expected) < 1e-12


def call_native(module, given: Problem, fitted: Tensor, workspace: Tensor, status: Tensor) -> None:
    moments, targets, keep, first_row = given
    module.fit_rows(
        0, num_supports=len(keep), num_rows=len(targets), num_columns=len(moments),
        moments=moments.data_ptr(), targets=targets.data_ptr(), keep=keep.data_ptr(),
        first_row=first_row.data_ptr(), workspace=workspace.data_ptr(),
        num_workspaces=workspace.shape[0], workspace_size=workspace.shape[1],
        fitted=fitted.data_ptr(), status=status.data_ptr(),
    )  # fmt: skip


def test_rows_outside_of_the_targets_are_left_out(cuda_on_host, workspaces):
    """A device is not waited for, so that nobody has looked at first_row."""
    given = problem(70, [66, 20], [2, 2])
    expected = expected_of(given)
    given[3].copy_(torch.tensor([-5, 2, 40]))
    fitted = torch.full((9, 70), float("nan"), dtype=torch.float64)
    call_native(cuda_on_host, given, fitted[2:6], workspaces(70, 1), ops.new_status())
    assert relative_error(fitted[2:6], expected) < 1e-12
    assert fitted[:2].isnan().all() and fitted[6:].isnan().all()


# ---- workspaces and launches ---------------------------------------------------------


def place_size(support: int) -> int:
    tiles = math.ceil(support / TILE)
    return TILE**2 * tiles * (tiles + 1) // 2 + (TOGETHER * TILE + TILE // 2) * tiles


def test_workspaces_by_hand():
    assert fit.workspace_shape(64, 1000, 100) == (0, 0)
    assert fit.workspace_shape(65, 1000, 100) == (100, 3 * 4096 + 2 * 288)
    assert fit.workspace_shape(768, 7, 132) == (7, place_size(768))
    count, size = fit.workspace_shape(3072, 768, 132)
    assert count == 27 and 8 * count * size < 2**30 < 8 * (count + 1) * size
    assert fit.workspace_shape(30_000, 10, 132)[0] == 1


def test_a_device_has_a_workspace_for_each_multiprocessor(monkeypatch):
    device = torch.device("cuda")
    targets = SimpleNamespace(is_cuda=True, device=device, shape=(500, 100), new_empty=list)
    known = {device: SimpleNamespace(multi_processor_count=108)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", known.get)
    assert fit._workspaces(targets) == [108, place_size(100)]


def test_a_workspace_that_is_too_small_is_refused(cuda_on_host):
    given = problem(65, [65], [1])
    fitted, status = torch.empty_like(given[1]), ops.new_status()
    for shape in ((1, place_size(65) - 1), (0, place_size(65))):
        workspace = torch.empty(shape, dtype=torch.float64)
        message = f"fit_rows needs workspaces of {place_size(65)} doubles, got {shape[0]} of"
        with pytest.raises(ValueError, match=message):
            call_native(cuda_on_host, given, fitted, workspace, status)
    call_native(cuda_on_host, given, fitted, torch.empty(1, place_size(65)).double(), status)
    assert relative_error(fitted, expected_of(given)) < 1e-12


@pytest.mark.parametrize(
    ("n", "supports", "rows", "count", "expected"),
    [
        (64, 9, 9, 0, [9]),
        (65, 9, 9, 4, [9, 4]),
        (300, 9, 9, 2, [9, 9, 2, 2]),
        (300, 99, 99, 4, [99, 19, 5, 4]),  # smaller places, more of them
        (300, 2, 100, 9, [8, 8, 8, 8]),  # four thread blocks for the rows of a support
        (300, 2, 9, 9, [4, 4, 4, 4]),  # five and four
        (300, 1, 24, 9, [6, 6, 6, 6]),  # six have four rows each
        (300, 0, 0, 1, []),
    ],
)
def test_launches_by_size_of_support(cuda_on_host, workspaces, n, supports, rows, count, expected):
    """Supports of 1 to 64 columns, of up to 128, 256, ..: a thread block for each that has room."""
    given = problem(n, [0] * supports, [(rows + i) // supports for i in range(supports)])
    workspaces(n, count)
    launches = occupancy.record_all(
        cuda_on_host, lambda: ops.fit_rows(*given, ops.new_status())
    )[1]  # fmt: skip
    assert [launch["grid"] for launch in launches] == [(blocks, 1, 1) for blocks in expected]
    for index, launch in enumerate(launches):
        assert launch["block"] == (256, 1, 1)
        assert launch["shared_bytes"] <= 64 * 1024, "compute 7.5 has no more"
        assert f"fit_rows_kernel<{str(index == 0).lower()}>" in launch["kernel"]


def test_no_launch_has_more_than_2_31_thread_blocks(cuda_on_host):
    """Each goes on with further supports; addresses are 0, and nothing runs."""
    nowhere = dict.fromkeys(("moments", "targets", "keep", "first_row", "fitted", "status"), 0)
    supports, size = 2**31 + 5, place_size(65)

    def call() -> None:
        cuda_on_host.fit_rows(
            0, num_supports=supports, num_rows=supports, num_columns=65, **nowhere,
            workspace=0, num_workspaces=2**33, workspace_size=size,
        )  # fmt: skip

    launches = occupancy.record_all(cuda_on_host, call)[1]
    assert [launch["grid"][0] for launch in launches] == [2**31 - 1] * 2


def test_launches_go_to_the_callers_stream_and_can_be_run_again(cuda_on_host, workspaces):
    given, status = problem(200, SIZES, [1] * len(SIZES)), ops.new_status()
    workspaces(200, 2)
    expected = ops.fit_rows(*given, status)
    cuda_on_host.set_recording(True)
    try:
        with native.using(cuda_on_host, 0x5EED):
            fitted = ops.fit_rows(*given, status)
        assert cuda_on_host.launch_streams() == [0x5EED] * 3
        for _ in range(2):
            fitted.fill_(float("nan"))
            cuda_on_host.replay()
            assert torch.equal(fitted, expected)
    finally:
        cuda_on_host.set_recording(False)


def test_offsets_beyond_32_bits(cuda_on_host):
    """Of moments, masks, targets, results and the workspace; the columns are the last."""
    near = problem(70, [70, 20, 66], [1, 1, 1])
    expected = expected_of(near)
    n, supports = 66_000, 200_000
    moments = reserved(n * n, torch.float64).view(n, n)
    moments[-70:, -70:] = near[0]
    keep = reserved(supports * n, torch.bool).view(-1, n)
    targets, fitted = (reserved(supports * n, torch.float64).view(-1, n) for _ in range(2))
    keep[-3:, -70:], targets[-3:, -70:] = near[2], near[1]
    # Two columns that are as good as equal; whether they are is said of their own diagonal.
    keep[-4, -72:-70] = True
    moments[-72:-70, -72:-70] = 1.0
    moments[-71, -71] += torch.finfo(torch.float64).eps
    fitted[-4:] = float("nan")
    size = place_size(n)
    workspace = reserved(2 * size, torch.float64).view(2, size)
    given, status = (moments, targets, keep, torch.arange(supports + 1)), ops.new_status()
    cuda_on_host.set_recording(True)
    try:
        call_native(cuda_on_host, given, fitted, workspace, status)
        grids = [launch["grid"][0] for launch in cuda_on_host.launches()]
    finally:
        cuda_on_host.set_recording(False)
    # One for each support of up to 128 columns, and the last of them lies beyond 32 bits, too.
    assert grids[0] == grids[1] == supports and supports * place_size(128) > 2**31
    cuda_on_host.set_thread_blocks(supports - 4, 4)
    try:
        with pytest.raises(RuntimeError, match="none of its thread blocks is to run"):
            call_native(cuda_on_host, given, fitted, workspace, status)  # of larger supports
    finally:
        cuda_on_host.set_thread_blocks(0, 2**64 - 1)
    assert status.item() == supports - 4
    assert relative_error(fitted[-3:, -70:], expected) < 1e-12
    assert not fitted[-3:, :-70].any() and not fitted[-4].any()


# ---- traffic -------------------------------------------------------------------------


def traffic_of_a_factor(n: int, s: int) -> tuple[int, int]:
    """Bytes that a support without rows reads and writes."""
    tiles = math.ceil(s / TILE)
    widths = [min(TILE, s - TILE * i) for i in range(tiles)]
    pairs = [(i, j) for j in range(tiles) for i in range(j, tiles)]
    launches = 1 + max(0, math.ceil(math.log2(n / TILE)))
    read = launches * (n + 256 * 16) + n  # masks, and again where they are listed; first_row
    read += 8 * (s + sum(widths[i] * widths[j] for i, j in pairs))  # H, its diagonal once more
    panels = sum(2 * TILE**2 * 8 * (j + (i > j)) for i, j in pairs)
    written = sum(TILE**2 * 8 * (1 + (i > j)) for i, j in pairs)
    lists = 4 * (s + sum(16 * (widths[i] + widths[j]) for i, j in pairs))
    return (read, 0) if tiles < 2 else (read + panels + lists, written + 4 * s)


def traffic_of_rows(n: int, s: int, rows: int) -> tuple[int, int]:
    """Bytes that up to four rows read and write."""
    tiles = math.ceil(s / TILE)
    read, written = 8 * s * rows, 8 * (n + s) * rows
    if tiles < 2:
        return read, written
    vectors = 8 * TOGETHER * TILE
    read += 2 * 4 * s * rows  # columns
    # The vectors pass once for each of 64 outputs, through the nearest cache.
    read += tiles * (tiles + 1) * (TILE**2 * 8 + TILE * vectors)
    read += 2 * (tiles - 1) * vectors + 8 * s * rows
    return read, written + tiles * vectors + 2 * (2 * tiles - 1) * vectors


@pytest.mark.parametrize("s", [1, 64, 65, 128, 150, 300])
def test_traffic_is_that_of_a_blocked_factorisation(cuda_on_host, s):
    """Tiles of the workspace are read s / 64 times, not s times."""
    for rows in (0, 1, 4):
        given = problem(300, [s], [rows])
        cuda_on_host.reset_counters()
        ops.fit_rows(*given, ops.new_status())
        counted = cuda_on_host.counters()
        read, written = traffic_of_a_factor(300, s)
        if rows:
            more = traffic_of_rows(300, s, rows)
            read, written = read + more[0], written + more[1]
        assert (counted["load_bytes"], counted["store_bytes"]) == (read, written)


# ---- barriers ------------------------------------------------------------------------


def results() -> list[Tensor]:
    """A thread block takes several supports, one after the other; some fail."""
    torch.manual_seed(5)
    given = problem(140, [5, 64, 140, 65, 130, 70, 0, 100], [1, 9, 1, 2, 9, 1, 1, 1])
    given[2][:5, 7], given[2][5:, 7] = False, True
    given[0][7, 7] = -1.0
    status = ops.new_status()
    return [ops.fit_rows(*given, status), status]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "occurrence"),
    [
        *(("fit_rows.cu", i) for i in range(6)),
        *(("register_tile.cuh", i) for i in range(3)),
    ],
)
def test_a_removed_barrier_is_found(cuda_on_host, monkeypatch, tmp_path, file, occurrence):
    # What nobody has listed yet is column 0, and what stands outside of a list harms nobody.
    size, margin = fit.workspace_shape(140, 1, 1)[1], 4096
    room = torch.zeros(2 * margin + size, dtype=torch.float64)
    workspace = room[margin:-margin].view(1, size)
    monkeypatch.setattr(fit, "_workspaces", lambda targets: workspace)
    true = results()
    module = build_without(tmp_path, file, "__syncthreads();", occurrence)

    def same(seed: int) -> bool:
        module.set_seed(seed)
        room.zero_()
        try:
            with native.using(module):
                found = results()
        except RuntimeError:  # what the executor says of a deadlock or a stray access
            return False
        return all(torch.equal(a, b) for a, b in zip(found, true, strict=True))

    assert not all(map(same, range(6)))
