"""The host execution of CUDA kernels in host_cuda/: right kernels run, wrong ones are caught."""

import ctypes
import math
import os
import shutil
import subprocess
import sys
from ctypes import byref, c_char_p, c_double, c_float, c_int, c_uint, c_uint64, c_ulonglong
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "support" / "host_cuda"

INVALID_VALUE, INVALID_CONFIGURATION = 1, 9

# kind of mistake in selftest.cu -> what the message must say
MISTAKES = {
    0: "deadlock: threads 0-31: waiting at __syncthreads; threads 32-63: exited",
    1: "is at __syncthreads",
    2: "threads 40: waiting at __syncwarp(0xffffffff)",
    3: "lanes of one mask at different operations",
    4: "__syncwarp(0x0000ffff) and is not in the mask",
    5: "__syncwarp(0xffffffff)",
    6: "is not a multiple of 16",
    7: "stack overflow",
    8: "width",
    9: "__trap()",
    10: "write behind the end of the dynamic shared memory",
    11: "which is not in the mask of __shfl_xor_sync(0x",
    12: "reads lane 3, which is not in the mask of __shfl_sync(0x",
    13: "is not a multiple of 16",
}
OUT_OF_BOUNDS = 10


OPTIONS = "-O1 -fsanitize=alignment -Wall -Wextra -Werror".split()


def compile_selftest(library: Path, *flags: str) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    command = ["g++", "-std=c++17", *OPTIONS, *flags]
    command += ["-Wno-unknown-pragmas", "-shared", "-fPIC", "-I", str(HERE)]
    command += ["-x", "c++", str(HERE / "selftest.cu"), str(HERE / "executor.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return library


@pytest.fixture(scope="module")
def lib(tmp_path_factory):
    path = tmp_path_factory.mktemp("host_cuda") / "selftest.so"
    return ctypes.CDLL(str(compile_selftest(path)))


def run(lib, function: str, *args) -> tuple[int, str]:
    """The CUDA error, or -1, and the message that was thrown."""
    message = ctypes.create_string_buffer(1000)
    result = getattr(lib, function)(message, *args)
    return result, message.value.decode()


def run_well(lib, function: str, *args) -> None:
    assert run(lib, function, *args) == (0, "")


def block_sums(lib, seed: int, *, barrier: bool, blocks: int = 3) -> list[float]:
    n = 256 * blocks
    values, sums = (c_float * n)(*range(n)), (c_float * blocks)()
    lib.host_cuda_set_seed(c_uint64(seed))
    run_well(lib, "run_block_sum", barrier, blocks, values, sums)
    return list(sums)


EXPECTED_SUMS = [float(sum(range(256 * b, 256 * b + 256))) for b in range(3)]


def test_block_reduction(lib):
    for seed in range(5):
        assert block_sums(lib, seed, barrier=True) == EXPECTED_SUMS


def test_a_missing_barrier_shows(lib):
    wrong = [block_sums(lib, seed, barrier=False) for seed in range(5)]
    assert all(sums != EXPECTED_SUMS for sums in wrong)
    assert any(math.isnan(value) for sums in wrong for value in sums)


def test_the_seed_fixes_the_order(lib):
    def first_thread(seed: int) -> int:
        counter, extremes, results = c_ulonglong(), (c_int * 4)(), (c_double * 6)()
        lib.host_cuda_set_seed(c_uint64(seed))
        run_well(lib, "run_arithmetic", byref(counter), extremes, results)
        return extremes[2]

    firsts = [first_thread(seed) for seed in range(20)]
    assert firsts == [first_thread(seed) for seed in range(20)]
    assert len(set(firsts)) > 10


def test_warp_operations(lib):
    out = (c_double * (32 * 8))()
    run_well(lib, "run_warp_operations", out)
    for lane in range(32):
        segment = lane // 8 * 8
        assert list(out[8 * lane : 8 * lane + 8]) == [
            496,
            496 * 2**40,
            lane * (lane + 1) / 2,
            (lane + 3 if lane + 3 < segment + 8 else lane) + 0.5,
            segment + 1,
            sum(1 << i for i in range(0, 32, 3)),
            2,
            3 if lane < 4 else 0,
        ]


def test_groups_within_a_warp_are_independent(lib):
    out = (c_float * 128)()
    for seed in range(5):
        lib.host_cuda_set_seed(c_uint64(seed))
        run_well(lib, "run_group_sums", out)
        for thread in range(128):
            group = thread // 8
            assert out[thread] == (8 * group + 3.5 if group > 0 else thread)


def test_block_votes(lib):
    out = (c_int * 70)()
    run_well(lib, "run_block_votes", out)
    assert list(out) == [501] * 70


def test_every_thread_runs_once(lib):
    for grid, block in [((3, 4, 5), (6, 7, 2)), ((1, 1, 1), (1024, 1, 1)), ((97, 1, 1), (3, 1, 1))]:
        n = math.prod(grid) * math.prod(block)
        visits = (c_int * n)()
        run_well(lib, "run_visit", (c_uint * 3)(*grid), (c_uint * 3)(*block), visits)
        assert list(visits) == [1] * n


def test_launch_limits(lib):
    text = c_char_p()
    lib.take_last_error(byref(text))
    good = (1, 1, 1)
    for grid, block in [
        (good, (1025, 1, 1)),
        (good, (32, 33, 1)),
        (good, (1, 1, 65)),
        (good, (32, 0, 1)),
        ((0, 1, 1), good),
        ((2**31, 1, 1), good),
        ((1, 65536, 1), good),
        ((1, 1, 65536), good),
    ]:
        result = run(lib, "run_visit", (c_uint * 3)(*grid), (c_uint * 3)(*block), (c_int * 1)())
        assert result == (INVALID_CONFIGURATION, "")
        assert lib.take_last_error(byref(text)) == INVALID_CONFIGURATION
        assert text.value == b"invalid configuration argument"
        assert lib.take_last_error(byref(text)) == 0


def test_dynamic_shared_memory_limits(lib):
    def result(opted: int, asked: int) -> int:
        return run(lib, "run_with_shared_memory", opted, asked, (c_int * 1)())[0]

    assert lib.shared_memory_limit() == 232448 - 1024
    assert result(-1, 48 * 1024) == 0
    assert result(-1, 48 * 1024 + 1) == INVALID_VALUE
    assert result(100_000, 100_000) == 0
    assert result(-1, 100_000) == 0  # remembered for the kernel
    assert result(-1, 100_001) == INVALID_VALUE
    assert result(232448 - 1024, 232448 - 1024) == 0
    assert result(232448 - 1023, 0) == INVALID_VALUE
    try:
        assert lib.host_cuda_set_shared_memory_limit(64 * 1024) == 1
        assert lib.shared_memory_limit() == 64 * 1024
        assert result(-1, 100_000) == INVALID_VALUE
        assert result(100_000, 0) == INVALID_VALUE
        assert lib.host_cuda_set_shared_memory_limit(232448) == 0
    finally:
        assert lib.host_cuda_set_shared_memory_limit(232448 - 1024) == 1


def test_counters_are_exact(lib):
    values, copied, counters = (c_float * 160)(*range(160)), (c_float * 160)(), (c_uint64 * 5)()
    lib.host_cuda_reset_counters()
    run_well(lib, "run_copy", values, copied)
    lib.host_cuda_counters(counters)
    assert list(copied) == list(values)
    assert list(counters) == [10 * 64, 10 * 64, 10 * 9, 10 * 9, 0]
    lib.host_cuda_reset_counters()
    lib.host_cuda_counters(counters)
    assert list(counters) == [0] * 5


def test_atomics_and_mathematics(lib):
    counter, extremes, results = c_ulonglong(5), (c_int * 4)(), (c_double * 6)()
    run_well(lib, "run_arithmetic", byref(counter), extremes, results)
    assert counter.value == 105
    assert list(extremes[:2]) == [-7, 99]
    assert extremes[2] in range(1, 101)
    assert extremes[3] == 1
    assert list(results) == [0.875, 7.75, 1.75, 9.5, 39, 46]


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_an_error(lib, kind):
    for seed in range(3):
        lib.host_cuda_set_seed(c_uint64(seed))
        result, message = run(lib, "run_mistake", kind, (c_float * 16)())
        assert result == -1
        assert message.startswith("kernel launch of grid (3,1,1), thread blocks (64,1,1), 64 bytes")
        assert "thread block (" in message
        assert MISTAKES[kind] in message
        assert block_sums(lib, seed, barrier=True) == EXPECTED_SUMS  # still usable


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Runs this file as a program on a build with AddressSanitizer."""
    # libstdc++ as well: the sanitizer looks for its exceptions when the process starts.
    runtimes = []
    for name in ("libasan.so", "libstdc++.so"):
        command = ["gcc", f"-print-file-name={name}"]
        found = subprocess.run(command, capture_output=True, text=True).stdout.strip()
        if not Path(found).is_absolute():  # gcc repeats the name of what it doesn't have
            pytest.skip(f"gcc has no {name}")
        runtimes.append(found)
    path = tmp_path_factory.mktemp("host_cuda_asan") / "selftest.so"
    compile_selftest(path, "-fsanitize=address", "-g")
    # Leaks: Python's own.  malloc: so that the ends of the arrays are watched.
    env = {"LD_PRELOAD": " ".join(runtimes), "PYTHONMALLOC": "malloc"}
    env["ASAN_OPTIONS"] = "detect_leaks=0"

    def run_file(what: str) -> subprocess.CompletedProcess:
        command = [sys.executable, __file__, str(path), what]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **env})

    return run_file


def test_address_sanitizer_finds_nothing_in_the_executor(sanitized):
    result = sanitized("everything")
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_address_sanitizer_finds_a_write_behind_shared_memory(sanitized):
    result = sanitized("out of bounds")
    assert result.returncode != 0
    assert "use-after-poison" in result.stderr
    assert "selftest.cu" in result.stderr


def main(path: str, what: str) -> None:
    lib = ctypes.CDLL(path)
    if what == "out of bounds":
        run(lib, "run_mistake", OUT_OF_BOUNDS, (c_float * 16)())
        return
    test_block_reduction(lib)
    test_a_missing_barrier_shows(lib)
    test_the_seed_fixes_the_order(lib)
    test_warp_operations(lib)
    test_groups_within_a_warp_are_independent(lib)
    test_block_votes(lib)
    test_every_thread_runs_once(lib)
    test_launch_limits(lib)
    test_dynamic_shared_memory_limits(lib)
    test_counters_are_exact(lib)
    test_atomics_and_mathematics(lib)
    for kind in MISTAKES:
        if kind != OUT_OF_BOUNDS:
            test_a_mistake_is_an_error(lib, kind)
    print("done")


if __name__ == "__main__":
    main(*sys.argv[1:])
