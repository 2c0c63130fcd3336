"""What benchmarks/gpu.py must know of a device: times, memory, cache size, name."""

from __future__ import annotations

import math
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from obert_kernels.ops import native

Calls = Sequence[Callable[[], object]]  # the same work on different data
WARM_UP = 3
LEAST_ROUNDS = 5  # of a row that takes too long
RESERVE = 20.0  # seconds for imports before and a plot after
_LEAST_SCRATCH = 256 << 20


class Deadline:
    """How much of the time is left.

    Args:
        minutes: the whole run may take; None: without end.
        clock: seconds.
    """

    def __init__(self, minutes: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds = clock
        self._start = clock()
        self._length = math.inf if minutes is None else 60 * minutes - RESERVE

    def used(self) -> float:
        """Share of the time that is over."""
        return (self.seconds() - self._start) / self._length

    def allows(self, seconds: float) -> bool:
        """Whether something that takes that long, or half as much again, may begin."""
        return self._start + self._length - self.seconds() > 1.5 * seconds


class Timer(Protocol):
    """Everything that depends on time or on the device, so that tests can replace it."""

    device: torch.device
    name: str
    l2_bytes: int

    def free_bytes(self) -> int:
        """Device memory that can still be allocated."""
        ...

    def alternate(
        self, contenders: Mapping[str, Calls], rounds: int, limit: float | None = None
    ) -> dict[str, list[float]]:
        """Seconds of each contender in each round; every round runs all of them in turn.

        In round r a contender runs its call number r modulo their number.  After ``limit``
        seconds no round begins but the first LEAST_ROUNDS.
        """
        ...

    def once(self, name: str, call: Callable[[], object]) -> tuple[float, int]:
        """Seconds of a call from a device at rest to a device at rest, and bytes at its peak."""
        ...

    def describe(self) -> dict[str, str]:
        """What a result should say about the device."""
        ...


class CudaTimer:
    """Times by CUDA events on the current stream of the current device."""

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._properties = torch.cuda.get_device_properties(self.device)
        self.name = self._properties.name
        self.l2_bytes = int(self._properties.L2_cache_size)
        scratch = max(2 * self.l2_bytes, _LEAST_SCRATCH)
        self._scratch = torch.zeros(scratch // 4, device=self.device)

    def free_bytes(self) -> int:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]

    def _seconds(self, call: Callable[[], object]) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        # Reading evicts what the call before left in the cache without leaving anything to be
        # written back, and keeps the device busy until the host has enqueued the call.
        self._scratch.sum()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def alternate(
        self, contenders: Mapping[str, Calls], rounds: int, limit: float | None = None
    ) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        start = time.monotonic()
        for index in range(-WARM_UP, rounds):
            late = limit is not None and time.monotonic() - start > limit
            if late and (-WARM_UP < index < 0 or index >= LEAST_ROUNDS):
                continue
            for name, calls in contenders.items():
                spent = self._seconds(calls[index % len(calls)])
                if index >= 0:
                    times[name].append(spent)
        return times

    def once(self, name: str, call: Callable[[], object]) -> tuple[float, int]:
        self.free_bytes()
        torch.cuda.reset_peak_memory_stats(self.device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(self.device)
        spent = time.perf_counter() - start
        return spent, torch.cuda.max_memory_allocated(self.device)

    def describe(self) -> dict[str, str]:
        major, minor = torch.cuda.get_device_capability(self.device)
        runtime = native.core().cuda_runtime_version()
        return {
            "compute capability": f"{major}.{minor}",
            "multiprocessors": str(self._properties.multi_processor_count),
            "memory": f"{self._properties.total_memory / 2**30:.1f} GiB",
            "L2": f"{self.l2_bytes / 2**20:.0f} MiB",
            "driver": driver_version(),
            "CUDA of torch": str(torch.version.cuda),
            "CUDA of the kernels": f"{runtime // 1000}.{runtime % 1000 // 10}",
            "kernels built for": str(native.core().cuda_architectures),
        }


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return next(iter(done.stdout.split()), "unknown") if done.returncode == 0 else "unknown"


def reason_to_refuse() -> str | None:
    """Why nothing can be measured here, in one line; None if it can."""
    if not torch.cuda.is_available():
        return f"needs a CUDA device; torch {torch.__version__} sees none"
    failure = native.failure()
    if failure is not None:
        return failure.splitlines()[0]
    if not hasattr(native.core(), "cuda"):
        return (
            "the native core was built without CUDA kernels; with nvcc installed, "
            "run `OBERT_CUDA=1 pip install -e .`"
        )
    return None
