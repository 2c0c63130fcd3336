"""``EmpiricalBlockFisherInverse`` against the reference algorithm in torch, as its users run both.

    python benchmarks/one_by_one.py              # a few minutes on 2 cores

Every round makes an object, feeds it m gradients one by one and asks for the diagonal: the time has
the first touch of all memory, the copies of the gradients and the factorisation in it.  Contenders
alternate in one process; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from contender import ReferenceInverse
from machine import machine

from obert_kernels import EmpiricalBlockFisherInverse

DAMPING = 1e-7
SETTLE = 0.3  # seconds after which nothing is left of the other contender: threads that spin
RESULTS = Path(__file__).parent / "results"


def measure(
    rows: int, columns: int, size: int, m: int, rounds: int
) -> dict[str, float | int | str | list[float]]:
    n = rows * columns
    torch.manual_seed(0)
    pool = [torch.randn(n) * 1e-4 for _ in range(16)]

    def run(kind: Callable[..., ReferenceInverse | EmpiricalBlockFisherInverse]) -> torch.Tensor:
        inverse = kind(m, size, n, DAMPING)
        for i in range(m):
            inverse.add_grad(pool[i % len(pool)])
        return inverse.diag()

    contenders = {"reference": ReferenceInverse, "ours": EmpiricalBlockFisherInverse}
    diagonals = {name: run(kind) for name, kind in contenders.items()}
    torch.testing.assert_close(diagonals["ours"], diagonals["reference"], rtol=1e-2, atol=1.0)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, kind in contenders.items():
            time.sleep(SETTLE)
            start = time.perf_counter()
            run(kind)
            times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "matrix": f"{rows}x{columns}",
        "block_size": size,
        "m": m,
        "rounds": rounds,
        "reference_s": median["reference"],
        "ours_s": median["ours"],
        "ratio": median["reference"] / median["ours"],
        "all_ours_s": times["ours"],
        "all_reference_s": times["reference"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, nargs="+", default=[768])
    parser.add_argument("--block", type=int, nargs="+", default=[50])
    parser.add_argument("-m", type=int, nargs="+", default=[128], help="gradients")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--name", default="one_by_one", help="file name under results/")
    args = parser.parse_args()
    about = machine()
    found = []
    lines = [
        "| matrix | B | m | reference s | ours s | ratio |",
        "|---|---|---|---|---|---|",
    ]
    for columns in args.columns:
        for size in args.block:
            for m in args.m:
                row = measure(args.rows, columns, size, m, args.rounds)
                found.append(row)
                lines.append(
                    f"| {row['matrix']} | {size} | {m} | {row['reference_s']:.4g} | "
                    f"{row['ours_s']:.4g} | {row['ratio']:.1f}x |"
                )
                print(lines[-1], flush=True)
    RESULTS.mkdir(exist_ok=True)
    command = shlex.join(["python", "benchmarks/one_by_one.py", *sys.argv[1:]])
    document = {"command": command, "arguments": vars(args), "machine": about, "rows": found}
    (RESULTS / f"{args.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    text = (
        f"# EmpiricalBlockFisherInverse, fed one gradient at a time\n\n`{command}` on "
        f"{about['cpu']}, {about['threads']} threads, {about['kernels']} kernels, torch "
        f"{about['torch']}, {about['date']}.  From the first gradient to the diagonal of the "
        "inverse, first touch of all memory and copies included; medians of "
        f"{args.rounds} alternated rounds.\n\n"
    )
    (RESULTS / f"{args.name}.md").write_text(text + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
