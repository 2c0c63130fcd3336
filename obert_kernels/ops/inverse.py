"""Operators on inverses: Woodbury updates, scores and updates from a given inverse."""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .checks import check_gradients, check_inverse, check_keep, check_positive, check_weight
from .packing import block_size_of
from .registration import operator


def _check_woodbury(
    inverse: Tensor, gradients: Tensor, num_gradients: float, status: Tensor
) -> None:
    check_gradients(gradients, inverse)
    check_inverse(inverse, gradients.shape[1], status)
    check_positive("num_gradients", num_gradients)


@operator(
    "(Tensor(a!) inverse, Tensor gradients, float num_gradients, Tensor(b!) status) -> ()",
    _check_woodbury,
    lambda inverse, gradients, num_gradients, status: None,
)
def woodbury_update(
    inverse: Tensor, gradients: Tensor, num_gradients: float, status: Tensor
) -> None:
    gradients = native.contiguous_rows(gradients)
    core, where = native.run_on(inverse)
    core.woodbury_update(
        where,
        num_weights=gradients.shape[1],
        block_size=block_size_of(inverse),
        inverse=inverse.data_ptr(),
        gradients=gradients.data_ptr(),
        gradient_type=native.DTYPE_CODES[gradients.dtype],
        num_gradients=gradients.shape[0],
        gradient_stride=gradients.stride(0),
        total_gradients=num_gradients,
        status=status.data_ptr(),
    )


def _check_inverse_scores(inverse: Tensor, weight: Tensor, group_size: int, status: Tensor) -> None:
    check_weight(weight, group_size, inverse)
    check_inverse(inverse, weight.numel(), status)


@operator(
    "(Tensor inverse, Tensor weight, int group_size, Tensor(a!) status) -> Tensor",
    _check_inverse_scores,
    lambda inverse, weight, c, status: weight.new_empty(weight.shape[0] // c, dtype=torch.float32),
)
def inverse_scores(inverse: Tensor, weight: Tensor, group_size: int, status: Tensor) -> Tensor:
    weight = weight.contiguous()
    # Parts of a group in different blocks are added up.
    new = torch.empty if group_size == 1 else torch.zeros
    scores = new(weight.numel() // group_size, dtype=torch.float32, device=weight.device)
    core, where = native.run_on(inverse)
    core.inverse_scores(
        where,
        num_weights=weight.numel(),
        block_size=block_size_of(inverse),
        inverse=inverse.data_ptr(),
        weight=weight.data_ptr(),
        weight_type=native.DTYPE_CODES[weight.dtype],
        group_size=group_size,
        scores=scores.data_ptr(),
        status=status.data_ptr(),
    )
    return scores


def _check_inverse_update(
    inverse: Tensor,
    weight: Tensor,
    keep: Tensor,
    group_size: int,
    joint: bool,
    with_increase: bool,
    status: Tensor,
) -> None:
    _check_inverse_scores(inverse, weight, group_size, status)
    check_keep(keep, weight)


@operator(
    "(Tensor inverse, Tensor weight, Tensor keep, int group_size, bool joint, "
    "bool with_increase, Tensor(a!) status) -> (Tensor, Tensor)",
    _check_inverse_update,
    lambda inverse, weight, keep, c, joint, with_increase, status: (
        weight.new_empty(weight.shape),
        weight.new_empty(inverse.shape[0] if with_increase else 0, dtype=torch.float64),
    ),
)
def inverse_update(
    inverse: Tensor,
    weight: Tensor,
    keep: Tensor,
    group_size: int,
    joint: bool,
    with_increase: bool,
    status: Tensor,
) -> tuple[Tensor, Tensor]:
    weight, keep = weight.contiguous(), keep.contiguous()
    core, where = native.run_on(inverse)
    update, new, increase = native.update_parameters(
        core, weight, keep, group_size, joint, inverse.shape[0] if with_increase else 0
    )
    core.inverse_update(
        where,
        num_weights=weight.numel(),
        block_size=block_size_of(inverse),
        inverse=inverse.data_ptr(),
        update=update,
        status=status.data_ptr(),
    )
    return new, increase
