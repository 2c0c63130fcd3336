"""The figures of a pruning run and of a sweep: accuracy against sparsity, and damping."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_whole
from ..trials.outcome import GridPoint, Outcome, label

# The palette of Okabe and Ito: distinct for every kind of colour vision and in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def plot_accuracy(
    curves: Mapping[str, Sequence[tuple[float, float]]],
    dense: float,
    path: str | Path,
    title: str = "",
) -> None:
    """Write a PNG of accuracy against sparsity, with the dense model as a dashed line.

    Args:
        curves: name of the method -> points (sparsity, accuracy), both as fractions; at most
            six methods.  The first is drawn last, on top.
        dense: accuracy of the model before pruning, as a fraction.
        path: the file to write.
        title: a line above the figure.

    Raises:
        ValueError: more methods than there are distinguishable styles.
        ImportError: matplotlib is not installed.
    """
    if len(curves) > len(_COLOURS):
        raise ValueError(f"plot_accuracy draws at most {len(_COLOURS)} methods, got {len(curves)}")
    figure, (axes,) = _open_figure(1)
    _dense_line(axes, dense)
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
    _finish_sparsities(axes, [point[0] for points in curves.values() for point in points])
    axes.set_ylabel("test accuracy (%)")
    axes.margins(x=0.06, y=0.12)
    axes.set_title(title, fontsize=11)
    axes.legend(frameon=False, loc="lower left")
    _write(figure, path)


def _write(figure: Any, path: str | Path) -> None:
    """Write a PNG whole or not at all; a dollar in a name is one, and begins no formula."""
    named = list(figure.texts)
    for axes in figure.axes:
        legend = axes.get_legend()
        named += [axes.title, *(legend.get_texts() if legend else ())]
    for text in named:  # but not the labels of a logarithmic axis, which are formulas
        text.set_parse_math(False)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_whole(path, content.getvalue())


def _open_figure(panels: int) -> tuple[Any, list[Any]]:
    """A figure without a window, and its axes side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * panels, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
    for one in axes:
        one.grid(axis="y", color="0.9")
        one.set_axisbelow(True)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _dense_line(axes: Any, dense: float) -> None:
    axes.axhline(
        100 * dense, color="0.35", linestyle="--", linewidth=1.5, label=f"dense {100 * dense:.1f}"
    )


def _finish_sparsities(axes: Any, sparsities: Iterable[float]) -> None:
    axes.set_xticks(sorted({100 * sparsity for sparsity in sparsities}))
    axes.set_xlabel("sparsity of the pruned layers (%)")


# More settings than this, and only the best of each kind get a name and a strong line.
_MOST_NAMED = 6
_LINES = ("-", "--", ":", "-.")

Curve = list[tuple[float, float]]


def plot_sweep(
    outcomes: Iterable[Outcome], dense: float, path: str | Path, title: str = ""
) -> None:
    """Write a PNG of held-back accuracy against sparsity, a line for each setting.

    Of many settings the best of each selection and update has a strong line, the rest faint
    ones in the same colour.  Where settings differ in their damping, a second panel has accuracy
    against damping, for the best of each selection and update.

    Args:
        outcomes: of the trials; those that failed are left out.
        dense: held-back accuracy of the model before pruning, as a fraction.
        path: the file to write.
        title: a line above the figure.

    Raises:
        ImportError: matplotlib is not installed.
    """
    outcomes = [outcome for outcome in outcomes if outcome.dev_accuracy is not None]
    by_damping = _by_damping(outcomes)
    figure, axes = _open_figure(2 if by_damping else 1)
    figure.suptitle(title, fontsize=11)
    _draw_sparsities(axes[0], outcomes, dense)
    if by_damping:
        _draw_dampings(axes[1], by_damping)
    _write(figure, path)


def _draw_sparsities(axes: Any, outcomes: Sequence[Outcome], dense: float) -> None:
    curves: dict[GridPoint, Curve] = {}
    for outcome in outcomes:
        curves.setdefault(outcome.point, []).append(_percent(outcome.target, outcome))
    settings = list(curves)
    kinds = list(dict.fromkeys(map(_kind, settings)))
    named = settings if len(settings) <= _MOST_NAMED else [_best(curves, kind) for kind in kinds]
    _dense_line(axes, dense)
    for setting, points in curves.items():
        strong = setting in named
        index = named.index(setting) if len(named) == len(settings) else kinds.index(_kind(setting))
        axes.plot(
            *zip(*sorted(points), strict=True),
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=6 if strong else 2.5,
            linewidth=2 if strong else 0.8,
            alpha=0.9 if strong else 0.35,
            zorder=3 if strong else 2,
            label=label(setting, settings) if strong else None,
        )
    if len(named) < len(settings):
        rest = f"{len(settings) - len(named)} other settings"
        axes.plot([], [], color="0.5", linewidth=0.8, alpha=0.6, label=rest)
    _finish_sparsities(axes, [outcome.target for outcome in outcomes])
    axes.set_ylabel("accuracy on held-back texts (%)")
    axes.margins(x=0.06, y=0.08)
    axes.legend(frameon=False, fontsize=8)


def _kind(setting: GridPoint) -> tuple[str, str]:
    return setting.selection, setting.update


def _best(curves: Mapping[GridPoint, Curve], kind: tuple[str, str]) -> GridPoint:
    """The setting of a kind with the most points, and of these the highest on average."""

    def merit(setting: GridPoint) -> tuple[int, float]:
        points = curves[setting]
        return len(points), sum(accuracy for _, accuracy in points) / len(points)

    return max((setting for setting in curves if _kind(setting) == kind), key=merit)


def _percent(x: float, outcome: Outcome) -> tuple[float, float]:
    """A sparsity and an accuracy, in per cent."""
    return 100 * x, 100 * (outcome.dev_accuracy or 0.0)


def _by_damping(outcomes: Sequence[Outcome]) -> dict[GridPoint, list[Outcome]]:
    """The outcomes of settings that differ in their damping alone: the best such of each kind."""
    families: dict[GridPoint, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.config.uses_fisher:
            families.setdefault(outcome.point._replace(damping=None), []).append(outcome)
    families = {
        family: members
        for family, members in families.items()
        if len({member.point.damping for member in members}) > 1
    }
    curves = {
        family: [_percent(member.target, member) for member in members]
        for family, members in families.items()
    }
    kinds = dict.fromkeys(map(_kind, families))
    return {best: families[best] for best in (_best(curves, kind) for kind in kinds)}


def _draw_dampings(axes: Any, families: Mapping[GridPoint, list[Outcome]]) -> None:
    """Colour tells the sparsity, line and marker the setting; large ones were chosen by "auto"."""
    from matplotlib import colormaps

    everything = [outcome for members in families.values() for outcome in members]
    targets = sorted({outcome.target for outcome in everything})
    colours = colormaps["viridis"]
    chosen_style = {"linestyle": "", "markersize": 11, "markeredgecolor": "black"}
    for place, (family, members) in enumerate(families.items()):
        look: dict[str, Any] = {
            "linestyle": _LINES[place % len(_LINES)],
            "marker": _MARKERS[place % len(_MARKERS)],
        }
        for index, target in enumerate(targets):
            look["color"] = colours(0.85 * index / max(1, len(targets) - 1))
            here = [member for member in members if member.target == target]
            fixed = sorted(_at_damping(m) for m in here if m.point.damping != "auto")
            chosen = [_at_damping(m) for m in here if m.point.damping == "auto"]
            name: str | None = f"{100 * target:g} % {label(family, list(families))}"
            if fixed:
                axes.plot(*zip(*fixed, strict=True), **look, markersize=4, label=name)
            if chosen:
                name = None if fixed else name
                axes.plot(*zip(*chosen, strict=True), **{**look, **chosen_style}, label=name)
    if any(outcome.point.damping == "auto" for outcome in everything):
        axes.plot([], [], marker="o", color="0.7", **chosen_style, label="chosen automatically")
    axes.set_xscale("log")
    axes.set_xlabel("damping")
    axes.margins(x=0.06, y=0.08)
    axes.legend(frameon=False, fontsize=8)


def _at_damping(outcome: Outcome) -> tuple[float, float]:
    return outcome.damping_used or 0.0, _percent(0, outcome)[1]
