"""Where no CUDA kernel can run, operators run in plain torch, with one warning that says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from . import native


class SlowOperatorsWarning(RuntimeWarning):
    """The operators run on a CUDA device without their kernels: same results, but slower."""


_without_kernels: set[torch.device] = set()
_said: set[str] = set()


def run(native_operator: Callable, oracle: Callable, args: tuple) -> Any:
    """Run an operator, or its oracle where the driver runs no kernel of this build on the device.

    An operator that finds that out has changed nothing yet.
    """
    device = args[0].device
    if device not in _without_kernels:
        try:
            return native_operator(*args)
        except native.no_kernels(args[0]) as error:
            _warn(device, str(error))  # may be made an error
            _without_kernels.add(device)
    return oracle(*args)


def warn_if_slower(device: torch.device) -> None:
    """Warn where kernels would run on a device if this build had them."""
    if device.type != "cuda":
        return
    problem = native.failure()
    if torch.version.hip is not None:
        _warn(device, "the kernels are made for CUDA, torch for ROCm")
    elif problem is not None:
        _warn(device, problem)
    else:
        _warn(
            device,
            "this build has none: with nvcc installed, `OBERT_CUDA=1 pip install "
            "--force-reinstall --no-deps .` in the folder of the source",
        )


def _warn(device: torch.device, reason: str) -> None:
    """Warn once of a reason, whatever device it is found on next."""
    if reason in _said:
        return
    where = f"{device} ({name_of(device)})" if device.type == "cuda" else device
    warnings.warn(
        f"no CUDA kernel of obert_kernels can run on {where}, its operators run in "
        f"plain torch, which is slower: {reason}",
        SlowOperatorsWarning,
        stacklevel=2,
    )
    _said.add(reason)


def name_of(device: torch.device) -> str:
    """Return the name and the compute capability of a CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
