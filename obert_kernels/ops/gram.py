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
        where,
        num_weights=gradients.shape[1],
        block_size=block_size,
        gram=gram.data_ptr(),
        gram_type=native.DTYPE_CODES[gram.dtype],
        gradients=gradients.data_ptr(),
        gradient_type=native.DTYPE_CODES[gradients.dtype],
        num_gradients=gradients.shape[0],
        gradient_stride=gradients.stride(0),
    )


def _check_materialise(
    gram: Tensor,
    num_weights: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    dtype: torch.dtype,
    status: Tensor,
) -> None:
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
    core, where = native.run_on(gram)
    fisher = native.fisher_parameters(
        core, gram, num_weights, block_size, num_gradients, damping, status
    )
    core.gram_inverse(
        where, fisher=fisher, inverse=out.data_ptr(), inverse_type=native.DTYPE_CODES[dtype]
    )
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
    core, where = native.run_on(gram)
    fisher = native.fisher_parameters(
        core, gram, num_weights, block_size, num_gradients, damping, status
    )
    core.gram_diagonal(
        where, fisher=fisher, diagonal=out.data_ptr(), diagonal_type=native.DTYPE_CODES[dtype]
    )
    return out


def _check_solve(
    gram: Tensor,
    right_hand_side: Tensor,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> None:
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
    core, where = native.run_on(gram)
    fisher = native.fisher_parameters(
        core, gram, v.numel(), block_size, num_gradients, damping, status
    )
    core.gram_solve(
        where,
        fisher=fisher,
        right_hand_side=v.data_ptr(),
        solution=out.data_ptr(),
        vector_type=native.DTYPE_CODES[v.dtype],
    )
    return out


def _check_scores(
    gram: Tensor,
    weight: Tensor,
    group_size: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> None:
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
    core, where = native.run_on(gram)
    fisher = native.fisher_parameters(
        core, gram, weight.numel(), block_size, num_gradients, damping, status
    )
    core.gram_scores(
        where,
        fisher=fisher,
        weight=weight.data_ptr(),
        weight_type=native.DTYPE_CODES[weight.dtype],
        group_size=group_size,
        scores=scores.data_ptr(),
    )
    return scores


def _check_greedy(
    gram: Tensor,
    weight: Tensor,
    keep: Tensor,
    group_size: int,
    block_size: int,
    m: float,
    damping: float,
    status: Tensor,
) -> None:
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
    core, where = native.run_on(gram)
    fisher = native.fisher_parameters(
        core, gram, weight.numel(), block_size, num_gradients, damping, status
    )
    core.gram_greedy_scores(
        where,
        fisher=fisher,
        weight=weight.data_ptr(),
        weight_type=native.DTYPE_CODES[weight.dtype],
        keep=keep.data_ptr(),
        group_size=group_size,
        scores=scores.data_ptr(),
    )
    return scores


def _check_n_of_m(
    gram: Tensor,
    weight: Tensor,
    keep: Tensor,
    kept: int,
    group: int,
    block_size: int,
    m: float,
    damping: float,
    status: Tensor,
) -> None:
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
    core, where = native.run_on(gram)
    fisher = native.fisher_parameters(
        core, gram, weight.numel(), block_size, num_gradients, damping, status
    )
    core.gram_n_of_m(
        where,
        fisher=fisher,
        weight=weight.data_ptr(),
        weight_type=native.DTYPE_CODES[weight.dtype],
        keep=keep.data_ptr(),
        kept=kept,
        group=group,
        new_keep=new_keep.data_ptr(),
    )
    return new_keep


def _check_update(
    gram: Tensor,
    weight: Tensor,
    keep: Tensor,
    group_size: int,
    joint: bool,
    block_size: int,
    m: float,
    damping: float,
    status: Tensor,
) -> None:
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
    weight, keep = weight.contiguous(), keep.contiguous()
    core, where = native.run_on(gram)
    fisher = native.fisher_parameters(
        core, gram, weight.numel(), block_size, num_gradients, damping, status
    )
    update, new, increase = native.update_parameters(
        core, weight, keep, group_size, joint, gram.shape[0]
    )
    core.gram_update(where, fisher=fisher, update=update)
    return new, increase
