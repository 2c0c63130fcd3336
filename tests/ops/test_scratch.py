"""A kernel that takes more scratch than it declared ends the process instead of overwriting it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"

# The diagonal of F^-1 of one block whose Gram is zero: 1 / damping.  The argument: bytes that are
# missing from what the kernel declared.
PROGRAM = f"""
#include "{CSRC}/pruning/cpu/factor.cpp"

#include <cstdio>
#include <cstdlib>

int main(int, char** arguments) {{
    using namespace obert;
    constexpr int size = 50;
    static double gram[size * (size + 1) / 2], diagonal[size];
    GramDiagonal call{{}};
    int64_t status = -1;
    call.fisher = {{{{size, size}}, gram, DType::f64, 1.0, 0.25, {{&status}}}};
    call.diagonal = diagonal;
    call.diagonal_type = DType::f64;
    const cpu::Plan plan = OBERT_ISA::plan(call);
    if (plan.num_blocks != 1 || plan.status.first_failed_block != &status) return 1;
    char* memory = static_cast<char*>(std::aligned_alloc(64, plan.scratch_bytes));
    const int64_t given = plan.scratch_bytes - std::atoi(arguments[1]);
    if (OBERT_ISA::gram_diagonal(call, {{0, 1}}, {{memory, memory + given}}) != -1) return 1;
    for (double value : diagonal)
        if (value != 4.0) return 1;
    std::puts("right");
}}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("scratch")
    (folder / "main.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-Wno-psabi", "-DOBERT_ISA=baseline", "-DOBERT_VECTOR_BYTES=16"]
    sources = [str(folder / "main.cpp"), str(CSRC / "common" / "scratch.cpp")]
    subprocess.run([compiler, *flags, *sources, "-o", str(folder / "main")], check=True)
    return folder / "main"


def test_what_a_kernel_declares_is_enough(program):
    done = subprocess.run([program, "0"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


def test_taking_more_than_declared_is_caught(program):
    done = subprocess.run([program, "64"], capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout == ""
    assert "64 bytes more scratch than it declared" in done.stderr
