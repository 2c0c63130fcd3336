"""The CUDA kernels, executed on the host: bytes moved, refusals, determinism, barriers.

That their results are right is tested with all other operators, see the fixture ``isa``.
"""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import host_cuda_build
import pytest
import torch
from problems import DAMPING, gradients, gram_of, relative_error
from tiny import TinyEncoder, batches

from obert_kernels import ops, prune, reference

ROOT = Path(__file__).parent.parent
SIZES = [4, 8, 16, 32, 48, 50, 64, 96, 100, 128]


def triangle(n: int) -> int:
    return n * (n + 1) // 2


def lengths(n: int, size: int) -> list[int]:
    """Weights in each block."""
    return [min(size, n - start) for start in range(0, n, size)]


def moved(module, call) -> tuple[int, int]:
    """Bytes of device memory a call reads and writes, and its result must be no failure."""
    module.reset_counters()
    call()
    counters = module.counters()
    return counters["load_bytes"], counters["store_bytes"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 16, 35])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_specialisation_type_and_number_of_gradients(cuda_on_host, size, k, dtype):
    cuda_on_host.set_seed(size * 1000 + k)
    for n in (max(1, size // 3), 2 * size + 1):
        g = gradients(k, n + 3, 0.1).to(dtype)[:, 2 : n + 2]  # any alignment, rows apart
        blocks = reference.num_blocks(n, size)
        for gram_dtype, allowed in ((torch.float64, 1e-14), (torch.float32, 1e-5)):
            gram = torch.zeros(blocks, triangle(size), dtype=gram_dtype)
            ops.gram_accumulate(gram, g, size)
            assert relative_error(gram, gram_of(g.double(), size)) < allowed
        inverse = (torch.eye(size) / DAMPING).repeat(blocks, 1, 1)
        expected, status = inverse.clone(), ops.new_status()
        ops.woodbury_update(inverse, g, float(k), status)
        reference.woodbury_update(expected, g.float(), float(k), ops.new_status())
        assert status.item() == -1
        assert relative_error(inverse, expected) < 1e-4


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("k", [1, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_and_woodbury_move_every_byte_once(cuda_on_host, size, k, dtype):
    n = 3 * size + size // 2
    g = gradients(k, n).to(dtype)
    blocks = reference.num_blocks(n, size)
    read = k * n * dtype.itemsize
    for gram_dtype in (torch.float32, torch.float64):
        gram = torch.zeros(blocks, triangle(size), dtype=gram_dtype)
        state = gram.numel() * gram_dtype.itemsize
        got = moved(cuda_on_host, lambda gram=gram: ops.gram_accumulate(gram, g, size))
        assert got == (state + read, state)
    inverse = (torch.eye(size) / DAMPING).repeat(blocks, 1, 1)
    status = ops.new_status()
    got = moved(cuda_on_host, lambda: ops.woodbury_update(inverse, g, float(k), status))
    assert status.item() == -1
    assert got == (4 * blocks * size**2 + read, 4 * blocks * size**2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("gram_dtype", [torch.float32, torch.float64])
def test_what_is_made_of_a_gram_reads_it_once(cuda_on_host, size, gram_dtype):
    n = 3 * size + size // 2
    gram = gram_of(gradients(30, n), size, gram_dtype)
    weight, keep = torch.randn(n), torch.arange(n) % 2 == 0  # every block loses weights
    status = ops.new_status()
    fisher = (size, 30.0, DAMPING, status)
    state = sum(map(triangle, lengths(n, size))) * gram_dtype.itemsize
    blocks = gram.shape[0]
    expected = {
        "diagonal": (state, 4 * n),
        "inverse": (state, 4 * blocks * size**2),
        "solve": (state + 4 * n, 4 * n),
        "scores": (state + 4 * n, 4 * n),
        "sum": (state + 5 * n, 4 * n + 8 * blocks),
        "joint": (state + 5 * n, 4 * n + 8 * blocks),
    }
    made = (n, size, 30.0, DAMPING, torch.float32, status)
    calls = {
        "diagonal": lambda: ops.gram_diagonal(gram, *made),
        "inverse": lambda: ops.gram_inverse(gram, *made),
        "solve": lambda: ops.gram_solve(gram, weight, *fisher),
        "scores": lambda: ops.gram_scores(gram, weight, 1, *fisher),
        "sum": lambda: ops.gram_update(gram, weight, keep, 1, False, *fisher),
        "joint": lambda: ops.gram_update(gram, weight, keep, 1, True, *fisher),
    }
    assert {name: moved(cuda_on_host, call) for name, call in calls.items()} == expected
    assert status.item() == -1


@pytest.mark.parametrize("size", SIZES)
def test_what_is_made_of_an_inverse_reads_what_it_needs(cuda_on_host, size):
    n = 4 * size
    inverse = reference.gram_inverse(
        gram_of(gradients(30, n), size), n, size, 30.0, DAMPING, torch.float32, ops.new_status()
    )
    weight, keep = torch.randn(n), torch.zeros(n, dtype=torch.bool)
    status = ops.new_status()
    lower = 4 * triangle(size) * 4
    rest = (weight, keep, 1)
    assert moved(cuda_on_host, lambda: ops.inverse_scores(inverse, weight, 1, status)) == (
        8 * n,
        4 * n,
    )
    assert moved(cuda_on_host, lambda: ops.inverse_scores(inverse, weight, 4, status))[0] == (
        4 * n + n // 4 * 10 * 4
        if size % 4 == 0
        else pytest.approx(4 * n + n // 4 * 10 * 4, rel=0.1)
    )
    for joint in (False, True):
        got = moved(
            cuda_on_host, lambda j=joint: ops.inverse_update(inverse, *rest, j, True, status)
        )
        assert got == (lower + 5 * n, 4 * n + 8 * 4)
    assert status.item() == -1


def test_a_size_the_device_cannot_hold_is_refused_with_the_largest_that_fits(cuda_on_host):
    gram, status = torch.zeros(1, triangle(256), dtype=torch.float64), ops.new_status()
    made = (256, 256, 1.0, DAMPING, torch.float32, status)
    with pytest.raises(ValueError, match=r"gram_inverse: block size 256 needs \d+ bytes") as caught:
        ops.gram_inverse(gram, *made)
    largest = int(str(caught.value).rsplit(" ", 1)[1])
    gram = torch.zeros(1, triangle(largest), dtype=torch.float64)
    made = (largest, largest, 1.0, DAMPING, torch.float32, status)
    expected = torch.eye(largest)[None] / DAMPING
    torch.testing.assert_close(ops.gram_inverse(gram, *made), expected)
    cuda_on_host.set_shared_memory_limit(64 * 1024)  # as on compute 7.5
    try:
        with pytest.raises(ValueError, match=rf"block size {largest} .* 65536 for a thread block"):
            ops.gram_inverse(gram, *made)
        # The Gram needs more bands of rows there, and nothing else.
        g = gradients(5, 256)
        gram = torch.zeros(1, triangle(256), dtype=torch.float64)
        ops.gram_accumulate(gram, g, 256)
        assert relative_error(gram, gram_of(g, 256)) < 1e-14
    finally:
        cuda_on_host.set_shared_memory_limit(231424)


@pytest.mark.parametrize("size", [4, 16, 50, 64, 70])
def test_order_of_threads_does_not_change_a_bit(cuda_on_host, size):
    n = 6 * size
    g, weight, keep = gradients(20, n), torch.randn(n), torch.rand(n) < 0.5
    blocks = reference.num_blocks(n, size)
    results = []
    for seed in range(4):
        cuda_on_host.set_seed(seed)
        gram = torch.zeros(blocks, triangle(size))
        inverse = (torch.eye(size) / DAMPING).repeat(blocks, 1, 1)
        status = ops.new_status()
        fisher = (size, 20.0, DAMPING, status)
        ops.gram_accumulate(gram, g, size)
        ops.woodbury_update(inverse, g, 20.0, status)
        results.append([
            gram,
            inverse,
            ops.gram_scores(gram, weight, 2, *fisher),
            *ops.gram_update(gram, weight, keep, 2, False, *fisher),
            *ops.gram_update(gram, weight, keep, 2, True, *fisher),
            *ops.inverse_update(inverse, weight, keep, 2, False, True, status),
        ])  # fmt: skip
        assert status.item() == -1
        assert torch.equal(inverse, inverse.mT), "the state stays exactly symmetric"
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_the_first_failed_block_is_reported_and_keeps_its_state(cuda_on_host):
    size, blocks = 16, 40
    g = gradients(3, size * blocks)
    g[1, 23 * size + 5] = float("nan")
    g[2, 11 * size] = float("inf")
    before = (torch.eye(size) / DAMPING).repeat(blocks, 1, 1)
    for seed in range(3):
        cuda_on_host.set_seed(seed)
        inverse, status = before.clone(), ops.new_status()
        ops.woodbury_update(inverse, g, 3.0, status)
        assert status.item() == 11
        assert torch.equal(inverse[[11, 23]], before[[11, 23]])
        assert torch.isfinite(inverse).all()


@pytest.mark.parametrize("update", ["sum", "joint"])
def test_a_model_is_pruned_as_on_the_cpu(cuda_on_host, monkeypatch, update):
    torch.manual_seed(5)
    model = TinyEncoder()
    pruned = {}
    for where in ("device", "cpu"):
        if where == "cpu":
            monkeypatch.undo()
        else:
            cuda_on_host.reset_counters()
        pruned[where] = prune(
            copy.deepcopy(model), batches(), 0.6, num_grads=24, block_size=50, update=update
        )
        if where == "device":
            assert cuda_on_host.counters()["load_bytes"] > 0
    assert pruned["device"].report.sparsity == pruned["cpu"].report.sparsity
    for name, mask in pruned["cpu"].masks.items():
        assert torch.equal(mask, pruned["device"].masks[name])
    for a, b in zip(
        pruned["device"].model.parameters(), pruned["cpu"].model.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# ---- every barrier is needed ---------------------------------------------------------

N, SIZE = 100, 20  # the general kernels
COMPILED = 50


def results(size: int) -> dict[str, list[torch.Tensor]]:
    """What every kernel with a barrier makes of one problem."""
    torch.manual_seed(3)
    n = 2 * size
    g, weight, keep = gradients(20, n), torch.randn(n), torch.rand(n) < 0.5
    exact = gram_of(g, size)
    inverse = (torch.eye(size) / DAMPING).repeat(2, 1, 1)
    status = ops.new_status()
    given = reference.gram_inverse(exact, n, size, 20.0, DAMPING, torch.float32, ops.new_status())
    fisher = (size, 20.0, DAMPING, status)
    made = (n, size, 20.0, DAMPING, torch.float64, status)
    gram = torch.zeros_like(exact)
    calls = {
        "gram": lambda: [gram, ops.gram_accumulate(gram, g, size)],
        "woodbury": lambda: [inverse, ops.woodbury_update(inverse, g, 20.0, status)],
        "scores": lambda: [ops.gram_scores(exact, weight, 1, *fisher)],
        "group scores": lambda: [ops.gram_scores(exact, weight, 4, *fisher)],
        "inverse": lambda: [ops.gram_inverse(exact, *made)],
        "solve": lambda: [ops.gram_solve(exact, weight, *fisher)],
        "update": lambda: [*ops.gram_update(exact, weight, keep, 1, False, *fisher)],
        "given: group scores": lambda: [ops.inverse_scores(given, weight, 4, status)],
        "given: update": lambda: [*ops.inverse_update(given, weight, keep, 4, True, True, status)],
    }
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


def broken_kernels(module, size: int, monkeypatch) -> set[str]:
    """Kernels of a changed module that give anything else than the true one, for some order."""
    monkeypatch.setattr(ops, "_run_on", lambda state: (module, 0))
    broken = set()
    for seed in range(6):
        module.set_seed(seed)
        for name, tensors in results(size).items():
            true = TRUE[size][name]
            same = len(tensors) == len(true) and all(
                a.shape == b.shape and torch.allclose(a, b, rtol=1e-3)
                for a, b in zip(tensors, true, strict=True)
            )
            if not same:
                broken.add(name)
    return broken


TRUE: dict[int, dict[str, list[torch.Tensor]]] = {}
CHOLESKY = {"scores", "group scores", "inverse", "solve", "update", "given: update"}


# Not shown: the same barrier of the tile kernel where a team is part of a warp.  The shuffles
# around it already bring the lanes together; it orders memory, which is not modelled here.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "statement", "occurrence", "size", "expected"),
    [
        ("gram.cu", "__syncthreads();", 1, COMPILED, {"gram"}),
        ("gram.cu", "__syncthreads();", 3, SIZE, {"gram"}),
        ("woodbury.cu", "T::sync();", 0, COMPILED, {"woodbury"}),
        ("woodbury.cu", "__syncthreads();", 4, SIZE, {"woodbury"}),
        ("triangle.cuh", "T::sync();", 0, COMPILED, CHOLESKY),
        ("triangle.cuh", "T::sync();", 0, SIZE, CHOLESKY),
        ("factor.cuh", "T::sync();", 2, COMPILED, {"group scores", "given: group scores"}),
    ],
)
def test_a_removed_barrier_is_found(
    cuda_on_host, monkeypatch, tmp_path, file, statement, occurrence, size, expected
):
    if size not in TRUE:
        TRUE[size] = results(size)
        assert broken_kernels(cuda_on_host, size, monkeypatch) == set()
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / file
    parts = path.read_text().split(statement)
    assert len(parts) > occurrence + 1, f"{file} has too few {statement}"
    changed = (
        statement.join(parts[: occurrence + 1]) + ";" + statement.join(parts[occurrence + 1 :])
    )
    path.write_text(changed)
    cache = ROOT / "build" / "host_cuda"
    module = host_cuda_build.load(host_cuda_build.build(cache, kernels=tmp_path / "csrc"))
    assert broken_kernels(module, size, monkeypatch) >= expected


# ---- sanitizers ----------------------------------------------------------------------

SANITIZED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import host_cuda_build
import test_cuda_kernels
from obert_kernels import ops
module = host_cuda_build.load(Path({library!r}))
ops._run_on = lambda state: (module, 0)
for size in (4, 8, 20, 50, 64):
    for name, tensors in test_cuda_kernels.results(size).items():
        assert all(t.isfinite().all() for t in tensors), (size, name)
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
    script = SANITIZED.format(tests=str(ROOT / "tests"), library=str(library))
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
