"""What there is: the least of machine, containers and limits; and what is said when it runs out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, unchanged

from obert_kernels import prune
from obert_kernels.fisher import free_memory
from obert_kernels.fisher.free_memory import available_memory, out_of_memory

CPU = torch.device("cpu")
UNLIMITED = 9223372036854771712  # as control groups of version 1 say it


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def version_2(folder: Path, limit: object, used: int, files: int = 0) -> None:
    write(folder / "memory.max", f"{limit}\n")
    write(folder / "memory.current", f"{used}\n")
    write(folder / "memory.stat", f"anon 5\ninactive_file {files}\nactive_file 7\n")


def version_1(folder: Path, limit: int, used: int, files: int = 0) -> None:
    write(folder / "memory.limit_in_bytes", f"{limit}\n")
    write(folder / "memory.usage_in_bytes", f"{used}\n")
    write(folder / "memory.stat", f"cache 5\ninactive_file 1\ntotal_inactive_file {files}\n")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 100,000 kB free and nothing else."""
    monkeypatch.setattr(free_memory, "_ROOT", tmp_path)
    write(tmp_path / "proc/meminfo", "MemTotal: 1 kB\nMemFree: 2 kB\nMemAvailable: 100000 kB\n")
    return tmp_path


def test_a_machine_without_containers(root: Path) -> None:
    assert available_memory(CPU) == 102_400_000


def test_files_that_a_container_keeps_are_to_be_had(root: Path) -> None:
    top = root / "sys/fs/cgroup"
    version_2(top, 9000, 8000, 2500)
    assert available_memory(CPU) == 9000 - 8000 + 2500
    version_2(top, "max", 8000, 2500)
    assert available_memory(CPU) == 102_400_000
    version_2(top, 9000, 8000, 2500)
    (top / "memory.stat").write_text("anon 5\n")
    assert available_memory(CPU) == 102_400_000, "not to be understood: the machine's"
    version_2(top, 9000, 9500, 100)
    assert available_memory(CPU) == 0, "never less than nothing"


def test_the_least_of_nested_containers(root: Path) -> None:
    top = root / "sys/fs/cgroup"
    write(root / "proc/self/cgroup", "0::/system.slice/job/step\n")
    version_2(top / "system.slice/job/step", "max", 100)
    version_2(top / "system.slice/job", 50_000, 20_000, 1_000)
    version_2(top / "system.slice", 90_000, 30_000)
    version_2(top / "other", 10, 0)
    assert available_memory(CPU) == 31_000
    version_2(top / "system.slice/job/step", 5_000, 100)
    assert available_memory(CPU) == 4_900


@pytest.mark.parametrize("controllers", ["memory", "cpu,memory"])
def test_control_groups_of_version_1(root: Path, controllers: str) -> None:
    top = root / "sys/fs/cgroup" / controllers
    lines = ["12:freezer:/a", f"4:{controllers}:/slurm/job_1/step_0", "1:name=systemd:/", "0::/"]
    write(root / "proc/self/cgroup", "\n".join(lines) + "\n")
    version_1(top / "slurm/job_1/step_0", UNLIMITED, 100)
    version_1(top / "slurm/job_1", 70_000, 20_000, 3_000)
    version_1(top, UNLIMITED, 10**9)
    assert available_memory(CPU) == 53_000


def test_a_container_that_is_told_the_path_outside(root: Path) -> None:
    """Without a name space of its own: the root of what is mounted is the container's."""
    write(root / "proc/self/cgroup", "5:memory:/docker/0123abcd\n0::/../x\n")
    version_1(root / "sys/fs/cgroup/memory", 40_000, 10_000)
    assert available_memory(CPU) == 30_000


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_are_seen_before_memory_runs_out(limit: str) -> None:
    code = f"""
import resource, torch
from torch import nn
import obert_kernels
from obert_kernels.fisher.free_memory import available_memory
free = available_memory(torch.device("cpu"))
used = free_now = None
key = "VmSize" if "{limit}" == "RLIMIT_AS" else "VmData"
lines = open("/proc/self/status").read().splitlines()
used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
room = 200 << 20
resource.setrlimit(resource.{limit}, (used + room, used + room))
left = available_memory(torch.device("cpu"))
assert 0.9 * room < left <= room, (left, room)
model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024))
data = [torch.randn(2, 1024) for _ in range(4)]
try:
    obert_kernels.prune(model, data, 0.5, params="re:.*weight", num_grads=4,
                        loss_fn=lambda m, b: m(b).square().mean(), damping=1e-6)
except MemoryError as error:
    assert "free memory is" in str(error) and "set max_memory" in str(error), error
else:
    raise SystemExit("not refused")
try:
    torch.empty(2 * room, dtype=torch.uint8)
except RuntimeError as error:
    print(obert_kernels.fisher.free_memory.out_of_memory(error))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("memory ran out when 400.0 MiB more were needed: use smaller")


def test_what_is_no_lack_of_memory() -> None:
    assert out_of_memory(RuntimeError("expected a tensor")) is None
    assert out_of_memory(MemoryError("pruning needs 3 GiB but max_memory is 1 GiB")) is None
    assert "memory ran out: use" in str(out_of_memory(MemoryError()))
    assert "memory ran out: use" in str(out_of_memory(torch.OutOfMemoryError("CUDA out of mem")))


def test_memory_that_runs_out_in_the_middle() -> None:
    model, calls = TinyEncoder(), []
    before = snapshot(model)

    def loss_fn(model, batch):
        calls.append(1)
        if len(calls) == 6:
            torch.empty(1 << 60, dtype=torch.uint8)
        return model(**batch)["loss"]

    with pytest.raises(MemoryError, match=r"^memory ran out when 1073741824\.00 GiB more") as error:
        prune(model, batches(), 0.5, loss_fn=loss_fn, num_grads=8, damping=1e-6)
    assert "\n" not in str(error.value) and isinstance(error.value.__cause__, RuntimeError)
    assert unchanged(model, before)
