"""The interpreted PTX of fit_rows against the oracle: in shared memory, and in workspaces."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from problems import relative_error
from ptx import Program, PtxError
from ptx_replay import ARCHITECTURES, NVCC, off_border, program_of_changed, replay
from test_cuda_fit_rows import Problem, problem

from obert_kernels import ops
from obert_kernels.ops import fit, reference

pytestmark = [pytest.mark.slow, NVCC]


def check(
    host: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    given: Problem,
    count: int,
    failed: int = -1,
    architectures: tuple[int, ...] = ARCHITECTURES,
    changed: Program | None = None,
) -> None:
    """The operator with so many workspaces."""
    moments, targets, keep, first_row = given
    shape = count, fit.workspace_shape(len(moments), count, count)[1]
    workspace = torch.full(shape, float("nan"), dtype=torch.float64)
    monkeypatch.setattr(fit, "_workspaces", lambda targets: workspace)
    status = ops.new_status()
    expected = reference.fit_rows(*given, status)
    assert status.item() == failed
    arguments = (moments, targets, keep, first_row, workspace, status)
    call = lambda: ops.fit_rows(*given, status)  # noqa: E731
    for fitted in replay(host, call, *arguments, architectures=architectures, changed=changed):
        assert relative_error(fitted, expected) < 1e-12
        assert status.item() == failed


@pytest.mark.parametrize("n, sizes, rows", [
    (1, [1, 0], [1, 1]),
    (37, [37, 20, 0, 5], [1, 9, 1, 2]),
    (64, [64, 63, 33], [8, 1, 1]),
])  # fmt: skip
def test_supports_that_fit_in_shared_memory(cuda_on_host, monkeypatch, n, sizes, rows):
    check(cuda_on_host, monkeypatch, problem(n, sizes, rows), 1)


@pytest.mark.parametrize("n, sizes, rows, count, architectures", [
    (65, [65, 0, 64], [1, 1, 1], 1, ARCHITECTURES),
    (130, [130, 65, 20], [1, 9, 1], 1, ARCHITECTURES[:1]),
    (100, [100, 66], [1, 17], 4, ARCHITECTURES[1:]),
])  # fmt: skip
def test_supports_in_workspaces(cuda_on_host, monkeypatch, n, sizes, rows, count, architectures):
    check(cuda_on_host, monkeypatch, problem(n, sizes, rows), count, architectures=architectures)


def test_tensors_begin_anywhere(cuda_on_host, monkeypatch):
    moments, targets, keep, first_row = problem(71, [70, 33], [2, 3])
    given = (off_border(moments, 1), off_border(targets, 1), off_border(keep, 5), first_row)
    check(cuda_on_host, monkeypatch, given, 2, architectures=ARCHITECTURES[1:])


@pytest.mark.parametrize("n, at", [(20, 7), (100, 64), (100, 3)])
def test_a_failed_support(cuda_on_host, monkeypatch, n, at):
    given = problem(n, [n, n, n], [1, 2, 1])
    given[2][0, at], given[0][at, at] = False, -1.0
    check(cuda_on_host, monkeypatch, given, 1, failed=1, architectures=ARCHITECTURES[:1])


@pytest.mark.parametrize("file", ["fit_rows.cu", "register_tile.cuh"])
def test_without_its_barriers_it_is_called_a_race(cuda_on_host, monkeypatch, tmp_path, file):
    changed = program_of_changed(tmp_path, "fit_rows", file, "__syncthreads();", "")
    with pytest.raises(PtxError, match=r"race|nobody wrote"):
        check(cuda_on_host, monkeypatch, problem(70, [70, 20], [1, 1]), 1, changed=changed)
