"""What greedy and N:M selection cost beside diagonal scores, and what living rows alone save.

    python benchmarks/selection.py      # about 3 minutes on 2 cores

One process, alternated, medians over rounds, one matrix.  "Living rows": gradients of a matrix of
which a share of the weights is left, drawn at random, go to the Fisher of all weights and to that
of the living ones; a time is m times that of one gradient (measured over k in one call) plus one
greedy selection.  "Reading alone" looks for the largest number in the same gradients.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from kernels import DAMPING, SCALE, SETTLE, seconds
from machine import machine

from obert_kernels import GramFisher
from obert_kernels.fisher.living import block_fisher
from obert_kernels.gradients.buffers import gradient_buffer

RESULTS = Path(__file__).parent / "results"
BY_FOUR = ", groups of 4"


def correlated(k: int, n: int, dtype: torch.dtype) -> torch.Tensor:
    """k gradients: a shared direction and noise."""
    torch.manual_seed(0)
    shared = torch.randn(n) * SCALE
    pool = gradient_buffer(k, n, dtype)
    for row in pool:
        row.copy_(torch.randn(n) * SCALE + torch.randn(()) * shared)
    return pool


def alternated(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each call; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            time.sleep(SETTLE)
            spent = seconds(call)
            if index > 0:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


def selections(fisher: GramFisher, n: int, size: int) -> dict[str, Callable[[], object]]:
    weight, keep = torch.randn(n) * 0.04, torch.ones(n, dtype=torch.bool)
    calls: dict[str, Callable[[], object]] = {
        "diagonal": lambda: fisher.scores(weight, DAMPING),
        "greedy": lambda: fisher.greedy_scores(weight, keep, DAMPING),
        f"diagonal{BY_FOUR}": lambda: fisher.scores(weight, DAMPING, 4),
        f"greedy{BY_FOUR}": lambda: fisher.greedy_scores(weight, keep, DAMPING, 4),
    }
    for kept, group in ((2, 4), (1, 4), (4, 8)):
        if size % group == 0:
            calls[f"{kept}:{group}"] = partial(fisher.n_of_m, weight, keep, DAMPING, kept, group)
    return calls


def selection_rows(n: int, sizes: list[int], rounds: int) -> list[dict]:
    rows = []
    for size in sizes:
        fisher = GramFisher(n, size)
        fisher.accumulate(correlated(32, n, torch.float32))
        median = alternated(selections(fisher, n, size), rounds)
        for name, spent in median.items():
            rows.append({
                "block_size": size, "selection": name, "ms": spent * 1e3,
                "of_diagonal": spent / median[f"diagonal{BY_FOUR * name.endswith(BY_FOUR)}"],
            })  # fmt: skip
    return rows


def living_rows(
    n: int, size: int, m: int, k: int, shares: list[float], dtype: torch.dtype, rounds: int
) -> list[dict]:
    gradients = correlated(k, n, dtype)
    as_floats = gradients.view(torch.float32)  # the largest of these is found as fast as it is read
    full = GramFisher(n, size)
    everything = torch.ones(n, dtype=torch.bool)
    weight = torch.randn(n) * 0.04
    rows = []
    for share in shares:
        torch.manual_seed(1)
        alive = torch.rand(n) < share
        live = block_fisher(alive, size)
        left = weight * alive
        calls = {
            "all: gradients": lambda: full.accumulate(gradients),
            "living: gradients": lambda f=live: f.accumulate(gradients),
            "all: selection": lambda: full.greedy_scores(weight, everything, DAMPING),
            "living: selection": partial(live.greedy_scores, left, alive, DAMPING),
            "reading": as_floats.amax,
        }
        median = alternated(calls, rounds)
        total = {
            which: m / k * median[f"{which}: gradients"] + median[f"{which}: selection"]
            for which in ("all", "living")
        }
        rows.append({
            "gradients": str(dtype).removeprefix("torch."),
            "sparsity": 1 - share,
            "bytes_ratio": full.num_bytes / live.num_bytes,
            "all_ms_per_gradient": median["all: gradients"] / k * 1e3,
            "living_ms_per_gradient": median["living: gradients"] / k * 1e3,
            "reading_ms_per_gradient": median["reading"] / k * 1e3,
            "all_selection_ms": median["all: selection"] * 1e3,
            "living_selection_ms": median["living: selection"] * 1e3,
            "all_s": total["all"],
            "living_s": total["living"],
            "time_ratio": total["all"] / total["living"],
        })  # fmt: skip
    return rows


def markdown(rows: list[dict], columns: dict[str, str]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        values = {key: row[field.split(":")[0]] for key, field in columns.items()}
        cells = [format(values[key], field.partition(":")[2]) for key, field in columns.items()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--block", type=int, nargs="+", default=[16, 32, 48, 50, 64, 128])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("-m", type=int, default=256, help="gradients in the Fisher")
    parser.add_argument("-k", type=int, default=32, help="gradients per call")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--name", default="selection_cpu", help="file name under results/")
    args = parser.parse_args()
    n = args.rows * args.columns
    selection = selection_rows(n, args.block, args.rounds)
    living = []
    for dtype in (torch.float32, torch.bfloat16):
        shares = [1 - s for s in args.sparsity]
        living += living_rows(n, 50, args.m, args.k, shares, dtype, args.rounds)
    about, command = machine(), shlex.join(["python", "benchmarks/selection.py", *sys.argv[1:]])
    RESULTS.mkdir(exist_ok=True)
    document = {"command": command, "arguments": vars(args), "machine": about,
                "selection": selection, "living": living}  # fmt: skip
    (RESULTS / f"{args.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    text = (
        f"# Selection, and Fishers of living weights, on the CPU\n\n`{command}` on "
        f"{about['cpu']}, {about['threads']} threads, {about['kernels']} kernels, torch "
        f"{about['torch']}, {about['date']}; one {args.rows}x{args.columns} matrix, float64 Gram, "
        f"medians of {args.rounds} alternated rounds.\n\n## Selection from the Gram\n\n"
        + markdown(selection, {
            "B": "block_size:d", "selection": "selection:s", "ms": "ms:.1f",
            "times diagonal": "of_diagonal:.2f",
        })
        + f"\n\n## Living rows alone, B = 50, m = {args.m}, {args.k} gradients a call, greedy "
        "selection\n\n"
        + markdown(living, {
            "gradients": "gradients:s", "sparsity": "sparsity:.0%",
            "memory, all : living": "bytes_ratio:.1f",
            "ms per gradient, all": "all_ms_per_gradient:.2f",
            "living": "living_ms_per_gradient:.2f",
            "reading alone": "reading_ms_per_gradient:.2f",
            "selection ms, all": "all_selection_ms:.0f",
            "living ": "living_selection_ms:.0f",
            "time, all : living": "time_ratio:.1f",
        })
        + "\n"
    )  # fmt: skip
    (RESULTS / f"{args.name}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
