"""``EmpiricalBlockFisherInverse`` against the reference algorithm in torch, as its users run both.

    python -m benchmarks.kernels.one_by_one       # a minute on 2 cores

Every round makes an object, feeds it m gradients one by one and asks for the diagonal: the time has
the first touch of all memory, the copies of the gradients and the factorisation in it.  Contenders
alternate in one process; ratios are of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch

from benchmarks.support.contender import ReferenceInverse
from benchmarks.support.report import made_by, new_document, table, write
from obert_kernels import EmpiricalBlockFisherInverse

DAMPING = 1e-7
SETTLE = 0.3  # seconds after which nothing is left of the other contender: threads that spin
POOL = 16  # gradients that are fed again and again


def measure(rows: int, columns: int, size: int, m: int, rounds: int) -> dict[str, Any]:
    n = rows * columns
    torch.manual_seed(0)
    pool = [torch.randn(n) * 1e-4 for _ in range(POOL)]

    def run(kind: Callable[..., Any]) -> torch.Tensor:
        inverse = kind(m, size, n, DAMPING)
        for i in range(m):
            inverse.add_grad(pool[i % POOL])
        return inverse.diag()

    contenders = {"reference": ReferenceInverse, "ours": EmpiricalBlockFisherInverse}
    torch.testing.assert_close(
        run(EmpiricalBlockFisherInverse), run(ReferenceInverse), rtol=1e-3, atol=0
    )
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
        "reference_s": median["reference"],
        "ours_s": median["ours"],
        "ratio": median["reference"] / median["ours"],
        "rounds": times,
    }


def markdown(document: Mapping[str, Any]) -> str:
    rows = [
        (
            row["matrix"], row["block_size"], row["m"], f"{row['reference_s']:.4g}",
            f"{row['ours_s']:.4g}", f"{row['ratio']:.1f}x",
        )
        for row in document["outcomes"]
    ]  # fmt: skip
    by = made_by(document)[0]
    head = (
        f"# EmpiricalBlockFisherInverse, fed one gradient at a time\n\n{by}.  From the first "
        "gradient to the diagonal of the inverse, first touch of all memory and copies included; "
        f"medians of {document['config']['rounds']} alternated rounds.\n"
    )
    columns = ("matrix", "B", "m", "reference s", "ours s", "ratio")
    return "\n".join([head, *table(columns, rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, nargs="+", default=[768])
    parser.add_argument("--block", type=int, nargs="+", default=[50])
    parser.add_argument("-m", type=int, nargs="+", default=[128], help="gradients")
    parser.add_argument("--rounds", type=int, default=9)
    config = vars(parser.parse_args())
    cases = product(config["columns"], config["block"], config["m"])
    document = new_document("one_by_one", config)
    document["outcomes"] = [measure(config["rows"], *case, config["rounds"]) for case in cases]
    print(f"wrote {write(document, markdown)}\n{markdown(document)}")


if __name__ == "__main__":
    main()
