"""Fixtures shared by the tests."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from types import ModuleType

import host_cuda_build
import pytest
import torch

from obert_kernels import _lib, ops

INSTRUCTION_SETS = _lib.core().instruction_sets()
CUDA = "cuda"
CUDA_ON_HOST = "cuda-on-host"  # the CUDA kernel sources, executed thread by thread on the CPU


@functools.cache
def host_cuda() -> ModuleType:
    """The CUDA kernels compiled for the host; compiled when first asked for."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host")
    cache = Path(__file__).parent.parent / "build" / "host_cuda"
    return host_cuda_build.load(host_cuda_build.build(cache))


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cuda_on_host(monkeypatch):
    """Operators on CPU tensors run the host-executed CUDA kernels."""
    module = host_cuda()
    module.set_seed(1)
    monkeypatch.setattr(ops, "_run_on", lambda state: (module, 0))
    return module


@pytest.fixture(params=[*INSTRUCTION_SETS, CUDA_ON_HOST, pytest.param(CUDA, marks=pytest.mark.gpu)])
def isa(request):
    """Run the test once per instruction set this processor has, and prove it is in use; once
    with the CUDA kernels executed on the host; and once on a device, where there is one."""
    if request.param == CUDA:
        assert ops._run_on(torch.zeros(1, device=CUDA))[0] is _lib.core().cuda
        with torch.device(CUDA):
            yield request.param
        return
    if request.param == CUDA_ON_HOST:
        module = request.getfixturevalue("cuda_on_host")
        assert ops._run_on(torch.zeros(1))[0] is module
        yield request.param
        return
    core = _lib.core()
    before = core.current_instruction_set()
    assert core.select_instruction_set(request.param)
    assert core.current_instruction_set() == request.param
    yield request.param
    core.select_instruction_set(before)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
