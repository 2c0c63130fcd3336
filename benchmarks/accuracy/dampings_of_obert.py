"""Is the grid of dampings that oBERT has in evidence.py wide enough?  On MR, unstructured.

    python benchmarks/dampings_of_obert.py            # three quarters of an hour on two cores
    python benchmarks/dampings_of_obert.py --case mpnet-mr --seeds 0 --sparsity 0.6 0.8
    python benchmarks/dampings_of_obert.py --case mpnet-mr --seeds 1 2 --sparsity 0.6
    python benchmarks/dampings_of_obert.py --report   # only the table, of what is there

Seven dampings a decade apart in place of four, on models that are fine-tuned where it runs; ours,
with the damping it chooses, beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.accuracy.dense_models import MAX_LENGTH, Stages, fine_tuned
from benchmarks.accuracy.evidence import CASES, RESULTS, SEEDS, SPARSITIES, grid
from benchmarks.accuracy.evidence_tables import Runs, best_damping, cell, header, results, row
from benchmarks.support.machine import machine
from obert_kernels.commands.config import Settings
from obert_kernels.commands.sweep import sweep_classifier
from obert_kernels.tasks.demo_sets import load_demo_set
from obert_kernels.tasks.downloads import cache_folder
from obert_kernels.trials.table import CSV_FILE, TrialTable

DAMPINGS = (1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5)
OF = {"labels": grid("unstructured", ["diagonal"], DAMPINGS),
      "predictions": grid("unstructured", ["greedy"], ["auto"])}  # fmt: skip
TARGETS = SPARSITIES["unstructured"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=["minilm-mr", "mpnet-mr"], default="minilm-mr")
    parser.add_argument("--sparsity", nargs="+", type=float, choices=TARGETS, default=TARGETS)
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmark_accuracy")
    parser.add_argument("--report", action="store_true", help="prune nothing")
    return parser.parse_args()


def folder(settings: argparse.Namespace, seed: int, gradients_of: str) -> Path:
    return settings.work / "dampings" / f"{settings.case}-seed{seed}-{gradients_of}"


def measure(settings: argparse.Namespace, seed: int) -> None:
    case, progress = CASES[settings.case], Stages(f"seed {seed}:")
    model = fine_tuned(
        case.dense, "mr", seed % case.fine_tunings, load_demo_set("mr"), settings.work, progress
    )
    for gradients_of, tried in OF.items():
        shared = Settings(
            model=str(model),
            data="demo:mr",
            sparsity=settings.sparsity,
            output=folder(settings, seed, gradients_of),
            fisher_dtype=case.fisher_dtype,
            gradients_of=gradients_of,
            max_length=MAX_LENGTH["mr"],
            seed=seed,
        )
        sweep_classifier(shared, tried, progress=progress)


def column(runs: Runs, target: float) -> list[str]:
    """What the seeds have at a sparsity that were pruned to it."""
    some = [run for run in runs if any(outcome.target == target for outcome in run)]
    best = best_damping(some, "diagonal", target, "dev_accuracy")
    cells = [cell(results(some, "diagonal", target, damping)) for damping in DAMPINGS]
    at = DAMPINGS.index(best)
    cells[at] = f"**{cells[at]}**"
    fewer = "" if len(some) == len(runs) else f", {len(some)} of the seeds"
    return [f"{target:.0%}{fewer}", *cells, cell(results(some, "greedy", target, "auto"))]


def table(runs: Runs, targets: list[float]) -> list[str]:
    names = ["", *(f"oBERT, {damping:g}" for damping in DAMPINGS), "ours, its own damping"]
    first, *rest = zip(names, *(column(runs, target) for target in targets), strict=True)
    return [*header(first), *(row(cells) for cells in rest)]


def main() -> None:
    settings = parse_arguments()
    command = shlex.join(["python", "benchmarks/dampings_of_obert.py", *sys.argv[1:]])
    for seed in [] if settings.report else settings.seeds:
        measure(settings, seed)
    case = CASES[settings.case]
    files = [[folder(settings, s, of) / CSV_FILE for of in OF] for s in settings.seeds]
    if not all(path.is_file() for paths in files for path in paths):
        return
    runs = [[o for path in paths for o in TrialTable(path).outcomes] for paths in files]
    host = machine()
    del host["threads"]  # of this process, which may have done no more than write the table
    text = "\n".join([
        "# Dampings of oBERT", "",
        f"`{command}` on {host['cpu']}, torch {host['torch']}, {host['date']}.  "
        f"{case.name}, unstructured, 4096 texts in 256 gradients of 16, Fisher in "
        f"{case.fisher_dtype}, test accuracy, mean ± standard deviation over seeds "
        f"{settings.seeds}; in bold the damping that held-back texts choose.", "",
        *table(runs, settings.sparsity), "",
    ])  # fmt: skip
    document = {"command": command, **host, "outcomes": [[asdict(o) for o in r] for r in runs]}
    name = f"dampings_of_obert_{settings.case}"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
