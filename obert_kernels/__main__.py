"""``python -m obert_kernels``: what is installed, what it found, what it will use."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from . import __version__
from .ops import gram_accumulate, native
from .ops.fallback import SlowOperatorsWarning, name_of


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cuda(core: Any) -> str:
    if core.cuda_architectures is None:
        return "not in this build (no nvcc when it was compiled, or OBERT_CUDA=0)"
    runtime = core.cuda_runtime_version()
    count, message = core.cuda_device_count()
    seen = f"{count} device(s)" if count else f"no device ({message})"
    return (
        f"runtime {runtime // 1000}.{runtime % 1000 // 10} in this build for compute capability "
        f"{core.cuda_architectures}; {seen}"
    )


def _devices() -> Iterator[tuple[str, str]]:
    """What runs on each device that torch sees; tried, as only the driver knows."""
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", SlowOperatorsWarning)
                gram = torch.zeros(1, 1, device=device)
                gram_accumulate(gram, torch.ones(1, 1, device=device), 1)
            found = "kernels run" if gram.item() == 1 else f"wrong result: {gram.item()} for 1"
        except (SlowOperatorsWarning, RuntimeError) as problem:
            found = str(problem)
        yield str(device), f"{name_of(device)}: {found}"


def main() -> int:
    """Print diagnostics; return 1 if the native core is missing."""
    rows = [
        ("obert_kernels", __version__),
        ("python", f"{platform.python_version()} on {platform.machine()} {platform.system()}"),
        ("torch", torch.__version__),
        ("numpy", _installed("numpy")),
        ("transformers", _installed("transformers")),
        ("threads", f"{torch.get_num_threads()} (torch.get_num_threads())"),
    ]
    problem = native.failure()
    if problem is None:
        core = native.core()
        sets = ", ".join(core.instruction_sets())
        rows.append(("CPU kernels", f"{core.current_instruction_set()} in use (of {sets})"))
        rows += [("CUDA", _cuda(core)), *_devices()]
    for name, value in rows:
        print(f"{name:<14} {value}")
    if problem is not None:
        print(problem, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
