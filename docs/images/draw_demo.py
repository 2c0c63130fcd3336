"""Draw demo.png from the table that the demo printed: python docs/images/draw_demo.py."""

import re
from pathlib import Path

from obert_kernels.commands.plots import plot_accuracy

HERE = Path(__file__).parent
RESULT = HERE.parents[1] / "benchmarks" / "results" / "demo" / "epyc.md"


def curves(text: str) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Accuracy by sparsity of both methods, and of the dense model, all as fractions."""
    percent = r" *([\d.]+)% "
    rows = [
        tuple(float(value) / 100 for value in row)
        for row in re.findall(f"^{percent}{percent}{percent}", text, re.MULTILINE)
    ]
    points = {"obert_kernels": [(x, ours) for x, _, ours in rows]}
    points["magnitude"] = [(x, magnitude) for x, magnitude, _ in rows]
    return points, float(re.findall(r"dense accuracy ([\d.]+)%", text)[0]) / 100


def main(path: Path = HERE / "demo.png") -> None:
    """Write the picture."""
    plot_accuracy(*curves(RESULT.read_text()), path, "all-MiniLM-L6-v2 on TREC questions, pruned")


if __name__ == "__main__":
    main()
