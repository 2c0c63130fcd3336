"""What every result says about the machine it was measured on."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import torch

from obert_kernels.ops import native


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "cpu": processor_name(),
        "threads": str(torch.get_num_threads()),
        "kernels": native.core().current_instruction_set(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
