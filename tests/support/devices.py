"""What operators are tested on: instruction sets, CUDA sources run on the host, a device."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from types import ModuleType

import host_cuda_build
import pytest

from obert_kernels.ops import native

INSTRUCTION_SETS = native.core().instruction_sets()
CUDA = "cuda"
CUDA_ON_HOST = "cuda-on-host"  # the CUDA kernel sources, executed thread by thread on the CPU


@functools.cache
def host_cuda() -> ModuleType:
    """The CUDA kernels compiled for the host; compiled when first asked for."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host")
    cache = Path(__file__).parents[2] / "build" / "host_cuda"
    return host_cuda_build.load(host_cuda_build.build(cache))
