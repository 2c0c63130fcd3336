"""The tables of evidence.py, of outcomes by seed."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

from obert_kernels.trials.outcome import Outcome

# Where the damping chosen by itself is held against fixed ones.
DAMPING_SPARSITIES = [0.6, 0.7, 0.8, 0.9]
NAMES = {
    "magnitude": "magnitude",
    "wanda": "Wanda's score",
    "diagonal": "oBERT, best damping",
    "greedy": "ours",
}

Runs = list[list[Outcome]]  # by seed


def results(
    runs: Runs,
    selection: str,
    target: float,
    damping: float | str | None,
    of: str = "test_accuracy",
) -> list[float]:
    """A result of each seed that has it."""
    return [
        getattr(outcome, of) or 0.0
        for run in runs
        for outcome in run
        if outcome.setting.selection == selection
        and outcome.target == target
        and (damping is None or outcome.setting.damping == damping)
    ]


def best_damping(runs: Runs, selection: str, target: float, by: str) -> float:
    """The fixed damping, of those that every seed has, with the best mean accuracy."""
    by_damping: dict[float, list[float]] = {}
    for run in runs:
        for outcome in run:
            setting = outcome.setting
            same = (setting.selection, outcome.target) == (selection, target)
            if same and not isinstance(setting.damping, str):
                by_damping.setdefault(setting.damping, []).append(getattr(outcome, by) or 0.0)
    everywhere = [damping for damping, values in by_damping.items() if len(values) == len(runs)]
    return max(everywhere, key=lambda damping: statistics.mean(by_damping[damping]))


def cell(values: list[float], scale: int = 100, digits: int = 1) -> str:
    if not values:
        return ""
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread}"


def row(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(x) for x in cells) + " |"


def header(cells: Sequence[str]) -> list[str]:
    return [row(cells), "|" + "---|" * len(cells)]


def shown(runs: Runs, selection: str, target: float, of: str = "test_accuracy") -> list[float]:
    """A result of each seed, at the damping of the table."""
    damping: float | str | None = None
    if selection == "diagonal":
        damping = best_damping(runs, selection, target, "dev_accuracy")
    elif selection == "greedy":
        damping = "auto"
    return results(runs, selection, target, damping, of)


def methods(
    runs: Runs,
    targets: list[float],
    of: str,
    scale: int = 100,
    digits: int = 1,
    which: Iterable[str] = NAMES,
) -> list[str]:
    """A row for each."""
    return [
        row([NAMES[key], *(cell(shown(runs, key, t, of), scale, digits) for t in targets)])
        for key in which
    ]


def differences(runs: Runs, targets: list[float]) -> list[str]:
    """Ours minus oBERT's, of each seed."""
    gains = []
    for target in targets:
        pairs = zip(shown(runs, "greedy", target), shown(runs, "diagonal", target), strict=True)
        gains.append(", ".join(f"{100 * (ours - theirs):+.1f}" for ours, theirs in pairs))
    return gains


def accuracy_table(runs: Runs, targets: list[float]) -> list[str]:
    return [
        *header(["", *(f"{target:.0%}" for target in targets)]),
        *methods(runs, targets, "test_accuracy"),
        row(["ours minus oBERT, by seed", *differences(runs, targets)]),
    ]


def loss_table(runs: Runs, targets: list[float]) -> list[str]:
    return [
        *header(["cross entropy of held-back texts", *(f"{target:.0%}" for target in targets)]),
        *methods(runs, targets, "dev_loss", 1, 3),
    ]


def more_seeds_lines(
    runs: Runs, more: dict[int, list[Outcome]], dense: Sequence[float], targets: list[float]
) -> list[str]:
    """Ours and oBERT where more seeds were run: of those, and of all together."""
    lines = [
        f"Seeds {', '.join(map(str, more))} of the texts, settled before they were run, on the "
        f"model that the same recipe gave on the machine at hand then (dense {cell(dense)}); and "
        f"all {len(runs) + len(more)} together:",
        "",
        *header(["", *(f"{target:.0%}" for target in targets)]),
    ]
    for which, these in (("these", [*more.values()]), ("all", [*runs, *more.values()])):
        for of, scale, digits, what in (
            ("test_accuracy", 100, 1, which),
            ("dev_loss", 1, 3, f"{which}, cross entropy of held-back texts"),
        ):
            table = methods(these, targets, of, scale, digits, ("diagonal", "greedy"))
            lines += [line.replace(" |", f" ({what}) |", 1) for line in table]
        lines.append(row([f"ours minus oBERT, by seed ({which})", *differences(these, targets)]))
    return [*lines, ""]


def damping_table(runs: Runs) -> list[str]:
    """Ours with a damping that takes care of itself, and with fixed ones."""
    lines = header(["sparsity", "auto", "best fixed by hand", "its damping", "auto minus best"])
    for target in DAMPING_SPARSITIES:
        auto = results(runs, "greedy", target, "auto")
        best = best_damping(runs, "greedy", target, "test_accuracy")
        fixed = results(runs, "greedy", target, best)
        gap = 100 * (statistics.mean(auto) - statistics.mean(fixed))
        lines.append(row([f"{target:.0%}", cell(auto), cell(fixed), f"{best:g}", f"{gap:+.1f}"]))
    return lines
