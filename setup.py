"""Builds the native core: every source with its own flags, compiled by ninja.

The package metadata lives in pyproject.toml.  Environment variables:
  OBERT_CUDA=0|1       without or with the CUDA part (default: with, where nvcc is found)
  OBERT_CUDA_ARCHS     compute capabilities, for example "80;90" (default: those of the devices
                       present, else 8.0); "all", for wheels: those of 7.5 to 12.0 that nvcc knows
  OBERT_WERROR=1       warnings of the compilers are errors (for development)
  CXX, NVCC            compilers (default: c++, nvcc)
  MAX_JOBS             parallel compilations
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
CUDA_ARCHS = ["75", "80", "86", "89", "90", "100", "120"]
OLDEST_ARCH = 75  # what the kernels are written for
OLDEST_NVCC = (11, 8)  # the first with cudaLaunchKernelEx
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")

# Flags of each instruction set; the vector width is what csrc/common/cpu/simd.h builds on.
INSTRUCTION_SETS = {"baseline": ["-DOBERT_VECTOR_BYTES=16"]}
if IS_X86:
    INSTRUCTION_SETS["avx2"] = ["-DOBERT_VECTOR_BYTES=32", "-mavx2", "-mfma"]
    INSTRUCTION_SETS["avx512"] = [
        "-DOBERT_VECTOR_BYTES=64",
        *"-mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx2 -mfma".split(),
        "-mprefer-vector-width=512",
    ]
# Folders of csrc/ whose sources are compiled for each of these; all others are compiled once.
KERNELS = {"pruning/cpu": INSTRUCTION_SETS}

CXX_FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra".split()
NVCC_FLAGS = "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden".split()
# A compiler newer than those of the developers may warn of something new.
if os.environ.get("OBERT_WERROR", "0") != "0":
    CXX_FLAGS += ["-Werror"]
    NVCC_FLAGS += ["-Werror", "all-warnings"]
# Kernels: no errno from sqrt, no exceptions; ABI notes about wide vectors do not apply, as
# every kernel is inlined into its own translation unit.
KERNEL_FLAGS = ["-fno-math-errno", "-fno-exceptions", "-Wno-psabi"]


# Of one processor of 2 GHz: all but CUDA, PTX, machine code of one architecture.
CPU_SECONDS, CUDA_SECONDS, CUDA_ARCH_SECONDS = 100, 65, 65
MOST_AT_ONCE = 8  # the longest compilations bound the time from here on


def find_nvcc() -> str | None:
    """The CUDA compiler to use, or None for a build without CUDA."""
    wish = os.environ.get("OBERT_CUDA", "")
    if wish not in ("", "0", "1"):
        sys.exit(f"OBERT_CUDA={wish!r}: use 0 (without CUDA) or 1 (with CUDA)")
    nvcc = None if wish == "0" else shutil.which(os.environ.get("NVCC", "nvcc"))
    if wish == "1" and nvcc is None:
        sys.exit("OBERT_CUDA=1 but nvcc was not found: put it on PATH or set NVCC=/path/to/nvcc")
    problem = reason_not_to_use(nvcc) if nvcc else None
    if problem is None:
        return nvcc
    if wish == "1":
        sys.exit(f"OBERT_CUDA=1 but {problem}")
    print(f"obert_kernels: without CUDA, as {problem}", file=sys.stderr, flush=True)
    return None


def reason_not_to_use(nvcc: str) -> str | None:
    """Why the kernels cannot be compiled with this nvcc and what to do, or None."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    if release is None:
        return f"`{nvcc} --version` names no release: set NVCC=/path/to/nvcc"
    if (int(release[1]), int(release[2])) < OLDEST_NVCC:
        oldest = ".".join(map(str, OLDEST_NVCC))
        return f"{nvcc} is of CUDA {release[1]}.{release[2]}: set NVCC to one of {oldest} or newer"
    if not known_archs(nvcc):
        return f"`{nvcc} --list-gpu-arch` lists no architectures: set NVCC=/path/to/nvcc"
    return None


def known_archs(nvcc: str) -> list[str]:
    """Architectures that nvcc compiles for, the oldest first."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    return sorted(re.findall(r"compute_(\d+)\b", listed), key=int)


def devices_present() -> list[str]:
    """Compute capabilities of the devices of this machine, as the driver tells them."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^\d+\.\d+$", done.stdout, re.M) if done.returncode == 0 else []


def cuda_archs(nvcc: str) -> list[str]:
    """The architectures to make machine code for: those wished for, of the devices present, or 8.0.

    All other devices compile the PTX when they first use a kernel; machine code for 8.0 also runs
    on 8.6 and 8.9.
    """
    known = known_archs(nvcc)
    wish = os.environ.get("OBERT_CUDA_ARCHS", "").strip()
    if wish == "all":
        return [arch for arch in CUDA_ARCHS if arch in known]
    if wish:
        return list(dict.fromkeys(wished_arch(name, known) for name in re.split(r"[;,\s]+", wish)))
    # Machine code runs on devices of the same major number and the same or a higher minor one.
    present = sorted(int(capability.replace(".", "")) for capability in devices_present())
    fitting = [
        [arch for arch in known if arch[:-1] == str(device // 10) and int(arch) <= device]
        for device in present
    ]
    return list(dict.fromkeys(archs[-1] for archs in fitting if archs)) or ["80"]


def wished_arch(name: str, known: list[str]) -> str:
    """Return "90" for "9.0", "90", "sm_90", "90a" (nothing here needs the "a") and "9.0+PTX"."""
    found = re.fullmatch(r"(?:sm_|compute_)?(\d+)\.?(\d)[af]?(?:\+PTX)?", name, re.I)
    arch = found[1] + found[2] if found else ""
    if arch not in known:
        sys.exit(
            f"OBERT_CUDA_ARCHS: {name!r} is none of the compute capabilities that nvcc compiles "
            f"for, {', '.join(known)}; separate several by semicolons, or use all"
        )
    return arch


def announcement(nvcc: str | None, archs: list[str], jobs: int) -> str:
    """What will be compiled, and about how long that takes.

    Args:
        nvcc: None without CUDA.
        archs: architectures.
        jobs: compilations at a time.
    """
    seconds = CPU_SECONDS + (CUDA_SECONDS + CUDA_ARCH_SECONDS * len(archs) if nvcc else 0)
    minutes = max(1, round(seconds / min(jobs, MOST_AT_ONCE) / 60))
    about = f"about {minutes} min, {jobs} compilations at a time"
    kernels = f"obert_kernels: compiling CPU kernels for {', '.join(INSTRUCTION_SETS)}"
    if not nvcc:
        return f"{kernels}, without CUDA; {about}"
    names = ", ".join(f"{arch[:-1]}.{arch[-1]}" for arch in archs)
    return (
        f"{kernels} and CUDA kernels with {nvcc} for compute capability {names}; {about}\n"
        "  OBERT_CUDA=0 leaves CUDA out, OBERT_CUDA_ARCHS chooses others"
    )


def cuda_flags(archs: list[str], known: list[str]) -> list[str]:
    """Machine code for every architecture named, and PTX that every later device can compile.

    Nothing in the kernels is specific to an architecture, so one PTX, of 7.5 or what else is the
    oldest that nvcc knows, is what all machine code is made of and what is kept: half of the time
    of a build goes into making PTX.

    Args:
        archs: architectures for machine code.
        known: those of nvcc.
    """
    oldest = min([*archs, *(arch for arch in known if int(arch) >= OLDEST_ARCH)], key=int)
    flags = [*NVCC_FLAGS, *(["--threads", "0"] if len(archs) > 1 else [])]
    code = ",".join(f"sm_{arch}" for arch in sorted(archs, key=int))
    return [*flags, "-gencode", f"arch=compute_{oldest},code=[{code},compute_{oldest}]"]


def cudart_static_flags(nvcc: str) -> list[str]:
    """Link flags for the static CUDA runtime, asked of nvcc itself."""
    dry = subprocess.run([nvcc, "--dryrun", "-cudart", "static", "x.cu", "-o", "x"],
                         capture_output=True, text=True)  # fmt: skip
    directories = re.findall(r'-L"?([^"\s]+)"?', dry.stderr + dry.stdout)
    return [f"-L{d}" for d in dict.fromkeys(directories)] + "-lcudart_static -lrt -ldl".split()


def by_size(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_size, reverse=True)


class NinjaFile:
    """Collects build edges; one object file each."""

    def __init__(self, build_dir: Path) -> None:
        self.build_dir = build_dir
        self.objects: list[str] = []
        self.lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            "  command = $compiler $flags -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            "  command = $compiler -shared $in $flags -o $out",
        ]

    @staticmethod
    def escape(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    def compile(self, compiler: str, source: Path, name: str, flags: list[str]) -> None:
        target = self.escape(self.build_dir / f"{name}.o")
        self.lines += [
            f"build {target}: compile {self.escape(source)}",
            f"  compiler = {compiler}",
            "  flags = " + shlex.join(flags).replace("$", "$$"),
        ]
        self.objects.append(target)

    def link(self, compiler: str, output: Path, flags: list[str]) -> None:
        self.lines += [
            f"build {self.escape(output)}: link {' '.join(self.objects)}",
            f"  compiler = {compiler}",
            "  flags = " + shlex.join(flags).replace("$", "$$"),
        ]

    def run(self) -> None:
        import ninja

        self.build_dir.mkdir(parents=True, exist_ok=True)
        (self.build_dir / "build.ninja").write_text("\n".join(self.lines) + "\n")
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(self.build_dir)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.run(command).returncode:
            sys.exit(
                "obert_kernels: the build failed; the compiler says above why.  OBERT_CUDA=0 "
                "leaves the CUDA kernels out, CXX and NVCC choose other compilers"
            )


class NinjaBuildExt(build_ext):
    def build_extension(self, ext: Extension) -> None:
        csrc = ROOT.resolve() / "csrc"
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        cxx = os.environ.get("CXX", "c++")
        ninja_file = NinjaFile(Path(self.build_temp).resolve())
        nvcc = find_nvcc()
        archs = cuda_archs(nvcc) if nvcc else []
        jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
        # Seen with `pip install -v`: pip keeps what a build says to itself otherwise.
        print(announcement(nvcc, archs, jobs), file=sys.stderr, flush=True)

        # What takes longest first, so that the last one does not keep one processor busy alone.
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        once_flags = [*CXX_FLAGS, *includes, f'-DOBERT_VERSION="{VERSION}"']
        once_flags += ["-DOBERT_BUILD_X86"] if IS_X86 else []
        link_flags = ["-pthread"]
        if nvcc:
            once_flags += ["-DOBERT_WITH_CUDA", f'-DOBERT_CUDA_ARCHITECTURES="{";".join(archs)}"']
            device_flags = cuda_flags(archs, known_archs(nvcc))
            for path in by_size(csrc.rglob("cuda/*.cu")):
                ninja_file.compile(nvcc, path, f"{path.relative_to(csrc)}", device_flags)
            link_flags += cudart_static_flags(nvcc)
        ninja_file.compile(cxx, csrc / "bindings.cpp", "bindings.cpp", once_flags)
        for folder, instruction_sets in KERNELS.items():
            for name, isa_flags in reversed(instruction_sets.items()):
                flags = [*CXX_FLAGS, *KERNEL_FLAGS, f"-DOBERT_ISA={name}", *isa_flags]
                for path in by_size((csrc / folder).glob("*.cpp")):
                    ninja_file.compile(cxx, path, f"{name}/{path.relative_to(csrc)}", flags)
        for folder in ("common", "pruning"):
            for path in sorted((csrc / folder).glob("*.cpp")):
                ninja_file.compile(cxx, path, f"{path.relative_to(csrc)}", once_flags)

        if sys.platform == "darwin":
            link_flags += ["-undefined", "dynamic_lookup"]
        ninja_file.link(cxx, output, link_flags)
        ninja_file.run()


setup(
    ext_modules=[Extension("obert_kernels._C", sources=[])],
    cmdclass={"build_ext": NinjaBuildExt},
)
