"""The CUDA kernels, executed on the host, with a barrier removed and with sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import host_cuda_build
import pytest
import torch
from problems import DAMPING, fresh_inverse, gradients, gram_of

from obert_kernels import ops
from obert_kernels.ops import native, reference
from obert_kernels.ops.living import gram_accumulate_living

ROOT = Path(__file__).parents[2]

# ---- every barrier is needed ---------------------------------------------------------

SIZE = 20  # the general kernels
COMPILED = 50
TOGETHER = 8  # small blocks that share a thread block
LARGE = 130  # a Gram with more tiles than threads


def results(size: int) -> dict[str, list[torch.Tensor]]:
    """What every kernel with a barrier makes of one problem."""
    torch.manual_seed(3)
    blocks = 32 if size == TOGETHER else 2
    n = blocks * size
    g, weight, keep = gradients(20, n), torch.randn(n), torch.rand(n) < 0.5
    last_goes_first = weight.clone()  # the group whose inverse is ready last
    last_goes_first[-4:] *= 0.01
    last_goes_first[-8:-4] *= 100  # goes last, and its score is not written by thread 0
    exact = gram_of(g, size)
    inverse, start = fresh_inverse(blocks, size), fresh_inverse(blocks, size)
    status = ops.new_status()
    given = reference.gram_inverse(exact, n, size, 20.0, DAMPING, torch.float32, ops.new_status())
    fisher = (size, 20.0, DAMPING, status)
    made = (n, size, 20.0, DAMPING, torch.float64, status)
    gram, living = torch.zeros_like(exact), torch.zeros_like(exact)
    tables = (
        torch.arange(blocks) * exact.shape[1],
        torch.arange(blocks + 1) * size,
        torch.arange(n, dtype=torch.int32),
    )
    calls = {
        "gram": lambda: [gram, ops.gram_accumulate(gram, g, size)],
        "living": lambda: [living, gram_accumulate_living(living.view(-1), g, *tables)],
        "woodbury": lambda: [inverse, ops.woodbury_update(inverse, g, 20.0, status)],
        "woodbury, no gradients": lambda: [start, ops.woodbury_update(start, g[:0], 20.0, status)],
        "scores": lambda: [ops.gram_scores(exact, weight, 1, *fisher)],
        "group scores": lambda: [ops.gram_scores(exact, weight, 4, *fisher)],
        "inverse": lambda: [ops.gram_inverse(exact, *made)],
        "solve": lambda: [ops.gram_solve(exact, weight, *fisher)],
        "update": lambda: [*ops.gram_update(exact, weight, keep, 1, False, *fisher)],
        "group update": lambda: [*ops.gram_update(exact, weight, keep, 4, False, *fisher)],
        # Such a block is left alone: nobody looks at its Gram, or at its inverse.
        "update, nothing to remove": lambda: [
            *ops.gram_update(exact * float("nan"), weight * keep, keep, 1, False, *fisher)
        ],
        "greedy": lambda: [ops.gram_greedy_scores(exact, weight, keep, 1, *fisher)],
        "greedy groups": lambda: [
            ops.gram_greedy_scores(exact, last_goes_first, torch.ones_like(keep), 4, *fisher)
        ],
        "N:M": lambda: [ops.gram_n_of_m(exact, weight, weight != 0, 1, 2, *fisher)],
        "given: group scores": lambda: [ops.inverse_scores(given, weight, 4, status)],
        "given: update": lambda: [*ops.inverse_update(given, weight, keep, 4, True, True, status)],
        "given: update, nothing to remove": lambda: [
            *ops.inverse_update(given * float("nan"), weight * keep, keep, 1, False, True, status)
        ],
    }
    if size == LARGE:
        calls = {"gram": calls["gram"]}
    out: dict[str, list[torch.Tensor]] = {}
    for name, call in calls.items():
        try:
            out[name] = [t.double() for t in call() if t is not None]
        except RuntimeError as error:  # what the executor says of a deadlock or a stray access
            out[name] = [torch.full((1,), float("nan")), torch.tensor(len(str(error)))]
        if status.item() != -1:
            out[name].append(torch.tensor(float("nan")))
            status.fill_(-1)
    return out


def broken_kernels(module, size: int) -> set[str]:
    """Kernels of a changed module that give anything else than the true one, for some order."""
    broken = set()
    for seed in range(6):
        module.set_seed(seed)
        with native.using(module):
            found = results(size)
        for name, tensors in found.items():
            true = TRUE[size][name]
            same = len(tensors) == len(true) and all(
                a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=0)
                for a, b in zip(tensors, true, strict=True)
            )
            if not same:
                broken.add(name)
    return broken


def build_without(folder: Path, file: str, statement: str, occurrence: int) -> ModuleType:
    """The kernels with one occurrence of a statement in a file removed."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    path = folder / "csrc" / "pruning" / "cuda" / file
    parts = path.read_text().split(statement)
    assert len(parts) > occurrence + 1, f"{file} has too few {statement}"
    before, after = (statement.join(p) for p in (parts[: occurrence + 1], parts[occurrence + 1 :]))
    path.write_text(f"{before}(void)0;{after}")
    cache = ROOT / "build" / "host_cuda"
    return host_cuda_build.load(host_cuda_build.build(cache, kernels=folder / "csrc"))


TRUE: dict[int, dict[str, list[torch.Tensor]]] = {}
GREEDY = {"greedy", "greedy groups"}
REMOVALS = GREEDY | {"N:M"}
CHOLESKY = GREEDY | {"scores", "group scores", "inverse", "solve", "update", "given: update"}
GROUPS = {"group scores", "given: group scores"}
NOTHING = {"update, nothing to remove", "given: update, nothing to remove"}


# Not here: the same barriers of the tile kernel and of the greedy choice where a team is part of a
# warp.  The shuffles around them already bring the lanes together; they order memory, which the
# interpreter of PTX looks at (test_cuda_ptx.py).
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "statement", "occurrence", "size", "expected"),
    [
        ("gram.cu", "__syncthreads();", 0, LARGE, {"gram"}),
        ("gram.cu", "__syncthreads();", 1, LARGE, {"gram"}),
        ("gram.cu", "__syncthreads();", 2, LARGE, {"gram"}),
        ("gram.cu", "__syncthreads();", 0, COMPILED, {"gram"}),
        ("gram.cu", "__syncthreads();", 1, COMPILED, {"gram"}),
        ("gram.cu", "__syncthreads();", 2, SIZE, {"gram"}),
        ("gram.cu", "__syncthreads();", 3, SIZE, {"gram"}),
        *(
            ("gram_living.cu", "Workers::sync();", i, size, {"living"})
            for i in range(3)
            for size in (SIZE, COMPILED)
        ),
        ("gram_living.cu", "__syncthreads();", 0, SIZE, {"living"}),
        ("gram_living.cu", "__syncthreads();", 1, COMPILED, {"living"}),
        ("woodbury.cu", "T::sync();", 0, COMPILED, {"woodbury"}),
        ("woodbury.cu", "__syncthreads();", 0, COMPILED, {"woodbury"}),
        ("woodbury.cu", "__syncthreads();", 1, COMPILED, {"woodbury"}),
        ("woodbury.cu", "__syncthreads();", 2, COMPILED, {"woodbury"}),
        ("woodbury.cu", "__syncthreads();", 3, TOGETHER, {"woodbury"}),
        ("woodbury.cu", "__syncthreads();", 4, COMPILED, {"woodbury"}),
        ("woodbury.cu", "__syncthreads();", 5, SIZE, {"woodbury, no gradients"}),
        ("woodbury.cu", "__syncthreads();", 6, SIZE, {"woodbury"}),
        ("woodbury.cu", "__syncthreads();", 7, SIZE, {"woodbury"}),
        ("woodbury.cu", "__syncthreads();", 8, SIZE, {"woodbury"}),
        ("triangle.cuh", "T::sync();", 0, COMPILED, CHOLESKY),
        ("triangle.cuh", "T::sync();", 0, SIZE, CHOLESKY),
        ("factor.cuh", "T::sync();", 0, COMPILED, CHOLESKY - {"given: update"}),
        ("factor.cuh", "T::sync();", 2, COMPILED, GROUPS | {"greedy groups"}),
        ("factor.cuh", "T::sync();", 3, COMPILED, {"group update"}),
        ("factor.cuh", "T::sync();", 4, COMPILED, GROUPS),
        ("factor.cuh", "T::sync();", 5, COMPILED, NOTHING),
        ("factor.cuh", "T::sync();", 5, SIZE, NOTHING),
        ("factor.cu", "T::sync();", 0, COMPILED, {"scores"}),
        ("factor.cu", "T::sync();", 1, COMPILED, {"scores"}),
        ("removals.cuh", "T::sync();", 0, COMPILED, REMOVALS),
        ("removals.cuh", "T::sync();", 1, COMPILED, {"greedy groups"}),
        ("removals.cuh", "T::sync();", 2, COMPILED, REMOVALS),
        ("removals.cuh", "T::sync();", 3, COMPILED, REMOVALS),
        ("removals.cuh", "T::sync();", 4, COMPILED, REMOVALS),
        ("removals.cuh", "T::sync();", 0, SIZE, REMOVALS),
        ("removals.cuh", "T::sync();", 1, SIZE, {"greedy groups"}),
        ("removals.cuh", "T::sync();", 2, SIZE, REMOVALS),
        ("removals.cuh", "T::sync();", 3, SIZE, REMOVALS),
        ("greedy.cu", "T::sync();", 0, COMPILED, GREEDY),
        ("greedy.cu", "T::sync();", 0, SIZE, GREEDY),
        ("inverse_update.cu", "T::sync();", 0, COMPILED, {"given: update"}),
        ("inverse_scores.cu", "T::sync();", 0, COMPILED, {"given: group scores"}),
    ],
)
def test_a_removed_barrier_is_found(
    cuda_on_host, tmp_path, file, statement, occurrence, size, expected
):
    if size not in TRUE:
        TRUE[size] = results(size)
        assert broken_kernels(cuda_on_host, size) == set()
    module = build_without(tmp_path, file, statement, occurrence)
    assert broken_kernels(module, size) >= expected


# ---- sanitizers ----------------------------------------------------------------------

SANITIZED = """
import sys
sys.path[:0] = {folders!r}
from pathlib import Path
import host_cuda_build
import test_cuda_barriers
import test_cuda_fit_rows
from obert_kernels.ops import native
module = host_cuda_build.load(Path({library!r}))
for size in (4, 8, 20, 50, 64):
    with native.using(module):
        found = test_cuda_barriers.results(size)
    for name, tensors in found.items():
        assert all(t.isfinite().all() for t in tensors), (size, name)
with native.using(module):
    assert test_cuda_fit_rows.results()[0].isfinite().all()
print("clean")
"""


@pytest.mark.slow
def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    preload = []
    for name in ("libasan.so", "libstdc++.so"):
        found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True,
                               text=True).stdout.strip()  # fmt: skip
        if not Path(found).is_absolute():
            pytest.skip(f"the compiler has no {name}")
        preload.append(found)
    library = host_cuda_build.build(
        ROOT / "build" / "host_cuda",
        extra=["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g1"],
    )
    script = SANITIZED.format(
        folders=[str(ROOT / "tests" / "support"), str(ROOT / "tests" / "cuda")],
        library=str(library),
    )
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "clean"
