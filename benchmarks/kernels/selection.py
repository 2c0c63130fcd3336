"""What greedy and N:M selection cost beside diagonal scores, and what living rows alone save.

    python -m benchmarks.kernels.selection      # about 3 minutes on 2 cores

One process, alternated, medians over rounds, one matrix.  "Living rows": gradients of a matrix of
which a share of the weights is left, drawn at random, go to the Fisher of all weights and to that
of the living ones; a time is m times that of one gradient (measured over k in one call) plus one
greedy selection.  "Reading alone" looks for the largest number in the same gradients.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch

from benchmarks.kernels.cpu import DAMPING, SCALE, SETTLE, seconds
from benchmarks.support.report import made_by, new_document, table, write
from obert_kernels import GramFisher
from obert_kernels.fisher.living import block_fisher
from obert_kernels.gradients.buffers import gradient_buffer

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


# Column -> field and how it is written.
SELECTION = {
    "B": "block_size:d", "selection": "selection:s", "ms": "ms:.1f",
    "times diagonal": "of_diagonal:.2f",
}  # fmt: skip
LIVING = {
    "gradients": "gradients:s", "sparsity": "sparsity:.0%",
    "memory, all : living": "bytes_ratio:.1f",
    "ms per gradient, all": "all_ms_per_gradient:.2f",
    "living": "living_ms_per_gradient:.2f",
    "reading alone": "reading_ms_per_gradient:.2f",
    "selection ms, all": "all_selection_ms:.0f",
    "living ": "living_selection_ms:.0f",
    "time, all : living": "time_ratio:.1f",
}  # fmt: skip


def columns_of(outcomes: list[dict], columns: dict[str, str]) -> list[str]:
    """A table of the outcomes that have these."""
    fields = [field.split(":") for field in columns.values()]
    rows = [row for row in outcomes if fields[-1][0] in row]
    return table(list(columns), [[format(row[key], how) for key, how in fields] for row in rows])


def markdown(document: dict) -> str:
    config, outcomes = document["config"], document["outcomes"]
    return "\n".join([
        "# Selection, and Fishers of living weights, on the CPU",
        "",
        f"{made_by(document)[0]}; one "
        f"{config['rows']}x{config['columns']} matrix, float64 Gram, "
        f"medians of {config['rounds']} alternated rounds.",
        "",
        "## Selection from the Gram",
        "",
        *columns_of(outcomes, SELECTION),
        "",
        f"## Living rows alone, B = 50, m = {config['m']}, {config['k']} gradients a call, greedy "
        "selection",
        "",
        *columns_of(outcomes, LIVING),
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--block", type=int, nargs="+", default=[16, 32, 48, 50, 64, 128])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9, 0.95])
    parser.add_argument("-m", type=int, default=256, help="gradients in the Fisher")
    parser.add_argument("-k", type=int, default=32, help="gradients per call")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    n, shares = args.rows * args.columns, [1 - s for s in args.sparsity]
    document = new_document("selection", vars(args))
    outcomes = document["outcomes"]
    outcomes += selection_rows(n, args.block, args.rounds)
    for dtype in (torch.float32, torch.bfloat16):
        outcomes += living_rows(n, 50, args.m, args.k, shares, dtype, args.rounds)
    print(write(document, markdown).read_text())


if __name__ == "__main__":
    main()
