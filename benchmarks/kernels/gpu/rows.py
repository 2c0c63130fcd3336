"""One line of the table: an operator and its contenders, timed, and its share of the ceilings."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.kernels.gpu.kernels import Kernel, name_of
from benchmarks.kernels.gpu.settings import Settings
from benchmarks.kernels.gpu.timer import Timer

OURS = "ours"
COPIES = 3
# Of the memory that is free; the rest is for temporaries nobody counted.
MEMORY_SHARE = 0.5
CACHES = 4  # a copy is at least that many times the L2
Row = dict[str, Any]


@dataclass(frozen=True)
class Ceilings:
    """What the device reached in this run."""

    bytes_per_s: float  # of a copy, reading and writing counted
    flops_per_s: dict[str, float]


def measure_ceilings(timer: Timer, settings: Settings) -> Ceilings:
    """Best of the rounds, not the median: a ceiling that is too low would flatter."""
    most = int(timer.free_bytes() * MEMORY_SHARE) // 2
    size = max(4, min(settings.ceiling_bytes, most) // 4)
    source = torch.zeros(size, device=timer.device)
    target = torch.empty_like(source)
    copies = timer.alternate(
        {"copy": [lambda: target.copy_(source)]}, settings.rounds, settings.row_seconds
    )
    flops = {}
    for dtype in (torch.float32, torch.float64):
        n = max(1, min(settings.matrix_size, math.isqrt(most // (3 * dtype.itemsize))))
        a = torch.rand(n, n, dtype=dtype, device=timer.device)
        b, c = torch.rand_like(a), torch.empty_like(a)
        what = f"{name_of(dtype)} product"
        calls = [lambda a=a, b=b, c=c: torch.mm(a, b, out=c)]
        times = timer.alternate({what: calls}, settings.rounds, settings.row_seconds)[what]
        flops[name_of(dtype)] = 2 * n**3 / min(times)
    return Ceilings(2 * 4 * size / min(copies["copy"]), flops)


def blocks_to_time(kernel: Kernel, timer: Timer, settings: Settings) -> int:
    """Blocks in a copy: past the cache, but all copies together within the memory.

    The number makes whole blocks and whole groups of four weights.
    """
    wanted = max(CACHES * timer.l2_bytes, settings.least_copy_bytes) / kernel.bytes_in_cache()
    possible = MEMORY_SHARE * timer.free_bytes() / (COPIES * kernel.memory)
    together = math.lcm(kernel.block_size, 4)
    weights = max(1, int(min(wanted, possible)) // together) * together
    return weights // kernel.block_size


def measure(kernel: Kernel, timer: Timer, settings: Settings, top: Ceilings) -> Row:
    """Time one kernel and its contenders.

    Raises:
        RuntimeError: a block broke down; the times mean nothing.
    """
    blocks = blocks_to_time(kernel, timer, settings)
    copies = [kernel.build(blocks * kernel.block_size, timer.device) for _ in range(COPIES)]
    calls = {OURS: [copy.ours for copy in copies]}
    scales = {name: contender.scale for name, contender in copies[0].contenders.items()}
    for name in scales:
        calls[name] = [copy.contenders[name].call for copy in copies]
    times = timer.alternate(calls, settings.rounds, settings.row_seconds)
    for copy in copies:
        if copy.status is not None and copy.status.item() != -1:
            raise RuntimeError(f"{kernel.operator}: block {copy.status.item()} broke down")
    in_cache = blocks * kernel.block_size * kernel.bytes_in_cache()
    return {
        "operator": kernel.operator,
        "variant": kernel.variant,
        "block_size": kernel.block_size,
        "blocks": blocks,
        "past_the_cache": COPIES * in_cache > 2 * timer.l2_bytes,
        **figures(kernel, blocks, times, scales, top),
    }


def figures(
    kernel: Kernel,
    blocks: int,
    times: dict[str, list[float]],
    scales: dict[str, float],
    top: Ceilings,
) -> Row:
    """Medians, rates, shares of the ceilings and ratios."""
    cost = kernel.cost(blocks)
    ours = statistics.median(times[OURS])
    others = {name: scale * statistics.median(times[name]) for name, scale in scales.items()}
    of_memory = cost.bytes / ours / top.bytes_per_s
    of_arithmetic = cost.flops / ours / top.flops_per_s[cost.arithmetic]
    return {
        "rounds": len(times[OURS]),
        "seconds": ours,
        "fastest": min(times[OURS]),
        "slowest": max(times[OURS]),
        "bytes": cost.bytes,
        "flops": cost.flops,
        "arithmetic": cost.arithmetic,
        "gb_per_s": cost.bytes / ours / 1e9,
        "tflop_per_s": cost.flops / ours / 1e12,
        "of_memory": of_memory,
        "of_arithmetic": of_arithmetic,
        "contender_seconds": others,
        "ratios": {name: seconds / ours for name, seconds in others.items()},
    }
