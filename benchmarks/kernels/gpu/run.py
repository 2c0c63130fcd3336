"""CUDA kernels against the reference algorithm and torch on one GPU, and against its ceilings.

    python benchmarks/gpu.py                      # everything; writes results/gpu/<device>.*
    python benchmarks/gpu.py --block 50 -k 16 --type float32

First every operator is checked against the float64 oracle on the device; a mismatch ends the
run.  Then the device's own ceilings are measured (copying memory, matrix products without
TF32), and every operator is timed by CUDA events, alternating with its contenders, on data
larger than the L2 cache, each time on the next of several copies.  A time is the median over
rounds and of the whole operator: outputs allocated and cleared are part of it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.kernels.gpu.kernels import Kernel, kernels, name_of
from benchmarks.kernels.gpu.timer import CudaTimer, Timer, reason_to_refuse
from benchmarks.kernels.gpu.validation import Mismatch, is_refusal, validate
from benchmarks.support.machine import machine
from benchmarks.support.report import RESULTS, command

TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OURS = "ours"
COPIES = 3
# Of the memory that is free; the rest is for temporaries nobody counted.
MEMORY_SHARE = 0.5
CACHES = 4  # a copy is at least that many times the L2
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What is run, and how large."""

    block_sizes: tuple[int, ...] = (4, 32, 50, 64, 128)
    gradient_types: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    gradients_per_call: tuple[int, ...] = (16, 64)
    rounds: int = 20
    validation_blocks: int = 200
    least_copy_bytes: int = 256 << 20
    ceiling_bytes: int = 1 << 30
    matrix_size: int = 4096


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
    copies = timer.alternate({"copy": [lambda: target.copy_(source)]}, settings.rounds)
    flops = {}
    for dtype in (torch.float32, torch.float64):
        n = max(1, min(settings.matrix_size, math.isqrt(most // (3 * dtype.itemsize))))
        a = torch.rand(n, n, dtype=dtype, device=timer.device)
        b, c = torch.rand_like(a), torch.empty_like(a)
        what = f"{name_of(dtype)} product"
        calls = [lambda a=a, b=b, c=c: torch.mm(a, b, out=c)]
        times = timer.alternate({what: calls}, settings.rounds)[what]
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
    times = timer.alternate(calls, settings.rounds)
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


HEADER = (
    "| B | operator | variant | ms | GB/s | of copying | TFLOP/s | of matrix product | "
    "times faster |\n|---|---|---|---|---|---|---|---|---|"
)


def table_row(row: Row) -> str:
    ratios = ", ".join(f"{ratio:.1f}x {name}" for name, ratio in row["ratios"].items())
    note = "" if row["past_the_cache"] else " (in cache: too little memory free)"
    return (
        f"| {row['block_size']} | {row['operator']} | {row['variant']}{note} | "
        f"{row['seconds'] * 1e3:.4g} | {row['gb_per_s']:.4g} | {row['of_memory']:.0%} | "
        f"{row['tflop_per_s']:.3g} {row['arithmetic']} | {row['of_arithmetic']:.0%} | {ratios} |"
    )


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def summary(document: Row) -> str:
    about, top = document["machine"], document["ceilings"]
    device = ", ".join(f"{key} {value}" for key, value in document["device"].items())
    return (
        f"# CUDA kernels on {document['name']}\n\n`{document['command']}`, {about['date']}, "
        f"torch {about['torch']}.  {device}.  {document['checks']} comparisons with the float64 "
        f"oracle passed on this device before anything was timed.\n\n"
        f"Ceilings measured in the same process: copying {top['bytes_per_s'] / 1e9:.0f} GB/s, "
        f"matrix products {top['flops_per_s']['float32'] / 1e12:.3g} TFLOP/s in float32 (no "
        f"TF32) and {top['flops_per_s']['float64'] / 1e12:.3g} in float64.  Where a device has "
        "float64 tensor cores the product uses them and these kernels do not: half of that "
        "ceiling is then the most they can reach.  Bytes and flops are those of the formula "
        "(benchmarks/kernels/costs.py), so that work done twice lowers the shares.  Times are "
        "medians over rounds of the whole operator, outputs allocated and cleared included.  The "
        "reference adds one gradient at a time; its time for k is k times one.  "
        "torch inverts dense float64 blocks that are already there, and at most some thousands "
        "of them, scaled up.\n\n"
    )


def draw(rows: list[Row], title: str, path: Path) -> None:
    """Bars: the larger share of a ceiling, per operator and block size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(f"{row['operator']}: {row['variant']}" for row in rows))
    sizes = list(dict.fromkeys(row["block_size"] for row in rows))
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(labels)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    height = 0.8 / len(sizes)
    for index, size in enumerate(sizes):
        mine = [row for row in rows if row["block_size"] == size]
        at = [labels.index(f"{row['operator']}: {row['variant']}") for row in mine]
        share = [100 * max(row["of_memory"], row["of_arithmetic"]) for row in mine]
        places = [place - 0.4 + height * (index + 0.5) for place in at]
        axes.barh(places, share, height, label=f"B = {size}")
    axes.set_yticks(range(len(labels)), labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("of the nearer ceiling, copying or matrix products (%)")
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png")


def write(document: Row, folder: Path) -> list[Path]:
    """JSON, Markdown and, where matplotlib is installed, a plot; return what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / slug(document["name"])
    written = [base.with_suffix(suffix) for suffix in (".json", ".md")]
    written[0].write_text(json.dumps(document, indent=1) + "\n")
    rows = "\n".join(table_row(row) for row in document["rows"])
    refused = "".join(f"\nNot on this device: {what}.\n" for what in document["refused"])
    written[1].write_text(f"{summary(document)}{HEADER}\n{rows}\n{refused}")
    if find_spec("matplotlib") is not None:
        written.append(base.with_suffix(".png"))
        draw(document["rows"], document["name"], written[2])
    return written


def measure_all(timer: Timer, settings: Settings, top: Ceilings) -> tuple[list[Row], list[str]]:
    """The rows, and what this device has too little shared memory for."""
    rows, refused = [], []
    chosen = (
        kernels(size, settings.gradients_per_call, settings.gradient_types)
        for size in settings.block_sizes
    )
    for kernel in itertools.chain.from_iterable(chosen):
        try:
            rows.append(measure(kernel, timer, settings, top))
        except ValueError as error:
            if not is_refusal(error):
                raise
            refused.append(f"{kernel.variant}: {error}")
            print(f"refused: {refused[-1]}", flush=True)
            continue
        print(table_row(rows[-1]), flush=True)
    return rows, refused


def run(timer: Timer, settings: Settings, folder: Path, command: str) -> Row:
    """Validate, measure, write.

    Raises:
        Mismatch: an operator disagrees with the oracle; nothing was timed.
    """
    count = validate(
        settings.block_sizes, settings.gradient_types, settings.validation_blocks, timer.device
    )
    print(f"{count} comparisons with the float64 oracle passed", flush=True)
    top = measure_ceilings(timer, settings)
    print(HEADER, flush=True)
    rows, refused = measure_all(timer, settings, top)
    document = {
        "command": command,
        "name": timer.name,
        "device": timer.describe(),
        "machine": machine(),
        "checks": count,
        "ceilings": {"bytes_per_s": top.bytes_per_s, "flops_per_s": top.flops_per_s},
        "refused": refused,
        "rows": rows,
    }
    for path in write(document, folder):
        print(f"wrote {path}")
    return document


def settings_from(arguments: list[str]) -> Settings:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = Settings()
    parser.add_argument("--block", type=int, nargs="+", default=default.block_sizes)
    parser.add_argument("--type", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument(
        "-k", type=int, nargs="+", default=default.gradients_per_call, help="gradients per call"
    )
    parser.add_argument("--rounds", type=int, default=default.rounds, help="at least 20")
    found = parser.parse_args(arguments)
    if found.rounds < 20:
        parser.error("--rounds must be at least 20: medians of fewer say little")
    return Settings(
        tuple(found.block), tuple(TYPES[name] for name in found.type), tuple(found.k), found.rounds
    )


def main() -> None:
    settings = settings_from(sys.argv[1:])
    reason = reason_to_refuse()
    if reason is not None:
        raise SystemExit(f"benchmarks/gpu.py: {reason}")
    torch.set_float32_matmul_precision("highest")  # no TF32, for torch and the reference alike
    try:
        run(CudaTimer(), settings, RESULTS / "gpu", command())
    except Mismatch as mismatch:
        raise SystemExit(f"benchmarks/gpu.py: {mismatch}") from None


if __name__ == "__main__":
    main()
