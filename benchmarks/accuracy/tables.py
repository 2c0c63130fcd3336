"""The Markdown of an accuracy result, laid out as its experiment says.

python -m benchmarks.accuracy.tables    # all results again, from their JSON
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from benchmarks.accuracy.experiment import FOLDER, load
from benchmarks.support.report import RESULTS, made_by, table, write

Row = dict[str, Any]
Where = Mapping[str, Any]


def markdown(document: Mapping[str, Any], experiment: Mapping[str, Any] | None = None) -> str:
    """Args:
    experiment: by default the one that is named as the result.
    """
    experiment = load(document["benchmark"]) if experiment is None else experiment
    rows = [{**document["config"], **outcome} for outcome in document["outcomes"]]
    commands = made_by(document)
    made = [f"{commands[0]}."]
    if len(commands) > 1:
        made = ["Made by, each with what the ones before it had not done:", ""]
        made += [f"- {command}" for command in commands]
    lines = [f"# {experiment['title']}", "", *made, ""]
    if "set" in document:
        lines += [f"**Otherwise than it says below: {json.dumps(document['set'])}.**", ""]
    for paragraph in experiment["about"]:
        lines += [paragraph, ""]
    return "\n".join([*lines, *LAYOUTS[experiment["layout"]](rows, experiment)])


# ---- figures -----------------------------------------------------------------------


def cell(values: Iterable[float], scale: int = 100, digits: int = 1) -> str:
    """Mean and standard deviation."""
    values = list(values)
    if not values:
        return ""
    spread = f" ± {scale * statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{scale * statistics.mean(values):.{digits}f}{spread}"


def select(rows: Iterable[Row], where: Where) -> list[Row]:
    return [row for row in rows if all(row.get(name) == value for name, value in where.items())]


def parts(rows: Iterable[Row], *names: str) -> Iterator[tuple[tuple[Any, ...], list[Row]]]:
    """The rows by their values of these fields, in the order they come."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in names), []).append(row)
    yield from found.items()


def best_damping(rows: Iterable[Row], by: str) -> Any:
    """Of the dampings that every seed has, the one with the best mean."""
    found = {damping: some for (damping,), some in parts(rows, "damping")}
    most = max(map(len, found.values()))
    means = {
        damping: statistics.mean(row.get(by) or 0.0 for row in some)
        for damping, some in found.items()
        if len(some) == most
    }
    return max(means, key=means.__getitem__)


def values(
    rows: list[Row], where: Where, of: str = "test_accuracy", by: str = "dev_accuracy"
) -> dict[int, float]:
    """A figure by seed, at the best of several dampings; of a trial that failed, 0."""
    some = select(rows, where)
    if len({row.get("damping") for row in some}) > 1:
        some = select(some, {"damping": best_damping(some, by)})
    return {row["seed"]: row.get(of) or 0.0 for row in some}


def percent(sparsity: float) -> str:
    return f"{sparsity:.0%}"


# ---- ways by sparsity --------------------------------------------------------------


def pivot(rows: list[Row], experiment: Mapping[str, Any]) -> list[str]:
    """For each model, data set and pattern a table of ways by sparsity."""
    more_seeds = experiment.get("more_seeds", ())
    lines: list[str] = []
    for (model, data), some in parts(rows, "model", "data"):
        lines += [f"## {model} on {data.upper()}", ""]
        for (pattern,), here in parts(some, "pattern"):
            usual = [row for row in here if row["seed"] not in more_seeds]
            further = [row for row in here if row["seed"] in more_seeds]
            lines += [heading(pattern, usual, experiment), ""]
            lines += [*ways(usual, experiment), ""]
            if experiment.get("losses"):
                lines += [*losses(usual, experiment), ""]
            if fixed := dampings(usual):
                lines += ["Damping, greedy selection:", "", *fixed, ""]
            if further:
                lines += [*with_more_seeds(usual, further, experiment), ""]
    return lines


def dense(rows: Iterable[Row]) -> str:
    by_seed = {row["seed"]: row["dense"] for row in rows if "dense" in row}
    return f"dense {cell(by_seed.values())}" if by_seed else ""


def heading(pattern: str, rows: list[Row], experiment: Mapping[str, Any]) -> str:
    seeds = len({row["seed"] for row in rows})
    theirs = {row["damping"]: None for row in select(rows, {"selection": "diagonal"})}
    several = len(theirs) > 1 and not experiment.get("mark_best_damping")
    named = f"oBERT's dampings {', '.join(f'{damping:g}' for damping in theirs)}"
    said = [pattern, dense(rows), f"{seeds} seed{'s' if seeds > 1 else ''}"]
    return "; ".join(filter(None, [*said, named if several else ""]))


def ways(rows: list[Row], experiment: Mapping[str, Any]) -> list[str]:
    """A row for each way, of test accuracies."""
    by_sparsity = {sparsity: some for (sparsity,), some in parts(rows, "sparsity")}
    seeds = len({row["seed"] for row in rows})
    titles = []
    for sparsity, some in by_sparsity.items():
        count = len({row["seed"] for row in some})
        titles.append(percent(sparsity) + (f", {count} of the seeds" if count < seeds else ""))
    marked = experiment.get("mark_best_damping")
    body = []
    for label, where in experiment["rows"].items():
        cells = []
        for some in by_sparsity.values():
            shown = cell(values(some, where, experiment.get("shown", "test_accuracy")).values())
            if shown and marked and "damping" in where:
                best = best_damping(select(some, {"selection": marked}), "dev_accuracy")
                shown = f"**{shown}**" if best == where["damping"] else shown
            cells.append(shown)
        if experiment.get("seconds"):
            seconds = [estimate_seconds(row) for row in select(rows, where)]
            cells.insert(0, f"{statistics.median(seconds):.0f}" if seconds else "")
        body.append([label, *cells])
    if "difference" in experiment:
        body.append(difference(by_sparsity.values(), experiment))
    first = [experiment.get("heading", ""), *(["seconds"] if experiment.get("seconds") else [])]
    return table([*first, *titles], body)


def estimate_seconds(row: Row) -> float:
    if "estimate_seconds" in row:
        return row["estimate_seconds"]
    return row["gradients_seconds"] + row["fisher_seconds"]


def losses(
    rows: list[Row], experiment: Mapping[str, Any], labels: Iterable[str] | None = None
) -> list[str]:
    by_sparsity = {sparsity: some for (sparsity,), some in parts(rows, "sparsity")}
    chosen = experiment["rows"] if labels is None else labels
    body = [
        [
            label,
            *(cell(values(some, experiment["rows"][label], "dev_loss").values(), 1, 3)
              for some in by_sparsity.values()),
        ]
        for label in chosen
    ]  # fmt: skip
    return table(["cross entropy of held-back texts", *map(percent, by_sparsity)], body)


def difference(by_sparsity: Iterable[list[Row]], experiment: Mapping[str, Any]) -> list[str]:
    """One way minus another, of each seed."""
    first, second = experiment["difference"]
    cells = []
    for some in by_sparsity:
        left, right = (values(some, experiment["rows"][way]) for way in (first, second))
        gains = [100 * (left[seed] - right[seed]) for seed in left if seed in right]
        cells.append(", ".join(f"{gain:+.1f}" for gain in gains))
    return [f"{first} minus {second.split(',')[0]}, by seed", *cells]


def dampings(rows: list[Row]) -> list[str]:
    """Ours with a damping that takes care of itself, and with fixed ones, where both are there."""
    body = []
    for (sparsity,), some in parts(select(rows, {"selection": "greedy"}), "sparsity"):
        auto = values(some, {"damping": "auto"}).values()
        fixed = [row for row in some if row["damping"] != "auto"]
        if not auto or not fixed:
            continue
        best = best_damping(fixed, "test_accuracy")
        found = values(fixed, {"damping": best}).values()
        gap = 100 * (statistics.mean(auto) - statistics.mean(found))
        body.append([percent(sparsity), cell(auto), cell(found), f"{best:g}", f"{gap:+.1f}"])
    columns = ("sparsity", "auto", "best fixed by hand", "its damping", "auto minus best")
    return table(columns, body) if body else []


def with_more_seeds(
    usual: list[Row], further: list[Row], experiment: Mapping[str, Any]
) -> list[str]:
    """Two ways where more seeds were run: of those, and of all together."""
    sparsities = {row["sparsity"] for row in further}
    together = [*(row for row in usual if row["sparsity"] in sparsities), *further]
    seeds = dict.fromkeys(row["seed"] for row in further)
    only = {**experiment, "rows": {w: experiment["rows"][w] for w in experiment["difference"]}}
    lines = [
        f"Seeds {', '.join(map(str, seeds))} of the texts, {experiment['about_more_seeds']} "
        f"({dense(further)}):", "", *ways(further, only), "", *losses(further, only), "",
        f"All {len({row['seed'] for row in together})} together:", "", *ways(together, only), "",
        *losses(together, only),
    ]  # fmt: skip
    return lines


# ---- sub-steps ---------------------------------------------------------------------


def steps(rows: list[Row], experiment: Mapping[str, Any]) -> list[str]:
    """A row for each way to divide the work, with accuracies and dampings by seed."""
    body = []
    same = ("texts_per_grad", "texts", "estimator", "steps", "schedule", "sparsity")
    for (g, texts, estimator, count, schedule, sparsity), some in parts(rows, *same):
        found = values(some, {}).values()
        body.append([
            g, estimator, f"{count} {schedule}" if count > 1 else count, texts // g,
            count * texts, percent(sparsity), cell(found),
            ", ".join(f"{100 * value:.1f}" for value in found),
            ", ".join(f"{value:.0e}" for value in some[0]["dampings"]),
        ])  # fmt: skip
    columns = (
        "texts per gradient", "Fisher", "sub-steps", "gradients in each", "texts in all",
        "sparsity", "accuracy", "by seed", "dampings",
    )  # fmt: skip
    return [f"{dense(rows).capitalize()}.", "", *table(columns, body), ""]


# ---- whole runs --------------------------------------------------------------------

RUN_NAMES = {
    "magnitude": "magnitude", "wanda": "Wanda's score", "diagonal": "oBERT on our kernels",
    "greedy": "ours", "reference": "reference", "sparsegpt": "SparseGPT",
}  # fmt: skip


def whole_runs(rows: list[Row], experiment: Mapping[str, Any]) -> list[str]:
    """Every run, and over the seeds from the least to the largest."""
    lines: list[str] = []
    for (model, data), some in parts(rows, "model", "data"):
        references = {
            row["seed"]: row["seconds"] for row in select(some, {"selection": "reference"})
        }
        for row in some:
            row["fitted"] = row.get("reconstruction", "none") != "none"
            if row["selection"] == "magnitude" and not row["fitted"]:
                row["texts"] = 0
            if row["seed"] in references and row["pattern"] == "unstructured":
                row["ratio"] = references[row["seed"]] / row["seconds"]
        lines += [f"## {model} on {data.upper()}", ""]
        if len({row["seed"] for row in some}) > 1:
            lines += [*spans(some), ""]
        stages = list(STAGES)
        if any(row["fitted"] for row in some):
            stages.insert(-1, "reconstruction_seconds")
        columns = [*RUN_COLUMNS, *(STAGE_NAMES[stage] for stage in stages), *LAST_COLUMNS]
        lines += [*table(columns, (run_cells(row, stages) for row in some)), ""]
    return lines


RUN_COLUMNS = ("method", "seed", "pattern", "sparsity", "texts", "accuracy")
LAST_COLUMNS = ("peak GiB", "reference : it")
STAGES = ("gradients_seconds", "fisher_seconds", "damping_seconds", "selection_seconds", "seconds")
STAGE_NAMES = {
    "gradients_seconds": "gradients s", "fisher_seconds": "Fisher s",
    "damping_seconds": "damping s", "selection_seconds": "selection s",
    "reconstruction_seconds": "fit s", "seconds": "whole s",
}  # fmt: skip
FITTED = " + fit"


def run_cells(row: Row, stages: Iterable[str]) -> list[object]:
    return [
        row["selection"] + FITTED * row["fitted"], row["seed"], row["pattern"],
        percent(row["sparsity"]), row["texts"],
        f"{row['test_accuracy']:.1%}", *(f"{row.get(stage, 0.0):.1f}" for stage in stages),
        f"{row['peak_gib']:.1f}", f"{row['ratio']:.1f}" if "ratio" in row else "",
    ]  # fmt: skip


def spans(rows: list[Row]) -> list[str]:
    """What all seeds have, from the least to the largest; of the memory the largest."""
    body = []
    for (selection, fitted, texts, pattern, sparsity), some in parts(
        rows, "selection", "fitted", "texts", "pattern", "sparsity"
    ):
        if len({row["seed"] for row in some}) < 2:
            continue
        body.append([
            RUN_NAMES[selection] + FITTED * fitted, pattern, percent(sparsity), texts,
            span(some, "seconds", lambda value: f"{value:.{0 if value > 1 else 1}f}"),
            span(some, "ratio", lambda value: f"{value:.1f}x"),
            span(some, "test_accuracy", lambda value: f"{100 * value:.1f}"),
            f"{max(row['peak_gib'] for row in some):.1f}",
        ])  # fmt: skip
    columns = ("all seeds", "pattern", "sparsity", "texts", "seconds", "ratio", "accuracy",
               "peak GiB")  # fmt: skip
    return table(columns, body)


def span(rows: Iterable[Row], name: str, shown: Callable[[float], str]) -> str:
    found = [row[name] for row in rows if name in row]
    if not found:
        return ""
    ends = dict.fromkeys(shown(end) for end in (min(found), max(found)))
    return " to ".join(ends)


LAYOUTS = {"pivot": pivot, "steps": steps, "whole_runs": whole_runs}


def main() -> None:
    for experiment in sorted(FOLDER.glob("*.json")):
        for path in sorted((RESULTS / experiment.stem).glob("*.json")):
            print(write(json.loads(path.read_text(encoding="utf-8")), markdown, path.stem))


if __name__ == "__main__":
    main()
