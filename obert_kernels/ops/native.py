"""Loads the native core and keeps the reason when it cannot be loaded."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_core: ModuleType | None = None
_failure: str | None = None


def _load() -> None:
    global _core, _failure
    try:
        module = importlib.import_module("obert_kernels._C")
    except ImportError as error:
        _failure = (
            "the native core of obert_kernels (obert_kernels/_C) could not be loaded.\n"
            f"  found:  {error}\n"
            "  wanted: the extension module compiled for this Python and machine\n"
            "  do:     `pip install --force-reinstall --no-deps .` in the folder of the source "
            "(needs a C++17 compiler)"
        )
        return
    wish = os.environ.get("OBERT_CPU_ISA")
    if wish and not module.select_instruction_set(wish):
        _failure = (
            f"OBERT_CPU_ISA={wish!r} cannot be used.\n"
            f"  found:  this build on this processor runs {', '.join(module.instruction_sets())}\n"
            "  do:     set OBERT_CPU_ISA to one of these or unset it"
        )
        return
    _core = module


def core() -> ModuleType:
    """Return the native module.

    Raises:
        ImportError: it could not be loaded; the message says what was found, what was
            wanted and what to do.
    """
    if _core is None:
        raise ImportError(_failure)
    return _core


def failure() -> str | None:
    """Return why the core is missing, or None if it is loaded."""
    return _failure


_load()

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def fisher_args(
    gram: Tensor, n: int, block_size: int, num_gradients: float, damping: float, status: Tensor
) -> Any:
    """The native argument for a Gram."""
    return core().Fisher(
        gram.data_ptr(), DTYPE_CODES[gram.dtype], n, block_size, 1.0 / num_gradients, damping,
        status.data_ptr(),
    )  # fmt: skip


def contiguous_rows(gradients: Tensor) -> Tensor:
    """Gradients with every row contiguous; rows may lie any distance apart."""
    return gradients if gradients.stride(1) == 1 else gradients.contiguous()


def run_on(state: Tensor) -> tuple[Any, int]:
    """The operators for the device of a tensor, and the threads or the stream they run in."""
    if state.device.type == "cuda":
        return core().cuda, torch.cuda.current_stream(state.device).cuda_stream
    return core(), torch.get_num_threads()


def update_args(
    weight: Tensor, keep: Tensor, group_size: int, joint: bool, blocks: int
) -> tuple[Any, Tensor, Tensor, tuple[Tensor, ...]]:
    """Return the native argument, both outputs, and what must stay alive during the call."""
    weight, keep = weight.contiguous(), keep.contiguous()
    new, increase = torch.empty_like(weight), weight.new_zeros(blocks, dtype=torch.float64)
    args = core().Update(
        weight.data_ptr(), DTYPE_CODES[weight.dtype], keep.data_ptr(), group_size, int(joint),
        new.data_ptr(), increase.data_ptr() if blocks else 0,
    )  # fmt: skip
    return args, new, increase, (weight, keep)
