"""The native core: loading it, and what the operators hand to it."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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


def limit(name: str) -> int:
    """Return a limit of the core; without a core, whose reason an operator says, there is none."""
    return getattr(_core, name, sys.maxsize)


def failure() -> str | None:
    """Return why the core is missing, or None if it is loaded."""
    return _failure


_load()

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_substitute: tuple[Any, int] | None = None


@contextmanager
def using(module: ModuleType, where: int = 0) -> Iterator[None]:
    """Run the operators of another module on all tensors: of the same kernels, compiled otherwise.

    Args:
        module: has the functions and classes of the core.
        where: their first argument, a number of threads or a stream.
    """
    global _substitute
    before, _substitute = _substitute, (module, where)
    try:
        yield
    finally:
        _substitute = before


def run_on(state: Tensor) -> tuple[Any, int]:
    """The operators for the device of a tensor, and the threads or the stream they run in."""
    if _substitute is not None:
        return _substitute
    if state.device.type == "cuda":
        return core().cuda, torch.cuda.current_stream(state.device).cuda_stream
    return core(), torch.get_num_threads()


def runs_on_cpu(state: Tensor) -> bool:
    """Whether the operators for the device of a tensor are those of the CPU."""
    return _substitute is None and state.device.type == "cpu"


def no_kernels(state: Tensor) -> tuple[type[Exception], ...]:
    """What the operators for the device of a tensor raise if none of them can run there."""
    module, _ = run_on(state)
    return (module.NoKernels,) if hasattr(module, "NoKernels") else ()


def copy(source: Tensor, destination: Tensor) -> None:
    """Copy values; between contiguous CPU tensors of one type by the threads of the kernels.

    Those of torch go on spinning for milliseconds, on the processors that a kernel wants next.
    """
    plain = source.is_contiguous() and destination.is_contiguous()
    same = source.dtype == destination.dtype and source.shape == destination.shape
    if not (plain and same and source.device.type == destination.device.type == "cpu"):
        destination.copy_(source)
        return
    core().copy(
        torch.get_num_threads(),
        source=source.data_ptr(),
        destination=destination.data_ptr(),
        num_bytes=source.nbytes,
    )


def contiguous_rows(gradients: Tensor) -> Tensor:
    """Gradients with every row contiguous; rows may lie any distance apart."""
    return gradients if gradients.stride(1) == 1 else gradients.contiguous()


def fisher_parameters(
    module: Any,
    gram: Tensor,
    num_weights: int,
    block_size: int,
    num_gradients: float,
    damping: float,
    status: Tensor,
) -> Any:
    """``F = damping I + gram / m`` for the operators of a module."""
    return module.Fisher(
        num_weights=num_weights,
        block_size=block_size,
        gram=gram.data_ptr(),
        gram_type=DTYPE_CODES[gram.dtype],
        scale=1.0 / num_gradients,
        damping=damping,
        status=status.data_ptr(),
    )


def update_parameters(
    module: Any, weight: Tensor, keep: Tensor, group_size: int, joint: bool, blocks: int
) -> tuple[Any, Tensor, Tensor]:
    """Return the native argument and both outputs, whose memory it points to.

    Args:
        module: of the operators.
        weight: contiguous, as ``keep``; the caller keeps both.
        keep: mask.
        group_size: weights that go together.
        joint: the rule.
        blocks: number of predicted increases, 0 for none.
    """
    new, increase = torch.empty_like(weight), weight.new_zeros(blocks, dtype=torch.float64)
    update = module.Update(
        weight=weight.data_ptr(),
        weight_type=DTYPE_CODES[weight.dtype],
        keep=keep.data_ptr(),
        group_size=group_size,
        rule=int(joint),
        new_weight=new.data_ptr(),
        predicted_increase=increase.data_ptr() if blocks else 0,
    )
    return update, new, increase
