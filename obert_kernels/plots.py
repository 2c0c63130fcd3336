"""The figure of a pruning run: accuracy against sparsity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from .downloads import import_extra

# The palette of Okabe and Ito: distinct for every kind of colour vision and in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")


def plot_accuracy(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    dense: float,
    path: str | Path,
    title: str = "",
) -> None:
    """Write a PNG of accuracy against sparsity, with the dense model as a dashed line.

    Args:
        curves: name of the method -> points (sparsity, accuracy), both as fractions; at most
            four methods.  The first is drawn last, on top.
        dense: accuracy of the model before pruning, as a fraction.
        path: the file to write.
        title: a line above the figure.

    Raises:
        ValueError: more methods than there are distinguishable styles.
        ImportError: matplotlib is not installed.
    """
    if len(curves) > len(_COLOURS):
        raise ValueError(f"plot_accuracy draws at most {len(_COLOURS)} methods, got {len(curves)}")
    figure_module = import_extra("matplotlib.figure")
    backend = import_extra("matplotlib.backends.backend_agg")
    figure = figure_module.Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    backend.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.axhline(
        100 * dense, color="0.35", linestyle="--", linewidth=1.5, label=f"dense {100 * dense:.1f}"
    )
    for index, (method, points) in reversed(list(enumerate(curves.items()))):
        ordered = sorted(points)
        axes.plot(
            [100 * sparsity for sparsity, _ in ordered],
            [100 * accuracy for _, accuracy in ordered],
            color=_COLOURS[index],
            marker=_MARKERS[index],
            markersize=7,
            linewidth=2,
            label=method,
        )
        for sparsity, accuracy in ordered:
            axes.annotate(
                f"{100 * accuracy:.1f}",
                (100 * sparsity, 100 * accuracy),
                xytext=(0, 8 if index == 0 else -16),
                textcoords="offset points",
                ha="center",
                fontsize=9,
                color=_COLOURS[index],
            )
    sparsities = sorted({100 * point[0] for points in curves.values() for point in points})
    axes.set_xticks(sparsities)
    axes.set_xlabel("sparsity of the pruned layers (%)")
    axes.set_ylabel("test accuracy (%)")
    axes.margins(x=0.06, y=0.12)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(Path(path), format="png")
