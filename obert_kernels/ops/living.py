"""The operator that adds gradients to Grams of the remaining weights alone; as :mod:`.ops`.

Its blocks have different sizes and hold some of the weights.  ``gram`` is flat, one packed lower
triangle after the other, block b from ``gram_start[b]`` on; ``first_place`` (``[blocks + 1]``)
says which places a block has, and ``weight_at_place`` which weight stands at each (int32, -1:
none, its gradient is zero).  A block whose tables point outside is an error on the CPU; a CUDA
device is not waited for and leaves it as it was.  That no two Grams overlap is not checked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import native
from .checks import MAX_BLOCK_SIZE, WIDE, check_devices, check_dtype, check_gradients, require
from .registration import operator


def _check(
    gram: Tensor,
    gradients: Tensor,
    gram_start: Tensor,
    first_place: Tensor,
    weight_at_place: Tensor,
) -> None:
    check_gradients(gradients, gram)
    check_dtype("gram", gram, WIDE)
    require(gram.dim() == 1 and gram.is_contiguous(), "gram must be flat and contiguous")
    for name, tensor, dtype in (
        ("gram_start", gram_start, torch.int64),
        ("first_place", first_place, torch.int64),
        ("weight_at_place", weight_at_place, torch.int32),
    ):
        check_dtype(name, tensor, (dtype,))
        require(tensor.dim() == 1 and tensor.is_contiguous(), f"{name} must be contiguous")
    require(
        len(first_place) == len(gram_start) + 1,
        f"first_place must have one entry more than gram_start, got {len(first_place)} and "
        f"{len(gram_start)}",
    )
    check_devices(
        gram=gram, gram_start=gram_start, first_place=first_place, weight_at_place=weight_at_place
    )


@operator(
    "(Tensor(a!) gram, Tensor gradients, Tensor gram_start, Tensor first_place, "
    "Tensor weight_at_place) -> ()",
    _check,
    lambda gram, gradients, gram_start, first_place, weight_at_place: None,
)
def gram_accumulate_living(
    gram: Tensor,
    gradients: Tensor,
    gram_start: Tensor,
    first_place: Tensor,
    weight_at_place: Tensor,
) -> None:
    gradients = native.contiguous_rows(gradients)
    core, where = native.run_on(gram)
    failed = core.gram_accumulate_living(
        where,
        num_blocks=len(gram_start),
        gram_size=len(gram),
        num_places=len(weight_at_place),
        num_weights=gradients.shape[1],
        gram=gram.data_ptr(),
        gram_type=native.DTYPE_CODES[gram.dtype],
        gram_start=gram_start.data_ptr(),
        first_place=first_place.data_ptr(),
        weight_at_place=weight_at_place.data_ptr(),
        gradients=gradients.data_ptr(),
        gradient_type=native.DTYPE_CODES[gradients.dtype],
        num_gradients=gradients.shape[0],
        gradient_stride=gradients.stride(0),
    )
    require(
        failed < 0,
        f"block {failed}: gram_start, first_place or weight_at_place point outside of gram, "
        f"weight_at_place or the gradients, or it has more than {MAX_BLOCK_SIZE} places; other "
        "blocks may have been added to",
    )
