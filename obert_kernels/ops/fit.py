"""The operator that fits rows of weights to targets by least squares on their supports.

``moments`` is ``H`` (float64 ``[n, n]``, symmetric, the ridge already added), ``targets`` float64
``[m, n]``, ``keep`` bool ``[supports, n]``; rows ``first_row[s]`` to ``first_row[s + 1]`` (int64
``[supports + 1]``, from 0 to m; checked on the CPU, as a device is not waited for) have support s.
``status`` is that of :mod:`.gram`: the first support whose system is not positive definite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .checks import check_devices, check_dtype, check_shape, check_status, require
from .registration import operator

_TILE = 64  # rows and columns of a tile in the CUDA kernel
_MOST_BYTES = 1 << 30


def _check(
    moments: Tensor, targets: Tensor, keep: Tensor, first_row: Tensor, status: Tensor
) -> None:
    check_dtype("moments", moments, (torch.float64,))
    check_dtype("targets", targets, (torch.float64,))
    check_dtype("keep", keep, (torch.bool,))
    check_dtype("first_row", first_row, (torch.int64,))
    require(targets.dim() == 2, f"targets must be [m, n], got {tuple(targets.shape)}")
    require(keep.dim() == 2, f"keep must be [supports, n], got {tuple(keep.shape)}")
    rows, columns = targets.shape
    check_shape("moments", moments, (columns, columns))
    check_shape("keep", keep, (len(keep), columns))
    check_shape("first_row", first_row, (len(keep) + 1,))
    check_status(status)
    check_devices(moments=moments, targets=targets, keep=keep, first_row=first_row, status=status)
    if first_row.device.type == "cpu":
        ends = int(first_row[0]), int(first_row[-1])
        require(
            ends == (0, rows) and bool((first_row.diff() >= 0).all()),
            f"first_row must rise from 0 to the {rows} rows of targets",
        )


def workspace_shape(num_columns: int, num_rows: int, processors: int) -> tuple[int, int]:
    """Workspaces of the CUDA kernel and the float64 numbers of each, csrc/pruning/cuda/fit_rows.cu.

    One for each multiprocessor and no more than there are rows, together at most 1 GiB (or one, if
    that is larger).  Each holds the factor of all columns; supports of half of them, or less, find
    room for more thread blocks in the same memory.  Up to 64 columns need none.

    Args:
        num_columns: n.
        num_rows: m.
        processors: multiprocessors of the device.
    """
    if num_columns <= _TILE:
        return 0, 0
    tiles = -(-num_columns // _TILE)
    # Tiles of the lower triangle; for each tile row four vectors, and an int32 for each column.
    size = _TILE**2 * (tiles * (tiles + 1) // 2) + (4 * _TILE + _TILE // 2) * tiles
    return max(1, min(processors, num_rows, _MOST_BYTES // (8 * size))), size


def _workspaces(targets: Tensor) -> Tensor:
    """Memory that the operator needs, ``[workspaces, doubles of each]``; none on the CPU."""
    if native.runs_on_cpu(targets):
        return targets.new_empty((0, 0))
    processors = 1  # where the kernels run on the host
    if targets.is_cuda:
        processors = torch.cuda.get_device_properties(targets.device).multi_processor_count
    rows, columns = targets.shape
    return targets.new_empty(workspace_shape(columns, rows, processors))


@operator(
    "(Tensor moments, Tensor targets, Tensor keep, Tensor first_row, Tensor(a!) status) -> Tensor",
    _check,
    lambda moments, targets, keep, first_row, status: targets.new_empty(targets.shape),
)
def fit_rows(
    moments: Tensor, targets: Tensor, keep: Tensor, first_row: Tensor, status: Tensor
) -> Tensor:
    moments, targets = moments.contiguous(), targets.contiguous()
    keep, first_row = keep.contiguous(), first_row.contiguous()
    fitted = torch.empty_like(targets)
    workspace = _workspaces(targets)
    core, where = native.run_on(moments)
    core.fit_rows(
        where,
        num_supports=len(keep),
        num_rows=targets.shape[0],
        num_columns=targets.shape[1],
        moments=moments.data_ptr(),
        targets=targets.data_ptr(),
        keep=keep.data_ptr(),
        first_row=first_row.data_ptr(),
        workspace=workspace.data_ptr(),
        num_workspaces=workspace.shape[0],
        workspace_size=workspace.shape[1],
        fitted=fitted.data_ptr(),
        status=status.data_ptr(),
    )
    return fitted
