"""What one shot costs in accuracy: magnitude, Wanda, oBERT and ours on the same texts.

    python benchmarks/evidence.py          # some hours on two cores
    python benchmarks/evidence.py --report # only the tables, of what is there

Models are fine-tuned, then pruned by ``obert_kernels.sweep`` (what ``obert-prune sweep`` runs), a
folder for each case, seed and pattern in ``--work``; an interrupted run goes on where it stopped.
The tables keep what an earlier run left in results/evidence.json and this one did not do.
A seed is one of fine-tuning and of the texts for MiniLM; MPNet is fine-tuned once, and a seed is
one of the texts.  Where three seeds do not tell ours from oBERT's, more of them are run for that
cell; which and how many is settled before the first is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from dense_models import MAX_LENGTH, MINILM, MPNET, Dense, Stages, fine_tuned
from evidence_tables import (
    DAMPING_SPARSITIES,
    accuracy_table,
    cell,
    damping_table,
    loss_table,
    more_seeds_lines,
)  # fmt: skip
from machine import machine

from obert_kernels import load_plugin
from obert_kernels.downloads import cache_folder
from obert_kernels.experiment import Settings
from obert_kernels.sweep import sweep_classifier
from obert_kernels.text_data import load_demo_set
from obert_kernels.trial_table import BASIS_FILE, CSV_FILE, TrialTable
from obert_kernels.trials import Outcome, Setting, make_grid

RESULTS = Path(__file__).parent / "results"
REPORT = RESULTS / "evidence.json"
WANDA = Path(__file__).parent / "wanda.py"
SEEDS = [0, 1, 2]
TEXTS, TEXTS_PER_GRAD = 4096, 16
SPARSITIES = {
    "unstructured": [0.5, 0.6, 0.7, 0.8, 0.9],
    "block4": [0.5, 0.6, 0.7, 0.8],
    "2:4": [0.5],
}
# Of seeds beside those: oBERT and ours, unstructured.
MORE, MORE_SPARSITIES = "more seeds", [0.5]


@dataclass(frozen=True)
class Case:
    """A model and a task.

    Attributes:
        dampings: fixed ones, for oBERT and to compare with.
        more_dampings: of oBERT, by pattern, where the best of those is the last.
        more_seeds: for MORE_SPARSITIES.
        fisher_dtype: of the Gram.
        fine_tunings: seeds of fine-tuning; a seed of texts takes one of them.
    """

    dense: Dense
    dataset: str
    dampings: tuple[float, ...]
    fisher_dtype: str = "float64"
    fine_tunings: int = 3
    more_dampings: dict[str, tuple[float, ...]] = field(default_factory=dict)
    more_seeds: tuple[int, ...] = ()

    def dampings_of_obert(self, pattern: str) -> tuple[float, ...]:
        return (*self.dampings, *self.more_dampings.get(pattern, ()))

    @property
    def name(self) -> str:
        return f"{self.dense.name} on {self.dataset.upper()}"

    def folder(self, work: Path, seed: int, pattern: str, gradients_of: str) -> Path:
        pattern = pattern.replace(":", "of")
        key = f"{self.dense.name}-{self.dataset}-seed{seed}-{pattern}-{gradients_of}"
        return work / "evidence" / key


CASES = {
    "minilm-mr": Case(MINILM, "mr", (1e-9, 1e-8, 1e-7, 1e-6)),
    "minilm-trec": Case(MINILM, "trec", (1e-9, 1e-8, 1e-7, 1e-6)),
    "mpnet-mr": Case(
        MPNET,
        "mr",
        (1e-10, 1e-9, 1e-8, 1e-7),
        "float32",
        fine_tunings=1,
        more_dampings={"block4": (1e-6, 1e-5)},
        more_seeds=(3, 4, 5),
    ),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--seeds", nargs="+", type=int)
    parser.add_argument("--patterns", nargs="+", default=list(SPARSITIES), choices=SPARSITIES)
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmark_accuracy")
    parser.add_argument("--report", action="store_true", help="prune nothing")
    return parser.parse_args()


def grid(pattern: str, selection: Iterable[str], damping: Iterable) -> list[Setting]:
    return make_grid(
        texts=[TEXTS], texts_per_grad=[TEXTS_PER_GRAD], selection=selection, damping=damping,
        pattern=pattern,
    )  # fmt: skip


def measure(case: Case, seed: int, pattern: str, work: Path) -> None:
    """Do the trials that are not there yet."""
    if seed not in SEEDS and (pattern != "unstructured" or seed not in case.more_seeds):
        return
    data = load_demo_set(case.dataset)
    progress = Stages(f"{case.name}, {pattern}, seed {seed}:")
    model = fine_tuned(
        case.dense, case.dataset, seed % case.fine_tunings, data, work, progress
    )  # fmt: skip
    others = Settings(
        model=str(model),
        data=f"demo:{case.dataset}",
        sparsity=SPARSITIES[pattern] if seed in SEEDS else MORE_SPARSITIES,
        output=case.folder(work, seed, pattern, "labels"),
        pattern=pattern,
        plugin=[str(WANDA)],
        fisher_dtype=case.fisher_dtype,
        gradients_of="labels",
        max_length=MAX_LENGTH[case.dataset],
        seed=seed,
    )
    # Magnitude sees no texts: what it does to a model serves all seeds of texts.
    without_damping = ["wanda"] if seed >= case.fine_tunings else ["magnitude", "wanda"]
    known = [
        *grid(pattern, without_damping if seed in SEEDS else [], ["auto"]),
        *grid(pattern, ["diagonal"], case.dampings_of_obert(pattern)),
    ]
    sweep_classifier(others, known, progress=progress)
    ours = replace(
        others,
        gradients_of="predictions",
        output=case.folder(work, seed, pattern, "predictions"),
    )
    fixed = case.dampings if pattern == "unstructured" and seed in SEEDS else ()
    sweep_classifier(ours, grid(pattern, ["greedy"], ["auto", *fixed]), progress=progress)


# ---- what is there ------------------------------------------------------------------


def trials(folder: Path, *selections: str) -> list[Outcome]:
    """Those of a folder that are there."""
    path = folder / CSV_FILE
    outcomes = TrialTable(path).outcomes if path.is_file() else []
    return [outcome for outcome in outcomes if outcome.setting.selection in selections]


def _is_shown(case: Case, pattern: str, outcome: Outcome) -> bool:
    damping = outcome.setting.damping
    if damping is None or damping == "auto":
        return True
    in_table = outcome.setting.selection == "diagonal" or outcome.target in DAMPING_SPARSITIES
    return damping in case.dampings_of_obert(pattern) and in_table


Finished = dict[int, tuple[list[Outcome], float]]


def trials_of(case: Case, pattern: str, work: Path, seed: int) -> tuple[list[Outcome], float]:
    """Outcomes of a seed that the tables show, and dense accuracy."""
    others, ours = (case.folder(work, seed, pattern, of) for of in ("labels", "predictions"))
    first = case.folder(work, seed % case.fine_tunings, pattern, "labels")
    outcomes = [
        *trials(others, "wanda", "diagonal"),
        *trials(first, "magnitude"),
        *trials(ours, "greedy"),
    ]
    basis = ours / BASIS_FILE
    dense = json.loads(basis.read_text())["dense"]["test_accuracy"] if basis.is_file() else 0.0
    return [outcome for outcome in outcomes if _is_shown(case, pattern, outcome)], dense


def finished(case: Case, pattern: str, work: Path) -> Finished:
    """Every seed that is whole."""
    count = len(SPARSITIES[pattern]) * (3 + len(case.dampings_of_obert(pattern)))
    count += len(DAMPING_SPARSITIES) * len(case.dampings) * (pattern == "unstructured")
    found = {seed: trials_of(case, pattern, work, seed) for seed in SEEDS}
    return {seed: run for seed, run in found.items() if len(run[0]) == count}


def finished_more(case: Case, work: Path) -> Finished:
    """Likewise, of the seeds beside those."""
    count = len(MORE_SPARSITIES) * (1 + len(case.dampings))
    found = {}
    for seed in case.more_seeds:
        outcomes, dense = trials_of(case, "unstructured", work, seed)
        outcomes = [o for o in outcomes if o.setting.selection in ("diagonal", "greedy")]
        if len(outcomes) == count:
            found[seed] = outcomes, dense
    return found


def finished_before(earlier: dict, case: str, pattern: str) -> Finished:
    """The same, of the last report."""
    known = earlier.get("cases", {}).get(case, {}).get(pattern, {})
    return {
        seed: ([Outcome(Setting(**o.pop("setting")), **o) for o in outcomes], dense)
        for seed, outcomes, dense in zip(
            known.get("seeds", ()), known.get("outcomes", ()), known.get("dense", ()), strict=True
        )
    }


def report(work: Path, command: str | None) -> tuple[str, dict]:
    """The tables of what is there; ``command`` is what has added to it, if anything did."""
    earlier = json.loads(REPORT.read_text()) if REPORT.is_file() else {"made_by": []}
    made_by = earlier["made_by"] + ([] if command is None else [{"command": command, **machine()}])
    lines = [
        "# One shot at the same texts",
        "",
        "Made by, each with what the ones before it had not done:",
        "",
        *(
            f"- `{run['command']}` on {run['cpu']}, {run['threads']} threads, torch "
            f"{run['torch']}, {run['date']}"
            for run in made_by
        ),
        "",
        "Test accuracy in per cent after pruning the encoder's linear layers, "
        "one global ranking, nothing trained afterwards; mean ± standard deviation over the seeds. "
        f" All rows saw the same {TEXTS} training texts, in {TEXTS // TEXTS_PER_GRAD} gradients of "
        f"{TEXTS_PER_GRAD} where they take gradients (of TREC's 4078 texts 32 come twice); "
        "magnitude saw none.  Block size 50, 48 for N:M; Fishers in float64, those of MPNet in "
        "float32.",
        "",
        "Wanda's score: |W| times the norm of the input, ranked in each row.  oBERT: diagonal "
        "scores, sum update, and of the dampings named below for every sparsity the one with the "
        "best mean accuracy on the held-back texts.  Ours: the defaults of obert-prune sweep, "
        "gradients of the model's predictions, texts of about the same length in each, greedy "
        "selection, joint update, damping chosen on 256 held-back texts; the fixed one it is held "
        "against is "
        "the best by test accuracy.  What is asked "
        "of predictions was chosen on MiniLM, where held-back and test accuracy say the same.",
        "",
    ]
    document = {"made_by": made_by, "cases": {}}
    for key, case in CASES.items():
        for pattern, targets in SPARSITIES.items():
            new = finished(case, pattern, work)
            whole = finished_before(earlier, key, pattern) | new
            if not whole:
                continue
            # Written into the file by hand, where what is known was made by other code.
            note = "" if new else earlier["cases"][key][pattern].get("note", "")
            seeds = sorted(whole)
            runs, dense = map(list, zip(*(whole[seed] for seed in seeds), strict=True))
            if key not in document["cases"]:
                document["cases"][key] = {}
                dampings = ", ".join(f"{damping:g}" for damping in case.dampings)
                more = "".join(
                    f"; of oBERT with {p} also {', '.join(f'{damping:g}' for damping in added)}"
                    for p, added in case.more_dampings.items()
                )
                lines += [f"## {case.name}", "", f"Dampings: {dampings}{more}.", ""]
            count = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
            lines += [f"{pattern}; dense {cell(dense)}; {count}{note}", ""]
            lines += [*accuracy_table(runs, targets), "", *loss_table(runs, targets), ""]
            if pattern == "unstructured":
                lines += ["Damping, greedy selection:", "", *damping_table(runs), ""]
            document["cases"][key][pattern] = {
                "seeds": seeds, "dense": dense, "note": note,
                "outcomes": [[asdict(o) for o in run] for run in runs],
            }  # fmt: skip
            if pattern != "unstructured":
                continue
            more = finished_before(earlier, key, MORE) | finished_more(case, work)
            if more:
                lines += more_seeds_lines(
                    runs, {seed: run for seed, (run, _) in more.items()}, MORE_SPARSITIES
                )
                document["cases"][key][MORE] = {
                    "seeds": list(more), "dense": [dense for _, dense in more.values()],
                    "outcomes": [[asdict(o) for o in run] for run, _ in more.values()],
                }  # fmt: skip
    return "\n".join(lines), document


def main() -> None:
    settings = parse_arguments()
    command = shlex.join(["python", "benchmarks/evidence.py", *sys.argv[1:]])
    if not settings.report:
        load_plugin(WANDA)
        for seed in settings.seeds or [*SEEDS, *CASES["mpnet-mr"].more_seeds]:
            for key in settings.cases:
                for pattern in settings.patterns:
                    measure(CASES[key], seed, pattern, settings.work)
    text, document = report(settings.work, None if settings.report else command)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "evidence.md").write_text(text, encoding="utf-8")
    REPORT.write_text(json.dumps(document, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
