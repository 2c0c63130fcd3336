"""Registers, shared memory and theoretical occupancy of every CUDA kernel; needs no GPU.

    python -m benchmarks.kernels.occupancy    # about a minute the first time, then seconds

The kernels are compiled for compute capability 8.0 and 9.0; ptxas says what each needs.  The
launches are those the operators make, recorded on the host; the toolkit's cuda_occupancy.h
calculates how many thread blocks of a launch fit on a multiprocessor.  Nothing is measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.support.report import new_document, table, write
from obert_kernels import ops
from obert_kernels.ops import native
from obert_kernels.ops.living import gram_accumulate_living

ROOT = Path(__file__).resolve().parents[2]
KERNELS = ROOT / "csrc" / "pruning" / "cuda"
CACHE = ROOT / "build" / "ptx"
# Longest compilation first.
SOURCES = [
    "factor", "inverse_update", "greedy", "update", "inverse_scores", "n_of_m", "gram",
    "gram_living", "woodbury", "fit_rows",
]  # fmt: skip
# What setup.py gives nvcc for device code; warnings are looked for in the output instead.
FLAGS = ["-std=c++17", "-O3"]
ARCHITECTURES = (80, 90)
BLOCK_SIZES = [4, 8, 16, 32, 48, 50, 64, 96, 128]
GENERAL = [6, 12, 24, 40, 100, 160]  # nobody compiled these: one for each team of general kernels
ANY = 0  # of kernels that know no block size
DESCRIBED = [32, 50, 64, 128]
ARCH_NAMES = "sm_80 / sm_90"
LABEL = "compiled and calculated, not measured; no device has run this"
# Largest dynamic shared memory of a thread block.  The host execution grants 1 KiB less than the
# 227 KiB of compute capability 9.0; no launch below comes that close.
SHARED_LIMIT = {80: 163 * 1024, 90: 226 * 1024}

# Reads "major minor registers barriers threads dynamic_bytes" for each launch and answers with
# "blocks limits".  Limits of compute capability 8.0 and 9.0: CUDA C++ Programming Guide.
CALCULATOR = r"""
#include <cuda_occupancy.h>
#include <cstdio>

int main() {
    int major, minor, registers, barriers, threads;
    size_t bytes;
    while (std::scanf("%d %d %d %d %d %zu", &major, &minor, &registers, &barriers, &threads,
                      &bytes) == 6) {
        cudaOccDeviceProp device;
        device.computeMajor = major;
        device.computeMinor = minor;
        device.maxThreadsPerBlock = 1024;
        device.maxThreadsPerMultiprocessor = 2048;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536;
        device.warpSize = 32;
        device.sharedMemPerBlock = 48 * 1024;
        device.sharedMemPerMultiprocessor = (major == 9 ? 228 : 164) * 1024;
        device.sharedMemPerBlockOptin = (major == 9 ? 227 : 163) * 1024;
        device.reservedSharedMemPerBlock = 1024;
        device.numSms = major == 9 ? 132 : 108;
        cudaOccFuncAttributes kernel;
        kernel.maxThreadsPerBlock = 1024;
        kernel.numRegs = registers;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        kernel.maxDynamicSharedSizeBytes = bytes;
        kernel.numBlockBarriers = barriers;
        cudaOccDeviceState state;
        cudaOccResult result;
        if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads,
                                                    bytes) != CUDA_OCC_SUCCESS)
            return 1;
        std::printf("%d %u\n", result.activeBlocksPerMultiprocessor, result.limitingFactors);
    }
}
"""
LIMITS = {1: "threads", 2: "registers", 4: "shared memory", 8: "thread blocks", 16: "barriers"}


# ---- compilation -------------------------------------------------------------------


@dataclass(frozen=True)
class Kernel:
    """What ptxas says about one kernel."""

    name: str
    arch: int
    registers: int
    barriers: int
    stack_bytes: int
    spill_bytes: int
    local_bytes: int
    static_shared_bytes: int


def _run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


@functools.cache
def _digest() -> str:
    """Of everything the PTX depends on."""
    csrc = ROOT / "csrc"
    pruning = csrc / "pruning"
    files = [csrc / "common" / "types.h", *sorted(pruning.glob("*.*")), *sorted(KERNELS.iterdir())]
    digest = hashlib.sha256((" ".join(FLAGS) + _run(["nvcc", "--version"])).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(task: tuple[str, int, bool]) -> tuple[Path, str]:
    """The PTX of one source and what nvcc and ptxas said; machine code only if asked for."""
    source, arch, machine_code = task
    ptx = CACHE / _digest() / f"{source}_{arch}.ptx"
    said, ptxas_said = ptx.with_suffix(".nvcc.txt"), ptx.with_suffix(".ptxas.txt")
    mine = f".{os.getpid()}"  # another process may compile the same
    if not ptx.exists():
        ptx.parent.mkdir(parents=True, exist_ok=True)
        command = ["nvcc", *FLAGS, "-ptx", f"-arch=compute_{arch}"]
        command += [str(KERNELS / f"{source}.cu"), "-o", f"{ptx}{mine}"]
        said.write_text(_run(command))
        Path(f"{ptx}{mine}").replace(ptx)
    if machine_code and not ptxas_said.exists():
        command = ["nvcc", *FLAGS, "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", str(ptx)]
        cubin = Path(f"{ptx.with_suffix('.cubin')}{mine}")
        partial = Path(f"{ptxas_said}{mine}")
        partial.write_text(_run([*command, "-o", str(cubin)]))
        cubin.unlink()
        partial.replace(ptxas_said)
    return ptx, said.read_text() + (ptxas_said.read_text() if machine_code else "")


def ptx(source: str, arch: int) -> str:
    """The PTX of one source for a compute capability, as 75."""
    return _compile((source, arch, False))[0].read_text()


def compile_kernels(machine_code: bool) -> dict[tuple[str, int], tuple[Path, str]]:
    """PTX file and compiler output by (source, architecture); compiled when first asked for."""
    tasks = [(source, arch, machine_code) for source in SOURCES for arch in ARCHITECTURES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(_compile, tasks))
    return {task[:2]: result for task, result in zip(tasks, results, strict=True)}


def demangled(names: Iterable[str]) -> dict[str, str]:
    names = list(names)
    return dict(zip(names, _run(["c++filt"], "\n".join(names)).splitlines(), strict=True))


def kernels() -> list[Kernel]:
    """Every kernel on every architecture."""
    found = []
    number = {  # as ptxas words it; it leaves out what is zero
        "registers": r"Used (\d+) registers",
        "barriers": r"used (\d+) barriers",
        "stack_bytes": r"(\d+) bytes stack frame",
        "local_bytes": r"(\d+) bytes lmem",
        "static_shared_bytes": r"(\d+) bytes smem",
    }
    for (_, arch), (_, said) in compile_kernels(True).items():
        for part in said.split("Compiling entry function")[1:]:
            match = re.match(r" '(\S+)' for 'sm_(\d+)'", part)
            assert match and int(match[2]) == arch, part
            values = {k: int(m[1]) if (m := re.search(p, part)) else 0 for k, p in number.items()}
            spills = re.findall(r"(\d+) bytes spill", part)
            assert values["registers"] and len(spills) == 2, part
            found.append(Kernel(match[1], arch, spill_bytes=sum(map(int, spills)), **values))
    name = demangled({kernel.name for kernel in found})
    return [Kernel(**asdict(kernel) | {"name": name[kernel.name]}) for kernel in found]


# ---- launches ----------------------------------------------------------------------


@functools.cache
def _symbols(library: str) -> dict[int, str]:
    """Demangled names of the functions in a library, by where they begin."""
    lines = [line.split(maxsplit=2) for line in _run(["nm", "-C", library]).splitlines()]
    return {int(line[0], 16): line[2] for line in lines if len(line) == 3 and line[1] in "tT"}


def record_all(host: ModuleType, call: Callable[[], Any]) -> tuple[Any, list[dict[str, Any]]]:
    """What ``call`` returns and the launches it asks for, which are not run.

    Args:
        host: the kernels compiled for the host (tests/support/host_cuda_build.py).
        call: runs one operator on ``host``.
    """
    host.set_recording(True)
    try:
        result, launches = call(), host.launches()
    finally:
        host.set_recording(False)
    symbols = _symbols(host.__file__)
    return result, [launch | {"kernel": symbols[launch["kernel"]]} for launch in launches]


def record(host: ModuleType, call: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
    """The same, but the last launch alone."""
    result, launches = record_all(host, call)
    return result, launches[-1]


def operators(size: int) -> dict[str, Callable[[], Any]]:
    """Each family of kernels with a call that makes it launch."""
    n, m = 4 * size, 256
    gradients = torch.zeros(m, n)
    weight, keep = torch.zeros(n), torch.zeros(n, dtype=torch.bool)
    wide = torch.zeros(4, size * (size + 1) // 2, dtype=torch.float64)
    narrow, inverse = wide.float(), wide.float()
    status = ops.new_status()
    fisher = (size, float(m), 1e-4, status)
    blocks, places = torch.arange(5), torch.arange(n, dtype=torch.int32)
    living = (gradients, blocks[:4] * wide.shape[1], blocks * size, places)
    kept, group = (2, 4) if size % 4 == 0 else (1, 2)
    return {
        "gram, float32": lambda: ops.gram_accumulate(narrow, gradients, size),
        "gram, float64": lambda: ops.gram_accumulate(wide, gradients, size),
        "gram of the living, float32": lambda: gram_accumulate_living(narrow.view(-1), *living),
        "gram of the living, float64": lambda: gram_accumulate_living(wide.view(-1), *living),
        "woodbury": lambda: ops.woodbury_update(inverse, gradients, float(m), status),
        "gram scores, single": lambda: ops.gram_scores(wide, weight, 1, *fisher),
        "gram scores, groups of 4": lambda: ops.gram_scores(wide, weight, 4, *fisher),
        "gram inverse": lambda: ops.gram_inverse(
            wide, n, size, float(m), 1e-4, torch.float32, status
        ),
        "gram solve": lambda: ops.gram_solve(wide, weight, *fisher),
        "gram update": lambda: ops.gram_update(wide, weight, keep, 1, False, *fisher),
        "gram greedy scores, single": lambda: ops.gram_greedy_scores(
            wide, weight, keep, 1, *fisher
        ),
        "gram greedy scores, groups of 4": lambda: ops.gram_greedy_scores(
            wide, weight, keep, 4, *fisher
        ),
        "gram N:M, 2:4 or 1:2": lambda: ops.gram_n_of_m(wide, weight, keep, kept, group, *fisher),
        "inverse scores, single": lambda: ops.inverse_scores(inverse, weight, 1, status),
        "inverse scores, groups of 4": lambda: ops.inverse_scores(inverse, weight, 4, status),
        "inverse update, sum": lambda: ops.inverse_update(
            inverse, weight, keep, 1, False, False, status
        ),
        "inverse update, joint": lambda: ops.inverse_update(
            inverse, weight, keep, 1, True, True, status
        ),
    }


def of_any_size() -> dict[str, Callable[[], Any]]:
    """The same of an operator that knows no block size: supports of up to 64 columns, and more."""

    def fit(columns: int) -> Callable[[], Any]:
        moments, keep = torch.zeros(columns, columns).double(), torch.ones(9, columns).bool()
        given = (moments, torch.zeros(9, columns).double(), keep, torch.arange(10))
        return lambda: ops.fit_rows(*given, ops.new_status())

    return {"fit rows, in shared memory": fit(64), "fit rows, in a workspace": fit(128)}


# ---- occupancy ---------------------------------------------------------------------


@functools.cache
def _calculator() -> Path:
    digest = hashlib.sha256((CALCULATOR + _run(["nvcc", "--version"])).encode()).hexdigest()[:16]
    program = CACHE / f"occupancy_{digest}"
    if not program.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        source = program.with_suffix(".cpp")
        source.write_text(CALCULATOR)
        partial = program.with_suffix(f".{os.getpid()}")
        _run(["nvcc", "-std=c++17", str(source), "-o", str(partial)])
        partial.replace(program)
    return program


def rows(host: ModuleType) -> list[dict[str, Any]]:
    """One row for each family, block size and architecture."""
    needs = {(kernel.name, kernel.arch): kernel for kernel in kernels()}
    result: list[dict[str, Any]] = []
    with contextlib.ExitStack() as afterwards:
        afterwards.enter_context(native.using(host))
        afterwards.callback(host.set_shared_memory_limit, SHARED_LIMIT[90])
        for arch in ARCHITECTURES:
            host.set_shared_memory_limit(SHARED_LIMIT[arch])
            for size in [*BLOCK_SIZES, *GENERAL, ANY]:
                calls = of_any_size() if size == ANY else operators(size)
                for family, call in calls.items():
                    row = {"family": family, "B": size, "general": size in GENERAL, "arch": arch}
                    result.append(row)
                    try:
                        launch = record(host, call)[1]
                    except ValueError as error:
                        row["refused"] = str(error)
                        continue
                    kernel = needs[launch["kernel"], arch]
                    row["kernel"] = kernel.name.partition("(obert")[0].removeprefix("void ")
                    row["threads"] = launch["block"][0]
                    row["shared_bytes"] = launch["shared_bytes"] + kernel.static_shared_bytes
                    row["registers"], row["barriers"] = kernel.registers, kernel.barriers
    fit = [row for row in result if "refused" not in row]
    asked = [
        f"{row['arch'] // 10} {row['arch'] % 10} {row['registers']} {row['barriers']} "
        f"{row['threads']} {row['shared_bytes']}"
        for row in fit
    ]
    answers = _run([str(_calculator())], "\n".join(asked) + "\n").splitlines()
    for row, answer in zip(fit, answers, strict=True):
        blocks, limits = map(int, answer.split())
        row["thread_blocks"] = blocks
        row["occupancy"] = blocks * (-(-row["threads"] // 32)) / 64  # 64 warps
        row["limited_by"] = [name for bit, name in LIMITS.items() if limits & bit]
    return result


# ---- report ------------------------------------------------------------------------


def paired(cells: list[str]) -> str:
    """One cell for all architectures."""
    return cells[0] if len(set(cells)) == 1 else " / ".join(cells)


def describe(rows: list[dict[str, Any]], size: int) -> str:
    """One sentence: what limits the kernels at a block size."""
    families: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["B"] == size and "refused" not in row:
            families.setdefault(row["family"], []).append(row)
    by_limit: dict[str, list[str]] = {}
    for family, here in families.items():
        limit = paired([" and ".join(row["limited_by"]) for row in here])
        occupancy = paired([f"{row['occupancy']:.0%}" for row in here])
        by_limit.setdefault(limit, []).append(f"{family} {occupancy}")
    parts = [f"{limit} ({'; '.join(names)})" for limit, names in by_limit.items()]
    return f"B = {size} is limited by {', by '.join(parts)}."


def markdown(document: dict[str, Any]) -> str:
    rows, made = document["outcomes"], document["made_by"][0]["command"]
    label = LABEL[0].upper() + LABEL[1:]
    text = [
        "# Occupancy of the CUDA kernels",
        "",
        f"**{label}.**",
        "",
        f"`{made}` with nvcc {document['config']['nvcc']}: registers from "
        "`ptxas -v`, launches as the operators ask for them, occupancy (resident warps of 64) from "
        "the toolkit's `cuda_occupancy.h`.  "
        "Occupancy says how many warps are there to hide latency, not how fast a kernel is.  "
        f"256 gradients of float32.  Where they differ: {ARCH_NAMES}.  "
        "g: no kernels are compiled for this size, the general ones run, as for N:M at any.",
        "",
        f"What limits the occupancy ({LABEL}):",
        "",
        *(f"* {describe(rows, size)}" for size in DESCRIBED),
    ]
    head = ["B", "threads", "shared bytes", "registers", "blocks per multiprocessor"]
    head += ["occupancy", "limited by"]
    for family in dict.fromkeys(row["family"] for row in rows):
        text += ["", f"## {family}", ""]
        body = []
        for size in dict.fromkeys(row["B"] for row in rows if row["family"] == family):
            here = [row for row in rows if row["family"] == family and row["B"] == size]
            columns = [
                [""] * 5 + ["refused: shared memory"]
                if "refused" in row
                else [
                    *(str(row[k]) for k in ("threads", "shared_bytes", "registers")),
                    str(row["thread_blocks"]),
                    f"{row['occupancy']:.0%}",
                    " and ".join(row["limited_by"]),
                ]
                for row in here
            ]
            cells = [paired(list(cell)) for cell in zip(*columns, strict=True)]
            name = f"{size} g" if size in GENERAL else "any" if size == ANY else str(size)
            body.append([name, *cells])
        text += table(head, body)
    return "\n".join(text) + "\n"


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    import host_cuda_build

    host = host_cuda_build.load(host_cuda_build.build(ROOT / "build" / "host_cuda"))
    compiler = re.findall(r"release (\S+),", _run(["nvcc", "--version"]))[0]
    document = new_document("occupancy", {"nvcc": compiler, "note": LABEL})
    document["outcomes"] = rows(host)
    print(write(document, markdown, "calculated").read_text())


if __name__ == "__main__":
    main()
