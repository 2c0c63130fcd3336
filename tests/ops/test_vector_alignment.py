"""The CPU kernels compiled to check the alignment of every vector that they touch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from obert_kernels.ops import native

ROOT = Path(__file__).parents[2]
# One instruction set is enough, of vectors wider than what the stack is aligned to.
CHANGES = {
    "IS_X86 = platform": "IS_X86 = False and platform",
    '"-DOBERT_VECTOR_BYTES=16"': '"-DOBERT_VECTOR_BYTES=32", "-mavx2", "-mfma"',
    "-O3": "-O0",  # optimised, most vectors stand in registers, and the rest is aligned by chance
}
TESTS = [
    "test_ops.py",
    "test_packed_inverse.py",
    "test_greedy.py",
    "test_n_of_m.py",
    "test_fit_rows.py",
]


@pytest.mark.slow
def test_no_vector_is_taken_for_better_aligned_than_it_is(tmp_path):
    if "avx2" not in native.core().instruction_sets() or shutil.which("g++") is None:
        pytest.skip("needs AVX2 and g++")
    for folder in ("csrc", "obert_kernels", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    setup = (ROOT / "setup.py").read_text()
    for before, after in CHANGES.items():
        assert before in setup
        setup = setup.replace(before, after)
    (tmp_path / "setup.py").write_text(setup)
    checked = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "OBERT_CUDA": "0",
        "OBERT_WERROR": "0",
        "CXX": "g++ -fsanitize=alignment -fno-sanitize-recover=alignment",
    }

    def run(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=checked, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run("setup.py", "build_ext", "--inplace")
    chosen = ["-k", "baseline and not two_to_the_31", "-p", "no:faulthandler"]
    run("-m", "pytest", "-x", "-q", *chosen, *(f"tests/ops/{name}" for name in TESTS))
