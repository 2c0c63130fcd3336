"""Compiles the CUDA kernels for the host, once for each state of the sources."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pybind11

ROOT = Path(__file__).parents[2]
SHIM = ROOT / "tests" / "support" / "host_cuda"
KERNELS = sorted((ROOT / "csrc" / "pruning" / "cuda").glob("*.cu"))
# -O1: the kernels are large and run for seconds only.  Alignment: this processor loads vectors from
# any address, a device does not; executor.cpp turns what the compiler finds into an error.
FLAGS = ["-std=c++17", "-O1", "-fsanitize=alignment", "-fPIC", "-fvisibility=hidden", "-Wall",
         "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-extern-tls-init", "-x", "c++",
         f"-I{SHIM}"]  # fmt: skip


def _digest(files: list[Path], flags: list[str]) -> str:
    digest = hashlib.sha256(" ".join(flags).encode())
    for path in files:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _included(source: Path, headers: list[Path]) -> list[Path]:
    """The headers among those given that a source includes, directly or not, by their names."""
    found: list[Path] = []
    left = [source]
    while left:
        names = re.findall(r'#include [<"](?:.*/)?([^/>"]+)[>"]', left.pop().read_text())
        new = [path for path in headers if path.name in names and path not in found]
        found += new
        left += new
    return sorted(found)


def build(folder: Path, kernels: Path | None = None, extra: list[str] | None = None) -> Path:
    """Compile and link the module into ``folder``; return the shared library.

    Args:
        folder: cache; nothing is compiled twice.
        kernels: a changed copy of ``csrc`` to take instead.
        extra: further compiler flags.
    """
    csrc = kernels or ROOT / "csrc"
    flags = [*FLAGS, *(extra or [])]
    headers = [path for ending in ("h", "cuh", "def") for path in sorted(csrc.rglob(f"*.{ending}"))]
    headers += sorted(SHIM.glob("*.h"))
    python = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
    # The module includes operators.h of this tree, which does not depend on the kernels.
    sources = {csrc / "pruning" / "cuda" / path.name: flags for path in KERNELS}
    sources[SHIM / "executor.cpp"] = flags
    sources[SHIM / "module.cpp"] = [*flags, *python]
    folder.mkdir(parents=True, exist_ok=True)
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"

    def compile_one(source: Path) -> Path:
        read = [source, *_included(source, headers)]
        target = folder / f"{source.stem}_{_digest(read, sources[source])}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}")
            command = [compiler, *sources[source], "-c", str(source), "-o", str(partial)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
            partial.replace(target)
        return target

    with _alone(folder):
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compile_one, sources))
        library = folder / _digest(objects, flags) / "host_cuda.so"
        if not library.exists():
            library.parent.mkdir(exist_ok=True)
            link = [f for f in extra or [] if f.startswith("-fsanitize")]
            subprocess.run([compiler, "-shared", *link, *map(str, objects), "-o", str(library)],
                           check=True)  # fmt: skip
    return library


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process compiles, the others wait for what it makes."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def load(library: Path) -> ModuleType:
    # Under one name pybind11 would hand out the module loaded first.
    name = f"build_{library.parent.name}.host_cuda"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
