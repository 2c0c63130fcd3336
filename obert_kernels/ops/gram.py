"""The operators: schemas, checks, and which code runs on which device.

``torch.ops.obert_kernels.<name>`` and the functions of the same name here are one thing.
On the CPU and, in builds with CUDA kernels, on CUDA devices they run the native core; elsewhere
:mod:`obert_kernels.ops.reference`.

Shapes: ``n`` weights of one matrix, flattened row-major, in ``blocks = ceil(n / B)`` blocks.
``gram`` is ``[blocks, B(B+1)/2]`` (packed lower triangles, row after row, float64 or float32),
``inverse`` ``[blocks, B(B+1)/2]`` float32 (of each block the diagonal, then the rows below it:
:func:`obert_kernels.ops.packing.unpack_inverse` makes it dense), ``gradients`` ``[k, n]`` in any
floating type, ``weight`` ``[n]`` float32 or float64, ``keep`` ``[n]`` bool.
``num_gradients`` is the m of ``F = damping I + gram / m``.

``status`` is an int64 tensor of one element that holds -1 while all is well; an operator
stores the first block whose pivot or denominator is not positive and never raises for it, so
that a device need not be waited for.  :func:`raise_for_status` reads it.  The result of a
failed block is not to be used: updates leave such a block's weights as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .checks import (
    MAX_PATTERN,
    WIDE,
    check_devices,
    check_dtype,
    check_fisher,
    check_gradients,
    check_gram,
    check_keep,
    check_weight,
    require,
)
from .registration import operator

_FISHER = "int block_size, float num_gradients, float damping, Tensor(a!) status"


def _check_accumulate(gram: Tensor, gradients: Tensor, block_size: int) -> None:
    check_gradients(gradients, gram)
    check_gram(gram, gradients.shape[1], block_size)


@operator(
    "(Tensor(a!) gram, Tensor gradients, int block_size) -> ()",
    _check_accumulate,
    lambda gram, gradients, block_size: None,
)
def gram_accumulate(gram: Tensor, gradients: Tensor, block_size: int) -> None:
    gradients = native.contiguous_rows(gradients)
    core, where = native.run_on(gram)
    core.gram_accumulate(
        gram.data_ptr(), native.DTYPE_CODES[gram.dtype], gradients.data_ptr(),
        native.DTYPE_CODES[gradients.dtype], gradients.shape[0], gradients.stride(0),
        gradients.shape[1], block_size, where,
    )  # fmt: skip


def _check_materialise(gram, num_weights, block_size, num_gradients, damping, dtype, status):  # type: ignore[no-untyped-def]
    check_fisher(gram, num_weights, block_size, num_gradients, damping, status)
    if dtype not in WIDE:
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")


_MATERIALISE = (
    "(Tensor gram, int num_weights, int block_size, float num_gradients, float damping, "
    "ScalarType dtype, Tensor(a!) status) -> Tensor"
)


@operator(
    _MATERIALISE,
    _check_materialise,
    lambda gram, n, b, m, damping, dtype, status: gram.new_empty(gram.shape, dtype=dtype),
)
def gram_inverse(
    gram: Tensor,
    num_weights: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    dtype: torch.dtype,
    status: Tensor,
) -> Tensor:
    out = gram.new_empty(gram.shape, dtype=dtype)
    fisher = native.fisher_args(gram, num_weights, block_size, num_gradients, damping, status)
    core, where = native.run_on(gram)
    core.gram_inverse(fisher, out.data_ptr(), native.DTYPE_CODES[dtype], where)
    return out


@operator(
    _MATERIALISE,
    _check_materialise,
    lambda gram, n, b, m, damping, dtype, status: gram.new_empty(n, dtype=dtype),
)
def gram_diagonal(
    gram: Tensor,
    num_weights: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    dtype: torch.dtype,
    status: Tensor,
) -> Tensor:
    out = gram.new_empty(num_weights, dtype=dtype)
    fisher = native.fisher_args(gram, num_weights, block_size, num_gradients, damping, status)
    core, where = native.run_on(gram)
    core.gram_diagonal(fisher, out.data_ptr(), native.DTYPE_CODES[dtype], where)
    return out


def _check_solve(gram, right_hand_side, block_size, num_gradients, damping, status):  # type: ignore[no-untyped-def]
    check_dtype("right_hand_side", right_hand_side, WIDE)
    require(
        right_hand_side.dim() == 1,
        f"right_hand_side must be [n], got {tuple(right_hand_side.shape)}",
    )
    check_fisher(gram, right_hand_side.numel(), block_size, num_gradients, damping, status)
    check_devices(right_hand_side=right_hand_side, gram=gram)


@operator(
    f"(Tensor gram, Tensor right_hand_side, {_FISHER}) -> Tensor",
    _check_solve,
    lambda gram, v, b, m, damping, status: v.new_empty(v.shape),
)
def gram_solve(
    gram: Tensor,
    right_hand_side: Tensor,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> Tensor:
    v = right_hand_side.contiguous()
    out = torch.empty_like(v)
    fisher = native.fisher_args(gram, v.numel(), block_size, num_gradients, damping, status)
    core, where = native.run_on(gram)
    core.gram_solve(fisher, v.data_ptr(), out.data_ptr(), native.DTYPE_CODES[v.dtype], where)
    return out


def _check_scores(gram, weight, group_size, block_size, num_gradients, damping, status):  # type: ignore[no-untyped-def]
    check_weight(weight, group_size, gram)
    check_fisher(gram, weight.numel(), block_size, num_gradients, damping, status)


@operator(
    f"(Tensor gram, Tensor weight, int group_size, {_FISHER}) -> Tensor",
    _check_scores,
    lambda gram, weight, c, b, m, damping, status: weight.new_empty(
        weight.shape[0] // c, dtype=torch.float32
    ),
)
def gram_scores(
    gram: Tensor,
    weight: Tensor,
    group_size: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> Tensor:
    weight = weight.contiguous()
    scores = weight.new_zeros(weight.numel() // group_size, dtype=torch.float32)
    fisher = native.fisher_args(gram, weight.numel(), block_size, num_gradients, damping, status)
    core, where = native.run_on(gram)
    core.gram_scores(
        fisher, weight.data_ptr(), native.DTYPE_CODES[weight.dtype], group_size, scores.data_ptr(),
        where,
    )  # fmt: skip
    return scores


def _check_greedy(gram, weight, keep, group_size, block_size, m, damping, status):  # type: ignore[no-untyped-def]
    _check_scores(gram, weight, group_size, block_size, m, damping, status)
    check_keep(keep, weight)


@operator(
    f"(Tensor gram, Tensor weight, Tensor keep, int group_size, {_FISHER}) -> Tensor",
    _check_greedy,
    lambda gram, weight, keep, c, b, m, damping, status: weight.new_empty(
        weight.shape[0] // c, dtype=torch.float32
    ),
)
def gram_greedy_scores(
    gram: Tensor,
    weight: Tensor,
    keep: Tensor,
    group_size: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> Tensor:
    weight, keep = weight.contiguous(), keep.contiguous()
    scores = weight.new_zeros(weight.numel() // group_size, dtype=torch.float32)
    fisher = native.fisher_args(gram, weight.numel(), block_size, num_gradients, damping, status)
    core, where = native.run_on(gram)
    core.gram_greedy_scores(
        fisher, weight.data_ptr(), native.DTYPE_CODES[weight.dtype], keep.data_ptr(), group_size,
        scores.data_ptr(), where,
    )  # fmt: skip
    return scores


def _check_n_of_m(gram, weight, keep, kept, group, block_size, m, damping, status):  # type: ignore[no-untyped-def]
    _check_scores(gram, weight, group, block_size, m, damping, status)
    check_keep(keep, weight)
    require(
        0 < kept < group <= MAX_PATTERN,
        f"kept must be at least 1 and less than group, group at most {MAX_PATTERN}; got {kept} "
        f"of {group}",
    )
    require(
        block_size % group == 0,
        f"block_size must be a multiple of the group of {group}, got {block_size}",
    )


@operator(
    f"(Tensor gram, Tensor weight, Tensor keep, int kept, int group, {_FISHER}) -> Tensor",
    _check_n_of_m,
    lambda gram, weight, keep, kept, group, b, m, damping, status: keep.new_empty(keep.shape),
)
def gram_n_of_m(
    gram: Tensor,
    weight: Tensor,
    keep: Tensor,
    kept: int,
    group: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> Tensor:
    weight, keep = weight.contiguous(), keep.contiguous()
    new_keep = torch.empty_like(keep)
    fisher = native.fisher_args(gram, weight.numel(), block_size, num_gradients, damping, status)
    core, where = native.run_on(gram)
    core.gram_n_of_m(
        fisher, weight.data_ptr(), native.DTYPE_CODES[weight.dtype], keep.data_ptr(), kept, group,
        new_keep.data_ptr(), where,
    )  # fmt: skip
    return new_keep


def _check_update(gram, weight, keep, group_size, joint, block_size, m, damping, status):  # type: ignore[no-untyped-def]
    _check_scores(gram, weight, group_size, block_size, m, damping, status)
    check_keep(keep, weight)


@operator(
    f"(Tensor gram, Tensor weight, Tensor keep, int group_size, bool joint, {_FISHER}) "
    "-> (Tensor, Tensor)",
    _check_update,
    lambda gram, weight, keep, c, joint, b, m, damping, status: (
        weight.new_empty(weight.shape),
        weight.new_empty(gram.shape[0], dtype=torch.float64),
    ),
)
def gram_update(
    gram: Tensor,
    weight: Tensor,
    keep: Tensor,
    group_size: int,
    joint: bool,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> tuple[Tensor, Tensor]:
    update, new, increase, _alive = native.update_args(
        weight, keep, group_size, joint, gram.shape[0]
    )
    fisher = native.fisher_args(gram, weight.numel(), block_size, num_gradients, damping, status)
    core, where = native.run_on(gram)
    core.gram_update(fisher, update, where)
    return new, increase
