"""What memory and arithmetic allow on three GPUs for BERT-base: a calculation, no measurement.

    python -m benchmarks.kernels.roofline     # writes results/roofline/calculated.md and .json

From the bytes and flops of benchmarks/kernels/costs.py and the peak numbers of data sheets, nothing
else.  No device reaches its peaks, and nothing here says how near a kernel comes.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

from benchmarks.kernels import costs
from benchmarks.kernels.costs import Cost
from benchmarks.support.report import new_document, table, write

M = 1024
BLOCK_SIZE = 50
GRADIENTS_PER_CALL = (16, 64)
HIDDEN, INTERMEDIATE, LAYERS = 768, 3072, 12
MATRICES = [(HIDDEN * HIDDEN, 4 * LAYERS), (HIDDEN * INTERMEDIATE, 2 * LAYERS)]
WEIGHTS = sum(size * count for size, count in MATRICES)
BLOCKS = sum(-(-size // BLOCK_SIZE) * count for size, count in MATRICES)
GOAL = 30  # times less traffic than the reference


@dataclass(frozen=True)
class Device:
    """Peaks of a data sheet; arithmetic outside the tensor cores, which nothing here uses."""

    name: str
    bytes_per_s: float
    flops_per_s: dict[str, float]
    source: str


DEVICES = (
    Device("A100 SXM 80 GB", 2039e9, {"float32": 19.5e12, "float64": 9.7e12},
           "NVIDIA A100 data sheet: 2,039 GB/s, FP32 19.5 TFLOPS, FP64 9.7 TFLOPS"),
    Device("H100 SXM", 3350e9, {"float32": 67e12, "float64": 34e12},
           "NVIDIA H100 data sheet: 3.35 TB/s, FP32 67 TFLOPS, FP64 34 TFLOPS"),
    Device("RTX 4090", 1008e9, {"float32": 82.6e12, "float64": 82.6e12 / 64},
           "NVIDIA Ada GPU architecture white paper: 1,008 GB/s, FP32 82.6 TFLOPS, FP64 at "
           "1/64 of that"),
)  # fmt: skip


def reference() -> list[Cost]:
    """M gradients one by one; scores read the diagonal, weights and write."""
    return [
        costs.reference_gradient(BLOCKS, BLOCK_SIZE).times(M),
        costs.inverse_scores(BLOCKS, BLOCK_SIZE, 4, 1),
    ]


def woodbury(k: int) -> list[Cost]:
    return [
        costs.woodbury_update(BLOCKS, BLOCK_SIZE, k, 4).times(M // k),
        costs.inverse_scores(BLOCKS, BLOCK_SIZE, 4, 1),
    ]


def gram(k: int, gram_bytes: int) -> list[Cost]:
    """The Gram, then factored and scored once."""
    return [
        costs.gram_accumulate(BLOCKS, BLOCK_SIZE, k, gram_bytes, 4).times(M // k),
        costs.gram_scores(BLOCKS, BLOCK_SIZE, gram_bytes, 4, 1),
    ]


def routes(k: int) -> dict[str, list[Cost]]:
    return {"Woodbury float32": woodbury(k), "Gram float32": gram(k, 4), "Gram float64": gram(k, 8)}


# The routes with GOAL times less traffic; the float64 Gram needs more than 16 gradients a call
# for it.
REACH_GOAL = {
    ("Woodbury float32", 16),
    ("Gram float32", 16),
    *((route, 64) for route in routes(64)),
}


def traffic(phases: list[Cost]) -> int:
    return sum(cost.bytes for cost in phases)


def seconds(phases: list[Cost], device: Device) -> float:
    """The phases run one after the other, each at its own bound."""
    return sum(
        cost.bound_seconds(device.bytes_per_s, device.flops_per_s[cost.arithmetic])
        for cost in phases
    )


def limit(phases: list[Cost], device: Device) -> str:
    """What bounds the accumulation, the first phase."""
    by_bytes = phases[0].bytes / device.bytes_per_s
    by_flops = phases[0].flops / device.flops_per_s[phases[0].arithmetic]
    return "bytes" if by_bytes >= by_flops else "flops"


def row(route: str, k: int, phases: list[Cost], device: Device) -> dict:
    bound, reference_bound = seconds(phases, device), seconds(reference(), device)
    return {
        "device": device.name,
        "route": route,
        "k": k,
        "bytes": traffic(phases),
        "flops": sum(cost.flops for cost in phases),
        "limit": limit(phases, device),
        "bound_s": bound,
        "traffic_ratio": traffic(reference()) / traffic(phases),
        "time_ratio": reference_bound / bound,
    }


def rows() -> list[dict]:
    found = []
    for device in DEVICES:
        found.append(row("reference", 1, reference(), device))
        for k in GRADIENTS_PER_CALL:
            found += [row(route, k, phases, device) for route, phases in routes(k).items()]
    return found


def check_goal(found: list[dict]) -> None:
    """The claim of the text below the table: these routes reach the goal and no others."""
    reached = {(r["route"], r["k"]) for r in found if r["traffic_ratio"] >= GOAL}
    assert reached == REACH_GOAL, reached


COLUMNS = (
    "device (peaks)", "route", "k", "TB moved", "TFLOP", "limited by", "bound, s",
    "traffic, reference : this", "bound, reference : this",
)  # fmt: skip


def cells(r: dict) -> list[object]:
    return [
        r["device"], r["route"], r["k"], f"{r['bytes'] / 1e12:.3g}", f"{r['flops'] / 1e12:.3g}",
        r["limit"], f"{r['bound_s']:.3g}", f"{r['traffic_ratio']:.1f}", f"{r['time_ratio']:.1f}",
    ]  # fmt: skip


def markdown(document: dict) -> str:
    found = document["outcomes"]
    short = ", ".join(
        f"{r['route']} with k = {r['k']} ({r['traffic_ratio']:.1f})"
        for r in found[1 : len(found) // len(DEVICES)]
        if r["traffic_ratio"] < GOAL
    )
    return "\n".join([
        "# Bounds on GPUs: a calculation, not a measurement",
        "",
        f"`{document['made_by'][0]['command']}`.  **Nothing in this file was run on a GPU.**  "
        "It says what bytes and flops (benchmarks/kernels/costs.py) and the peaks of data sheets "
        "allow, not how near any kernel comes; `python benchmarks/gpu.py` measures that.",
        "",
        f"From {M} float32 gradients of BERT-base's encoder ({WEIGHTS / 1e6:.1f} M weights, "
        f"{BLOCKS} blocks of {BLOCK_SIZE}) to scores of single weights, k gradients a call.  A "
        "bound is the larger of bytes / bandwidth and flops / rate, accumulation and scores "
        'added up; "limited by" is said of the accumulation.',
        "",
        *table(COLUMNS, map(cells, found)),
        "",
        f"The reference moves at least {GOAL} times as many bytes as every route here except "
        f"{short}.  Where flops are the limit, time falls by less than traffic does; most of "
        "all the float64 Gram on a device whose float64 rate is 1/64, for which there is the "
        "float32 Gram or Woodbury.",
        "",
        "Peaks used, arithmetic outside the tensor cores:",
        "",
        *(f"- {device.name}: {device.source}." for device in DEVICES),
        "",
    ])  # fmt: skip


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    check_goal(rows())
    config = {
        "weights": WEIGHTS, "blocks": BLOCKS, "block_size": BLOCK_SIZE, "m": M,
        "devices": [asdict(device) for device in DEVICES],
    }  # fmt: skip
    document = new_document("roofline", config)
    document["outcomes"] = rows()
    print(write(document, markdown, "calculated").read_text())


if __name__ == "__main__":
    main()
