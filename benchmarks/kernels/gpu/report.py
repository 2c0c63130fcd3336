"""What the benchmark writes: JSON, Markdown and a plot, again after every row."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path

from benchmarks.kernels.gpu import whole_runs
from benchmarks.kernels.gpu.rows import Row
from obert_kernels.files import write_whole

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


def whole_prunings(document: Row) -> str:
    """The table of whole prunings, or nothing."""
    if not document["whole_runs"]:
        return ""
    rows = "\n".join(map(whole_runs.table_row, document["whole_runs"]))
    agreed = min(row["agreement"] or 0.0 for row in document["whole_runs"])
    same = f"  At least {agreed:.2%} of the weights are pruned or kept alike." if agreed else ""
    return (
        "## Whole prunings\n\nGradients included, models with random weights, from a device at "
        "rest to a device at rest; medians of alternated rounds.  The reference makes one backward "
        "pass, einsum and baddbmm for each gradient; ours with its rules does the same work, ours "
        f"by default more.{same}\n\n{whole_runs.HEADER}\n{rows}\n\n## Operators\n\n"
    )


def left_out(document: Row) -> list[str]:
    """Sentences on what is missing, and why."""
    found = [f"Not on this device: {what}." for what in document["refused"]]
    if not document["finished"]:
        found.append("The run was stopped before its end.")
    if missing := document["left_out"]:
        some = "; ".join(missing[:5]) + ("; .." if len(missing) > 5 else "")
        within = f" in {document['minutes']:g} minutes" if document["minutes"] else ""
        found.append(f"Left out{within}: {len(missing)} ({some}).")
    return found


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


def write(document: Row, folder: Path, plot: bool = False) -> list[Path]:
    """JSON, Markdown and, where it is wanted and matplotlib is installed, a plot.

    Returns:
        What was written.  A file is replaced as a whole, so a run can be stopped at any time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / slug(document["name"])
    rows = "\n".join(table_row(row) for row in document["rows"])
    notes = "".join(f"\n{sentence}\n" for sentence in left_out(document))
    texts = {
        base.with_suffix(".json"): json.dumps(document, indent=1) + "\n",
        base.with_suffix(".md"): (
            f"{summary(document)}{whole_prunings(document)}{HEADER}\n{rows}\n{notes}"
        ),
    }
    for path, text in texts.items():
        write_whole(path, text.encode())
    if not plot or not document["rows"] or find_spec("matplotlib") is None:
        return list(texts)
    picture = base.with_suffix(".png")
    draw(document["rows"], document["name"], picture)
    return [*texts, picture]
