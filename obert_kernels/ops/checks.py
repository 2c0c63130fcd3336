"""Checks of operator arguments; every message names the argument and what it should be."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from . import native
from .packing import block_size_of, gram_shape

MAX_BLOCK_SIZE = native.limit("max_block_size")
MAX_PATTERN = native.limit("max_pattern")  # M of N:M
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)


def require(condition: bool, message: str) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_block_size(block_size: int) -> None:
    """B within what the kernels take; a TypeError unless it is a whole number."""
    if not isinstance(block_size, Integral):
        raise TypeError(f"block_size must be a whole number, got {block_size!r}")
    require(
        1 <= block_size <= MAX_BLOCK_SIZE,
        f"block_size must be between 1 and {MAX_BLOCK_SIZE}, got {block_size}",
    )


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless above zero."""
    require(value > 0, f"{name} must be positive, got {value}")


def check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    """Raise TypeError for a type that is not allowed."""
    names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
    if tensor.dtype not in allowed:
        raise TypeError(f"{name} must be one of {names}, got {tensor.dtype}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Exactly this shape."""
    require(
        tuple(tensor.shape) == shape, f"{name} must have shape {shape}, got {tuple(tensor.shape)}"
    )


def check_devices(**tensors: Tensor) -> None:
    """All tensors on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items()}
    require(len(set(devices.values())) == 1, f"tensors are on different devices: {devices}")


def check_status(status: Tensor) -> None:
    """int64 ``[1]``."""
    check_dtype("status", status, (torch.int64,))
    check_shape("status", status, (1,))


def check_gram(gram: Tensor, num_weights: int, block_size: int) -> None:
    """``[blocks, B(B+1)/2]``, contiguous."""
    check_block_size(block_size)
    check_dtype("gram", gram, WIDE)
    check_shape("gram", gram, gram_shape(num_weights, block_size))
    require(gram.is_contiguous(), "gram must be contiguous")


def check_fisher(
    gram: Tensor,
    num_weights: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> None:
    """A Gram with a usable m and damping."""
    check_gram(gram, num_weights, block_size)
    check_positive("num_gradients", num_gradients)
    check_positive("damping", damping)
    check_status(status)
    check_devices(gram=gram, status=status)


def check_inverse(inverse: Tensor, num_weights: int, status: Tensor) -> None:
    """float32 ``[blocks, B(B+1)/2]``, contiguous."""
    check_dtype("inverse", inverse, (torch.float32,))
    block_size = block_size_of(inverse) if inverse.dim() == 2 else 0
    require(
        1 <= block_size <= MAX_BLOCK_SIZE
        and inverse.shape[1] == block_size * (block_size + 1) // 2,
        f"inverse must be [blocks, B(B+1)/2] with B from 1 to {MAX_BLOCK_SIZE}, "
        f"got {tuple(inverse.shape)}",
    )
    check_shape("inverse", inverse, gram_shape(num_weights, block_size))
    require(inverse.is_contiguous(), "inverse must be contiguous")
    check_status(status)
    check_devices(inverse=inverse, status=status)


def check_gradients(gradients: Tensor, like: Tensor) -> None:
    """``[k, n]`` in any floating type."""
    check_dtype("gradients", gradients, FLOATS)
    require(gradients.dim() == 2, f"gradients must be [k, n], got {tuple(gradients.shape)}")
    check_devices(gradients=gradients, state=like)


def check_weight(weight: Tensor, group_size: int, like: Tensor) -> None:
    """``[n]``, divided by the group size."""
    check_dtype("weight", weight, WIDE)
    require(weight.dim() == 1, f"weight must be [n], got {tuple(weight.shape)}")
    require(
        group_size >= 1 and weight.numel() % group_size == 0,
        f"group_size must divide the number of weights {weight.numel()}, got {group_size}",
    )
    check_devices(weight=weight, state=like)


def check_keep(keep: Tensor, weight: Tensor) -> None:
    """bool ``[n]``."""
    check_dtype("keep", keep, (torch.bool,))
    check_shape("keep", keep, tuple(weight.shape))
    check_devices(keep=keep, weight=weight)
