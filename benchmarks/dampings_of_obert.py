"""Is the grid of dampings that oBERT has in evidence.py wide enough?  MiniLM on MR, unstructured.

    python benchmarks/dampings_of_obert.py            # three quarters of an hour on two cores
    python benchmarks/dampings_of_obert.py --report   # only the table, of what is there

Seven dampings a decade apart in place of four, at every sparsity, on models that are fine-tuned
where it runs; ours, with the damping it chooses, beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from dense_models import MAX_LENGTH, MINILM, Stages, fine_tuned
from evidence import RESULTS, SEEDS, SPARSITIES, grid
from evidence_tables import Runs, best_damping, cell, header, results, row
from machine import machine

from obert_kernels.downloads import cache_folder
from obert_kernels.experiment import Settings
from obert_kernels.sweep import sweep_classifier
from obert_kernels.text_data import load_demo_set
from obert_kernels.trial_table import CSV_FILE, TrialTable

DAMPINGS = (1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6, 1e-5)
OF = {"labels": grid("unstructured", ["diagonal"], DAMPINGS),
      "predictions": grid("unstructured", ["greedy"], ["auto"])}  # fmt: skip
TARGETS = SPARSITIES["unstructured"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, choices=SEEDS, default=SEEDS)
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmark_accuracy")
    parser.add_argument("--report", action="store_true", help="prune nothing")
    return parser.parse_args()


def folder(work: Path, seed: int, gradients_of: str) -> Path:
    return work / "dampings" / f"seed{seed}-{gradients_of}"


def measure(seed: int, work: Path) -> None:
    progress = Stages(f"seed {seed}:")
    model = fine_tuned(MINILM, "mr", seed, load_demo_set("mr"), work, progress)
    for gradients_of, settings in OF.items():
        shared = Settings(
            model=str(model),
            data="demo:mr",
            sparsity=TARGETS,
            output=folder(work, seed, gradients_of),
            gradients_of=gradients_of,
            max_length=MAX_LENGTH["mr"],
            seed=seed,
        )
        sweep_classifier(shared, settings, progress=progress)


def table(runs: Runs) -> list[str]:
    lines = header(["", *(f"{target:.0%}" for target in TARGETS)])
    best = {t: best_damping(runs, "diagonal", t, "dev_accuracy") for t in TARGETS}
    for damping in DAMPINGS:
        cells = [cell(results(runs, "diagonal", target, damping)) for target in TARGETS]
        shown = [
            f"**{c}**" if best[t] == damping else c for c, t in zip(cells, TARGETS, strict=True)
        ]
        lines.append(row([f"oBERT, {damping:g}", *shown]))
    ours = [cell(results(runs, "greedy", target, "auto")) for target in TARGETS]
    return [*lines, row(["ours, its own damping", *ours])]


def main() -> None:
    settings = parse_arguments()
    command = shlex.join(["python", "benchmarks/dampings_of_obert.py", *sys.argv[1:]])
    for seed in [] if settings.report else settings.seeds:
        measure(seed, settings.work)
    files = [[folder(settings.work, s, of) / CSV_FILE for of in OF] for s in settings.seeds]
    if not all(path.is_file() for paths in files for path in paths):
        return
    runs = [[o for path in paths for o in TrialTable(path).outcomes] for paths in files]
    host = machine()
    text = "\n".join([
        "# Dampings of oBERT", "",
        f"`{command}` on {host['cpu']}, {host['threads']} threads, torch {host['torch']}, "
        f"{host['date']}.  all-MiniLM-L6-v2 on MR, unstructured, 4096 texts in 256 gradients of "
        "16, test accuracy, mean ± standard deviation over "
        f"{len(runs)} seeds; in bold the damping that held-back texts choose.", "",
        *table(runs), "",
    ])  # fmt: skip
    document = {"command": command, **host, "outcomes": [[asdict(o) for o in r] for r in runs]}
    (RESULTS / "dampings_of_obert.md").write_text(text, encoding="utf-8")
    (RESULTS / "dampings_of_obert.json").write_text(json.dumps(document, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
