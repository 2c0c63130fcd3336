"""How much memory there is: of a device, of the machine, of a container, of the process."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_ROOT = Path("/")
# Limit, use, and what is kept of files that were read and can be had: control groups 2 and 1.
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(device: torch.device) -> int | None:
    """Free memory in bytes of a device, or of this process on this machine; None if unknown.

    The least of what the machine has, its container and those around it, and the process's own
    limits (``ulimit -v`` and ``-d``) leave.
    """
    if device.type == "cuda":
        # What torch keeps of freed tensors counts as taken there, but can be used.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    free = _free_on_machine()
    left = [free, *map(_left_in, _containers()), *_left_to_process()]
    return min((max(0, size) for size in left if size is not None), default=None)


def _free_on_machine() -> int | None:
    try:
        return _kilobytes(_ROOT / "proc/meminfo", "MemAvailable")
    except (OSError, StopIteration):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None


def _kilobytes(path: Path, key: str) -> int:
    lines = path.read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def _containers() -> Iterator[Path]:
    """Folders of the control groups that this process is in, from its own up to the root.

    Inside a container the path may be that of the machine, which is not there: then its last
    folders are tried in vain, and the root is the container's own.
    """
    top = _ROOT / "sys/fs/cgroup"
    try:
        lines = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            bases = [top, top / "unified"]
        elif "memory" in controllers.split(","):
            bases = [top / controllers, top / "memory"]
        else:
            continue
        below = [part for part in path.split("/") if part]
        for base in dict.fromkeys(bases):
            for depth in range(len(below), -1, -1):
                if ".." not in below[:depth]:
                    yield base.joinpath(*below[:depth])


def _left_in(folder: Path) -> int | None:
    for limit, used, files in _FILES:
        try:
            most, taken = (int((folder / name).read_text()) for name in (limit, used))
            lines = (folder / "memory.stat").read_text().splitlines()
            kept = next(int(line.split()[1]) for line in lines if line.startswith(f"{files} "))
        except (OSError, ValueError, StopIteration):  # no limit, or nothing to be understood
            continue
        return most - taken + kept
    return None


def _left_to_process() -> Iterator[int]:
    """Up to the limits of address space and of data."""
    if resource is None:
        return
    for kind, key in (("RLIMIT_AS", "VmSize"), ("RLIMIT_DATA", "VmData")):
        limit = resource.getrlimit(getattr(resource, kind))[0]
        if limit == resource.RLIM_INFINITY:
            continue
        try:
            yield limit - _kilobytes(_ROOT / "proc/self/status", key)
        except (OSError, StopIteration):
            continue


def readable(size: float) -> str:
    """Bytes in GiB or MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def out_of_memory(error: BaseException) -> MemoryError | None:
    """Return a failed allocation as an error of one line with remedies; None for other errors."""
    text = str(error)
    # "can't" on Linux, "not enough" on Windows; CUDA's has a class of its own.
    is_torchs = isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and re.search(r"can't allocate memory|not enough memory", text) is not None
    )
    if not is_torchs and not (isinstance(error, MemoryError) and text in ("", "std::bad_alloc")):
        return None
    asked = re.search(r"tried to allocate (\d+) bytes", text)
    more = f" when {readable(int(asked[1]))} more were needed" if asked else ""
    return MemoryError(
        f"memory ran out{more}: use smaller batches, a smaller block_size or fisher_dtype float32, "
        "or set max_memory to work on the layers in several passes"
    )
