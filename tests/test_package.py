"""The build and the package from outside: instruction sets, missing core, diagnostics."""

import os
import re
import runpy
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import INSTRUCTION_SETS

import obert_kernels

ROOT = Path(__file__).parents[1]


def run(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env}
    )


USE_IT = """
import torch, obert_kernels
from obert_kernels.ops import native
fisher = obert_kernels.GramFisher(10, 5)
fisher.accumulate(torch.ones(10))
print(native.core().current_instruction_set(), float(fisher.gram.sum()))
"""


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_the_forced_instruction_set_is_the_one_in_use(name):
    result = run(USE_IT, OBERT_CPU_ISA=name)
    assert result.stdout.split() == [name, "30.0"], result.stderr


def test_instruction_sets_differ_in_code():
    """The builds are several functions, not one under several names: they round differently."""
    fisher, v = obert_kernels.GramFisher(500, 50), torch.randn(500, dtype=torch.float64)
    fisher.accumulate(torch.randn(60, 500))
    core = obert_kernels.ops.native.core()
    before, found = core.current_instruction_set(), set()
    for name in INSTRUCTION_SETS:
        assert core.select_instruction_set(name)
        found.add(bytes(fisher.solve(v, 1e-3).numpy()))
    core.select_instruction_set(before)
    assert len(found) == len(INSTRUCTION_SETS)
    flags = Path("/proc/cpuinfo")
    if flags.exists() and "avx2" in flags.read_text():
        assert "avx2" in INSTRUCTION_SETS
    assert INSTRUCTION_SETS[-1] == "baseline"


def test_an_impossible_instruction_set_is_explained():
    result = run(USE_IT, OBERT_CPU_ISA="avx10")
    assert result.returncode == 1
    assert "OBERT_CPU_ISA='avx10' cannot be used" in result.stderr
    assert f"runs {', '.join(INSTRUCTION_SETS)}" in result.stderr


BROKEN = """
import sys
sys.modules["obert_kernels._C"] = None  # as if the extension were missing
import obert_kernels
print("imported")
"""


def test_import_works_without_the_core_and_first_use_explains():
    result = run(BROKEN)
    assert result.stdout.strip() == "imported", result.stderr
    result = run(BROKEN + USE_IT)
    assert result.returncode == 1
    for word in ("found:", "wanted:", "do:", "pip install"):
        assert word in result.stderr


def test_diagnostics():
    result = subprocess.run(
        [sys.executable, "-m", "obert_kernels"], capture_output=True, text=True, check=True
    )
    for word in ("obert_kernels", "torch", "threads", "CPU kernels", "CUDA", "in use"):
        assert word in result.stdout
    core = obert_kernels.ops.native.core()
    expected = "not in this build" if core.cuda_architectures is None else "compute capability"
    assert expected in result.stdout


CSRC = ROOT / "csrc"
# Which folders of csrc a file may include headers of, by its own folder.
MAY_INCLUDE = {
    ".": {"common", "common/cuda", "pruning"},
    "common": {"common"},
    "common/cpu": {"common", "common/cpu"},
    "common/cuda": {"common", "common/cuda"},
    "pruning": {"common", "pruning"},
    "pruning/cpu": {"common", "common/cpu", "pruning", "pruning/cpu"},
    "pruning/cuda": {"common", "pruning", "pruning/cuda"},
}


def included(path: Path) -> tuple[set[str], set[Path]]:
    """System headers and files of csrc that a source includes itself."""
    text = path.read_text()
    own = re.findall(r'^#\s*include\s*"(.+)"', text, re.M)
    system = re.findall(r"^#\s*include\s*<(.+)>", text, re.M)
    return set(system), {(path.parent / name).resolve() for name in own}


def core_sources() -> list[Path]:
    return [p.resolve() for p in CSRC.rglob("*") if p.is_file()]


def folder_of(path: Path) -> str:
    return path.parent.relative_to(CSRC.resolve()).as_posix()


def test_the_core_includes_one_way():
    """common knows no pruning, processors do not know each other, and nothing knows torch."""
    assert {folder_of(path) for path in core_sources()} == set(MAY_INCLUDE)
    for path in core_sources():
        system, own = included(path)
        assert not [name for name in system if re.match(r"(torch|ATen|c10)\b", name)], path
        assert {folder_of(other) for other in own} <= MAY_INCLUDE[folder_of(path)], path


def test_kernels_use_no_standard_library():
    """The linker could keep an AVX-512 copy of a template for the baseline path.

    So it is for all sources in a folder cpu, which are compiled for each instruction set, and for
    what they include.
    """
    compiled = {path for path in core_sources() if path.parent.name == "cpu"}
    assert len(compiled) > 20
    left = list(compiled)
    while left:
        path = left.pop()
        system, own = included(path)
        assert system <= {"stdint.h", "immintrin.h"}, path
        left += own - compiled
        compiled |= own


def test_an_operator_is_one_line_of_the_list():
    """Its name is written in no other list: all of them are made of this one."""
    listed = re.findall(r"^X\((\w+), (\w+)", (CSRC / "pruning" / "operators.def").read_text(), re.M)
    assert len(listed) == 13
    for path in (CSRC / "bindings.cpp", *CSRC.glob("pruning/*.h"), *CSRC.glob("pruning/*.cpp")):
        found = set(re.findall(r"\w+", path.read_text()))
        assert not found & {name for name, _ in listed}, path
    core = obert_kernels.ops.native.core()
    assert {name for name in dir(core) if re.match("gram_|woodbury_|inverse_|fit_", name)} == {
        name for name, _ in listed
    }


def test_files_stay_readable():
    for folder in ("csrc", "obert_kernels", "tests", "benchmarks"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                assert len(path.read_text().splitlines()) <= 420, path


def test_core_imports_without_optional_packages():
    code = """
import sys
for name in ("transformers", "datasets", "typer", "tqdm", "matplotlib", "safetensors"):
    sys.modules[name] = None
import torch, obert_kernels
model = torch.nn.Linear(8, 8)
obert_kernels.prune(model, [torch.ones(2, 8)], 0.5, params="weight", num_grads=1,
                    loss_fn=lambda m, b: m(b).square().mean())
print(float((model.weight == 0).float().mean()))
"""
    result = run(code)
    assert result.stdout.strip() == "0.5", result.stderr


def test_operators_have_device_kernels_where_the_build_has_them():
    has = torch._C._dispatch_has_kernel_for_dispatch_key("obert_kernels::gram_accumulate", "CUDA")
    assert has == (obert_kernels.ops.native.core().cuda_architectures is not None)


def setup_py(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr("setuptools.setup", lambda **_: None)
    return runpy.run_path(str(ROOT / "setup.py"))


def program(path: Path, output: str, status: int = 0) -> Path:
    path.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {status}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("wish", "devices", "expected"),
    [
        ("", None, ["80"]),  # no driver
        ("", "9.0", ["90"]),
        ("", "9.0\n8.6\n9.0", ["86", "90"]),
        ("", "12.1\n10.3", ["100", "120"]),  # machine code of a lower minor number runs there
        ("", "13.0\n11.5", ["110"]),  # newer than nvcc: compiles the PTX
        ("", "13.0", ["80"]),
        ("", "7.0", ["80"]),  # older than all that nvcc knows
        ("", "[N/A]", ["80"]),
        ("all", "9.0", ["75", "80", "86", "89", "90", "100", "120"]),
        ("9.0; 8.0", "8.6", ["90", "80"]),
        ("sm_90a,8.0+PTX 90", "8.6", ["90", "80"]),
    ],
)
def test_one_architecture_is_compiled_for_unless_others_are_wished_for(
    monkeypatch, tmp_path, wish, devices, expected
):
    known = "\n".join(f"compute_{arch}" for arch in (75, 80, 86, 87, 89, 90, 100, 110, 120))
    nvcc = program(tmp_path / "nvcc", known)
    program(tmp_path / "nvidia-smi", devices or "no driver", 0 if devices else 9)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("OBERT_CUDA_ARCHS", wish)
    assert setup_py(monkeypatch)["cuda_archs"](str(nvcc)) == expected


@pytest.mark.parametrize("wish", ["ninety", "8", "13.0", "80;;;x", "all;90"])
def test_an_architecture_that_nvcc_does_not_know_is_refused(monkeypatch, tmp_path, wish):
    nvcc = program(tmp_path / "nvcc", "compute_75\ncompute_80\ncompute_90")
    monkeypatch.setenv("OBERT_CUDA_ARCHS", wish)
    with pytest.raises(SystemExit, match=r"^OBERT_CUDA_ARCHS: '.+' is none of .* 75, 80, 90;"):
        setup_py(monkeypatch)["cuda_archs"](str(nvcc))


@pytest.mark.parametrize(
    ("release", "problem"),
    [
        ("Cuda compilation tools, release 13.0, V13.0.88\ncompute_75", None),
        (
            "Cuda compilation tools, release 11.5, V11.5.119\ncompute_80",
            "is of CUDA 11.5: set",
        ),
        ("Cuda compilation tools, release 12.0, V12.0.1", "lists no architectures: set NVCC"),
        ("not found", "names no release: set NVCC"),
    ],
)
def test_an_nvcc_that_cannot_compile_the_kernels(monkeypatch, tmp_path, capsys, release, problem):
    """It is left out, and that is said; where CUDA is wished for it is an error."""
    nvcc = str(program(tmp_path / "nvcc", release))
    monkeypatch.setenv("NVCC", nvcc)
    monkeypatch.delenv("OBERT_CUDA", raising=False)
    find_nvcc = setup_py(monkeypatch)["find_nvcc"]
    assert find_nvcc() == (nvcc if problem is None else None)
    said = capsys.readouterr().err
    assert (problem or "") in said and ("without CUDA" in said) == (problem is not None)
    monkeypatch.setenv("OBERT_CUDA", "1")
    if problem is None:
        assert find_nvcc() == nvcc
        return
    with pytest.raises(SystemExit, match=problem):
        find_nvcc()


def test_a_build_says_what_it_compiles_and_how_long_that_takes(monkeypatch):
    announcement = setup_py(monkeypatch)["announcement"]
    one, many = (
        announcement("/opt/nvcc", archs, 2) for archs in (["90"], ["80", "90", "100", "120"])
    )
    assert "CUDA kernels with /opt/nvcc for compute capability 9.0; about " in one
    assert "8.0, 9.0, 10.0, 12.0; about " in many
    assert "OBERT_CUDA=0" in one and "OBERT_CUDA_ARCHS" in one
    without = announcement(None, [], 2)
    assert "without CUDA; about 1 min, 2 compilations at a time" in without
    minutes = [int(re.search(r"about (\d+) min", text)[1]) for text in (without, one, many)]
    assert minutes == sorted(set(minutes))


KNOWN = ["75", "80", "86", "87", "88", "89", "90", "100", "103", "110", "120", "121"]


def made_of(flags: list[str]) -> dict[str, list[str]]:
    """What nvcc is asked to make of the PTX of each architecture."""
    found = re.findall(r"arch=(\w+),code=\[?([\w,]+)", " ".join(flags))
    return {ptx: code.split(",") for ptx, code in found}


@pytest.mark.parametrize(
    ("archs", "known", "expected"),
    [
        (["120", "75", "80"], KNOWN, {"compute_75": ["sm_75", "sm_80", "sm_120", "compute_75"]}),
        (["90"], KNOWN, {"compute_75": ["sm_90", "compute_75"]}),
        (["90"], ["50", "70", *KNOWN], {"compute_75": ["sm_90", "compute_75"]}),
        (["90", "70"], ["50", "70", *KNOWN], {"compute_70": ["sm_70", "sm_90", "compute_70"]}),
        (["120"], ["80", "120"], {"compute_80": ["sm_120", "compute_80"]}),
    ],
)
def test_one_ptx_of_the_oldest_architecture(monkeypatch, archs, known, expected):
    """All machine code is made of it, and devices without machine code compile it."""
    assert made_of(setup_py(monkeypatch)["cuda_flags"](archs, known)) == expected


def test_warnings_are_errors_for_developers_alone(monkeypatch):
    monkeypatch.delenv("OBERT_WERROR", raising=False)
    for wish, expected in ((None, False), ("0", False), ("1", True)):
        if wish is not None:
            monkeypatch.setenv("OBERT_WERROR", wish)
        build = setup_py(monkeypatch)
        for flags in (build["CXX_FLAGS"], build["cuda_flags"](["80"], KNOWN)):
            assert any(flag.startswith("-Werror") for flag in flags) == expected
    assert "export OBERT_WERROR=1" in (ROOT / ".ci" / "run").read_text()


FATBIN = struct.pack("<I", 0xBA55ED50)
FATBIN_KINDS = {1: "compute", 2: "sm"}


def embedded(library: bytes) -> list[set[str]]:
    """Architectures of PTX ("compute_..") and machine code ("sm_..") of each source in a library.

    nvcc puts them into a fat binary: 16 bytes, then entries with a head of their own.
    """
    found = []
    for start in (match.start() for match in re.finditer(FATBIN, library)):
        head, size = struct.unpack_from("<HQ", library, start + 6)
        if head != 16 or start + head + size > len(library):
            continue  # four bytes of something else
        at, found = start + head, [*found, set()]
        while at < start + head + size:
            kind, entry_head, entry_size = struct.unpack_from("<HxxIQ", library, at)
            (arch,) = struct.unpack_from("<I", library, at + 28)
            found[-1].add(f"{FATBIN_KINDS[kind]}_{arch}")
            at += entry_head + entry_size
    return found


def test_the_library_holds_machine_code_and_one_ptx():
    core = obert_kernels.ops.native.core()
    if core.cuda_architectures is None:
        pytest.skip("built without CUDA kernels")
    archs = core.cuda_architectures.split(";")
    sources = embedded(Path(core.__file__).read_bytes())
    assert len(sources) >= len(list((CSRC / "pruning" / "cuda").glob("*.cu")))
    for source in sources:
        (ptx,) = (name for name in source if name.startswith("compute_"))
        assert source == {ptx, *(f"sm_{arch}" for arch in archs)}
        assert int(ptx.removeprefix("compute_")) <= min(75, *map(int, archs))


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_works_elsewhere(tmp_path):
    """Built as pip builds it, without torch in the build and without CUDA."""
    environment = {**os.environ, "OBERT_CUDA": "0"}
    environment.pop("PYTHONPATH", None)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, env=environment, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    assert (installed / "obert_kernels" / "py.typed").is_file()
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in (ROOT / "obert_kernels").rglob("*.py")
        if path.name != "__main__.py"
    ]
    environment["PYTHONPATH"] = str(installed)
    code = """
import importlib, sys
for name in sys.argv[1:]:
    print(importlib.import_module(name).__file__)
"""
    found = subprocess.run(
        [sys.executable, "-c", code, *modules],
        cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    files = found.stdout.split()
    assert len(files) == len(modules) > 60
    assert all(Path(file).is_relative_to(installed) for file in files)
    diagnostics = subprocess.run(
        [sys.executable, "-m", "obert_kernels"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "not in this build" in diagnostics.stdout
