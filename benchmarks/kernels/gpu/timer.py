"""What benchmarks/gpu.py must know of a device: times, memory, cache size, name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch

from obert_kernels.ops import native

Calls = Sequence[Callable[[], object]]  # the same work on different data
WARM_UP = 3
_LEAST_SCRATCH = 256 << 20


class Timer(Protocol):
    """Everything that depends on time or on the device, so that tests can replace it."""

    device: torch.device
    name: str
    l2_bytes: int

    def free_bytes(self) -> int:
        """Device memory that can still be allocated."""
        ...

    def alternate(self, contenders: Mapping[str, Calls], rounds: int) -> dict[str, list[float]]:
        """Seconds of each contender in each round; every round runs all of them in turn.

        In round r a contender runs its call number r modulo their number.
        """
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

    def alternate(self, contenders: Mapping[str, Calls], rounds: int) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for index in range(-WARM_UP, rounds):
            for name, calls in contenders.items():
                spent = self._seconds(calls[index % len(calls)])
                if index >= 0:
                    times[name].append(spent)
        return times

    def describe(self) -> dict[str, str]:
        major, minor = torch.cuda.get_device_capability(self.device)
        return {
            "compute capability": f"{major}.{minor}",
            "multiprocessors": str(self._properties.multi_processor_count),
            "memory": f"{self._properties.total_memory / 2**30:.1f} GiB",
            "L2": f"{self.l2_bytes / 2**20:.0f} MiB",
            "CUDA of torch": str(torch.version.cuda),
            "kernels built for": str(native.core().cuda_architectures),
        }


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
