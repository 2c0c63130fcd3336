"""Fixtures shared by the tests."""

import pytest
import torch

from obert_kernels import _lib

INSTRUCTION_SETS = _lib.core().instruction_sets()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request):
    """Run the test once per instruction set this processor has, and prove it is in use."""
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
