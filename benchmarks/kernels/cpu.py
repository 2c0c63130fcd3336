"""CPU kernels against the reference algorithm in torch, alternated in one process.

    python -m benchmarks.kernels.cpu              # everything, about 10 minutes on 2 cores
    python -m benchmarks.kernels.cpu --block 50 --rows 768 --columns 768

Every figure is the median over rounds; in each round every contender runs on the same data, after
a pause: once if it takes gradients, else, after a call that is not timed, as often as that call's
time goes into 20 ms (a processor takes its first milliseconds after a pause to wake up, and a model
has a matrix after the other).  "gradients to inverse" is m times the cost of one gradient (measured
over k gradients, in one call for ours) plus one inversion.  The reference adds its gradients one by
one, and its cost per gradient does not depend on how many came before, so it is measured on a few.
Bounds are calculated from bytes and flops (stated per row in the JSON) against ceilings
measured here: reading memory, and matrix products in the same precision.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch

from benchmarks.support.contender import ReferenceInverse
from benchmarks.support.report import line, made_by, new_document, table, write
from obert_kernels import WoodburyFisher, ops
from obert_kernels.gradients.buffers import gradient_buffer
from obert_kernels.ops.packing import unpack_inverse

M = 1024
DAMPING = 1e-7
SCALE = 1e-4
SETTLE = 0.3  # seconds after which nothing is left of the other contender: threads that spin
AWAKE = 0.02  # seconds of short calls, one after the other


def seconds(call: Callable[[], object], times: int = 1) -> float:
    """Of one call, the mean of several."""
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def ceilings() -> dict[str, float]:
    """Bytes read per second and flops per second this machine reaches right now."""
    data = torch.zeros(1 << 26)
    read = min(seconds(data.sum) for _ in range(9))
    found = {"read_bytes_per_s": data.numel() * 4 / read}
    for name, dtype in (("float32", torch.float32), ("float64", torch.float64)):
        a = torch.rand(2048, 2048, dtype=dtype)
        best = min(seconds(lambda a=a: a @ a) for _ in range(9))
        found[f"{name}_flops_per_s"] = 2 * 2048**3 / best
    return found


def gradient_pool(k: int, n: int) -> torch.Tensor:
    """k correlated gradients (a shared direction and noise)."""
    torch.manual_seed(0)
    shared = torch.randn(n) * SCALE
    pool = gradient_buffer(k, n)  # rows apart, as the pruner gathers them
    for row in pool:
        torch.randn(n, out=row).mul_(SCALE).add_(torch.randn(()) * shared)
    return pool


def validate(n: int, size: int, g: torch.Tensor) -> None:
    """All routes must agree on a piece of the data before anything is timed."""
    part = g[:, : min(n, 20 * size)].contiguous()
    d = part.shape[1]
    ref = ReferenceInverse(M, size, d, DAMPING)
    for row in part:
        ref.add_grad(row)
    status = ops.new_status()
    blocks, triangle = ref.blocks, size * (size + 1) // 2
    for dtype in (torch.float32, torch.float64):
        gram = torch.zeros(blocks, triangle, dtype=dtype)
        ops.gram_accumulate(gram, part, size)
        inverse = ops.gram_inverse(gram, d, size, M, DAMPING, torch.float32, status)
        dense = unpack_inverse(inverse)
        torch.testing.assert_close(dense, ref.f_inv, rtol=1e-3, atol=1e-3 / DAMPING * 1e-2)
    state = WoodburyFisher(d, M, size, damping=DAMPING).packed
    ops.woodbury_update(state, part, M, status)
    dense = unpack_inverse(state)
    torch.testing.assert_close(dense, ref.f_inv, rtol=1e-3, atol=1e-3 / DAMPING * 1e-2)
    assert status.item() == -1


def bound_seconds(kind: str, n: int, size: int, k: int, top: dict[str, float]) -> dict:
    """Time per gradient that bytes and flops allow.

    A block's triangle is read and written once for k gradients of 4 B bytes.  Gram: a
    multiply-add for each entry of the triangle.  Woodbury: F^-1 g (2 B^2 flops), then such a one.
    """
    blocks = -(-n // size)
    element = 8 if kind == "gram float64" else 4
    state_bytes, flops = size * (size + 1) * element, size * (size + 1)
    if kind == "woodbury":
        flops += 2 * size * size
    rate = "float64" if kind == "gram float64" else "float32"
    by_bytes = blocks * (state_bytes / k + 4 * size) / top["read_bytes_per_s"]
    by_flops = blocks * flops / top[f"{rate}_flops_per_s"]
    return {"bytes": by_bytes, "flops": by_flops}


def measure(rows: int, columns: int, size: int, k: int, rounds: int, top: dict) -> list[dict]:
    n = rows * columns
    g = gradient_pool(k, n)
    validate(n, size, g)
    torch.manual_seed(1)
    weight, keep = torch.randn(n) * 0.04, torch.rand(n) < 0.3
    keep4 = (torch.rand(n // 4) < 0.3).repeat_interleave(4)
    ref = ReferenceInverse(M, size, n, DAMPING)
    blocks, triangle = ref.blocks, size * (size + 1) // 2
    gram32 = torch.zeros(blocks, triangle)
    gram64 = torch.zeros(blocks, triangle, dtype=torch.float64)
    state = WoodburyFisher(n, M, size, damping=DAMPING).packed
    status = ops.new_status()
    fisher = (size, float(M), DAMPING, status)
    few = 4
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "reference gradient": (lambda: [ref.add_grad(g[i]) for i in range(few)], few),
        "gram float32": (lambda: ops.gram_accumulate(gram32, g, size), k),
        "gram float64": (lambda: ops.gram_accumulate(gram64, g, size), k),
        "woodbury": (lambda: ops.woodbury_update(state, g, float(M), status), k),
        "inverse of gram float32": (
            lambda: ops.gram_inverse(gram32, n, size, float(M), DAMPING, torch.float32, status), 1),
        "inverse of gram float64": (
            lambda: ops.gram_inverse(gram64, n, size, float(M), DAMPING, torch.float32, status), 1),
        "reference scores": (lambda: ref.scores(weight), 1),
        "scores, given inverse": (lambda: ops.inverse_scores(state, weight, 1, status), 1),
        "scores, from Gram": (lambda: ops.gram_scores(gram64, weight, 1, *fisher), 1),
        "reference update": (lambda: ref.update(weight, keep), 1),
        "sum update, given inverse": (
            lambda: ops.inverse_update(state, weight, keep, 1, False, False, status), 1),
        "sum update, from Gram": (
            lambda: ops.gram_update(gram64, weight, keep, 1, False, *fisher), 1),
        "joint update, from Gram": (
            lambda: ops.gram_update(gram64, weight, keep, 1, True, *fisher), 1),
    }  # fmt: skip
    if size % 4 == 0:
        calls |= {
            "reference 4-block scores": (lambda: ref.group_scores(weight, 4), 1),
            "4-block scores, given inverse": (
                lambda: ops.inverse_scores(state, weight, 4, status), 1),
            "4-block scores, from Gram": (lambda: ops.gram_scores(gram64, weight, 4, *fisher), 1),
            "reference 4-block update": (lambda: ref.group_update(weight, keep4, 4), 1),
            "4-block sum update, given inverse": (
                lambda: ops.inverse_update(state, weight, keep4, 4, False, False, status), 1),
            "4-block joint update, from Gram": (
                lambda: ops.gram_update(gram64, weight, keep4, 4, True, *fisher), 1),
        }  # fmt: skip
    times: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, (call, count) in calls.items():
            time.sleep(SETTLE)
            # Short ones begin with warm caches, whoever ran before.
            repeats = math.ceil(AWAKE / seconds(call)) if count == 1 else 1
            spent = seconds(call, repeats) / count
            if index > 0:  # the first round warms up
                times[name].append(spent)
    if status.item() != -1:
        raise SystemExit(f"block {status.item()} broke down; the timings mean nothing")
    median = {name: statistics.median(values) for name, values in times.items()}
    return rows_of(median, times, rows, columns, size, k, top)


def rows_of(
    median: dict, times: dict, rows: int, columns: int, size: int, k: int, top: dict
) -> list[dict]:
    common = {"matrix": f"{rows}x{columns}", "block_size": size, "k": k}
    reference = M * median["reference gradient"]
    out = []
    for kind in ("gram float32", "gram float64", "woodbury"):
        inverse = median.get(f"inverse of {kind}", 0.0)
        total = M * median[kind] + inverse
        bound = bound_seconds(kind, rows * columns, size, k, top)
        out.append({
            **common,
            "what": f"gradients to inverse: {kind}",
            "reference_s": reference,
            "ours_s": total,
            "ratio": reference / total,
            "per_gradient_ms": median[kind] * 1e3,
            "reference_per_gradient_ms": median["reference gradient"] * 1e3,
            "inverse_ms": inverse * 1e3,
            "bound_ms": {name: value * 1e3 for name, value in bound.items()},
            "of_bound": max(bound.values()) / median[kind],
        })  # fmt: skip
    # What a user waits for: the reference keeps the inverse, we keep the Gram.
    for what, ours, theirs in (
        ("scores", "scores, from Gram", "reference scores"),
        ("sum update", "sum update, from Gram", "reference update"),
        ("4-block scores", "4-block scores, from Gram", "reference 4-block scores"),
    ):
        if ours not in median:
            continue
        total = M * median["gram float64"] + median[ours]
        out.append({
            **common,
            "what": f"gradients to {what}: gram float64",
            "reference_s": reference + median[theirs],
            "ours_s": total,
            "ratio": (reference + median[theirs]) / total,
        })  # fmt: skip
    for name in median:
        if "given inverse" not in name and "from Gram" not in name:
            continue
        kind = "4-block " if name.startswith("4-block") else ""
        against = f"reference {kind}{'scores' if 'scores' in name else 'update'}"
        out.append({
            **common,
            "what": name,
            "reference_s": median[against],
            "ours_s": median[name],
            "ratio": median[against] / median[name],
        })  # fmt: skip
    for row in out:
        row["rounds"] = len(times["woodbury"])
    return out


COLUMNS = ("matrix", "B", "k", "what", "reference s", "ours s", "ratio", "of the bound")


def cells(row: dict) -> list[object]:
    of_bound = f"{row['of_bound']:.0%}" if "of_bound" in row else ""
    times = [f"{row[name]:.4g}" for name in ("reference_s", "ours_s")]
    shown = [row[name] for name in ("matrix", "block_size", "k", "what")]
    return [*shown, *times, f"{row['ratio']:.1f}x", of_bound]


def markdown(document: dict) -> str:
    top, m = document["ceilings"], document["config"]["m"]
    return "\n".join([
        "# CPU kernels against the reference algorithm",
        "",
        f"{made_by(document)[0]}.  m = {m}; medians of "
        f"{document['config']['rounds']} alternated rounds.  Times from "
        f"gradients on are {m} times the measured time of one gradient (k in one call for ours, "
        "one by one for the reference), plus what follows.  Ceilings "
        f"measured in the same process: reading {top['read_bytes_per_s'] / 1e9:.1f} GB/s, matrix "
        f"products {top['float32_flops_per_s'] / 1e9:.0f} GFLOP/s in float32 and "
        f'{top["float64_flops_per_s"] / 1e9:.0f} in float64.  "Of the bound": the larger of '
        "the times that bytes and flops need at these ceilings, over the time measured.",
        "",
        *table(COLUMNS, map(cells, document["outcomes"])),
        "",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--block", type=int, nargs="+", default=[4, 32, 50, 64, 128])
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, nargs="+", default=[768, 3072])
    parser.add_argument("-k", type=int, nargs="+", default=[64], help="gradients per call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--name", default="kernels_blocks", help="folder under results/")
    config = vars(parser.parse_args())
    name = config.pop("name")
    document = new_document(name, {**config, "m": M}, ceilings=(top := ceilings()))
    for columns, size, k in product(config["columns"], config["block"], config["k"]):
        new = measure(config["rows"], columns, size, k, config["rounds"], top)
        print(*map(line, map(cells, new)), sep="\n", flush=True)
        document["outcomes"] += new
    print(f"wrote {write(document, markdown)}")


if __name__ == "__main__":
    main()
