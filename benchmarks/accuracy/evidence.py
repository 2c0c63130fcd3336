"""What one shot costs in accuracy: magnitude, Wanda, oBERT and ours on the same texts.

    python benchmarks/evidence.py          # some hours on two cores
    python benchmarks/evidence.py --report # only the tables, of what is there

Models are fine-tuned, then pruned by ``obert-prune sweep``'s own code, a folder for each case,
seed and pattern in ``--work``; an interrupted run goes on where it stopped. The tables keep what
an earlier run left in results/evidence.json and this one did not do. A seed is one of fine-tuning
and of the texts for MiniLM; MPNet is fine-tuned once, and a seed is one of the texts. Where three
seeds do not tell ours from oBERT's, more of them are run for that cell; which and how many is
settled before the first is.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.accuracy.dense_models import MAX_LENGTH, MINILM, MPNET, Dense, Stages, fine_tuned
from benchmarks.accuracy.evidence_tables import (
    DAMPING_SPARSITIES,
    accuracy_table,
    cell,
    damping_table,
    loss_table,
    more_seeds_lines,
)  # fmt: skip
from benchmarks.support.machine import machine
from obert_kernels import load_plugin
from obert_kernels.commands.config import EVALUATION_BATCH, Settings
from obert_kernels.commands.sweep import sweep_classifier
from obert_kernels.tasks.demo_sets import load_demo_set
from obert_kernels.tasks.downloads import cache_folder
from obert_kernels.tasks.evaluate import accuracy
from obert_kernels.tasks.loaders import make_loader
from obert_kernels.tasks.text_data import TextData
from obert_kernels.trials.outcome import Outcome, Setting, make_grid
from obert_kernels.trials.table import BASIS_FILE, CSV_FILE, TrialTable

RESULTS = Path(__file__).parents[1] / "results"
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
MORE_SPARSITIES = [0.5]


@dataclass(frozen=True)
class Case:
    """A model and a task.

    Attributes:
        dampings: fixed ones, for oBERT and to compare with.
        more_dampings: of oBERT, by pattern, where the best of those is the first or the last;
            shown once every seed has them.
        more_seeds: of texts, unstructured at MORE_SPARSITIES; whatever model fine-tuning gives.
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

    @property
    def name(self) -> str:
        return f"{self.dense.name} on {self.dataset.upper()}"

    def seeds(self, pattern: str) -> tuple[int, ...]:
        return (*SEEDS, *(self.more_seeds if pattern == "unstructured" else ()))

    def folder(self, work: Path, seed: int, pattern: str, gradients_of: str) -> Path:
        pattern = pattern.replace(":", "of")
        key = f"{self.dense.name}-{self.dataset}-seed{seed}-{pattern}-{gradients_of}"
        return work / "evidence" / key

    def trials(self, pattern: str, seed: int) -> dict[Setting, list[float]]:
        """What a table needs of a seed, and at which sparsities."""
        targets = SPARSITIES[pattern]
        if seed not in SEEDS:
            theirs, ours = self.dampings, grid(pattern, ["greedy"], ["auto"])
            settings = [*grid(pattern, ["diagonal"], theirs), *ours]
            return dict.fromkeys(settings, MORE_SPARSITIES)
        settings = [
            *grid(pattern, ["magnitude", "wanda", "greedy"], ["auto"]),
            *grid(pattern, ["diagonal"], self.dampings),
        ]
        fixed = grid(pattern, ["greedy"], self.dampings) if pattern == "unstructured" else []
        return dict.fromkeys(settings, targets) | dict.fromkeys(fixed, DAMPING_SPARSITIES)

    def all_trials(self, pattern: str, seed: int) -> dict[Setting, list[float]]:
        """With further dampings of oBERT."""
        more = grid(pattern, ["diagonal"], self.more_dampings.get(pattern, ()))
        wider = dict.fromkeys(more if seed in SEEDS else [], SPARSITIES[pattern])
        return self.trials(pattern, seed) | wider


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
    parser.add_argument("--seeds", nargs="+", type=int, choices=range(6), help="default: all")
    parser.add_argument("--patterns", nargs="+", default=list(SPARSITIES), choices=SPARSITIES)
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmark_accuracy")
    parser.add_argument("--report", action="store_true", help="prune nothing")
    return parser.parse_args()


def grid(pattern: str, selection: Iterable[str], damping: Iterable) -> list[Setting]:
    return make_grid(
        texts=[TEXTS], texts_per_grad=[TEXTS_PER_GRAD], selection=selection, damping=damping,
        pattern=pattern,
    )  # fmt: skip


def measure(case: Case, seed: int, pattern: str, work: Path, known: Run | None) -> None:
    """Do the trials that are not there yet.

    Raises:
        SystemExit: they are to stand beside others of another model.
    """
    there = known.trials if known is not None else {}
    missing = [
        setting
        for setting, targets in case.all_trials(pattern, seed).items()
        if any((setting, target) not in there for target in targets)
        # It sees no texts: what it does to a model serves all seeds of texts.
        and (setting.selection != "magnitude" or seed < case.fine_tunings)
    ]
    if not missing:
        return
    data = load_demo_set(case.dataset)
    progress = Stages(f"{case.name}, {pattern}, seed {seed}:")
    model = fine_tuned(
        case.dense, case.dataset, seed % case.fine_tunings, data, work, progress
    )  # fmt: skip
    if known is not None:
        check_same(case, seed, known.dense, test_accuracy(model, case, data), model)
    for gradients_of in ("labels", "predictions"):
        mine = [s for s in missing if (s.selection == "greedy") == (gradients_of == "predictions")]
        settings = Settings(
            model=str(model),
            data=f"demo:{case.dataset}",
            sparsity=SPARSITIES[pattern] if seed in SEEDS else MORE_SPARSITIES,
            output=case.folder(work, seed, pattern, gradients_of),
            pattern=pattern,
            plugin=[str(WANDA)],
            fisher_dtype=case.fisher_dtype,
            gradients_of=gradients_of,
            max_length=MAX_LENGTH[case.dataset],
            seed=seed,
        )
        if mine:
            sweep_classifier(settings, mine, progress=progress)


# ---- what is there ------------------------------------------------------------------

# By setting and sparsity.
Trials = dict[tuple[Setting, float], Outcome]


@dataclass
class Run:
    """What is known of a seed."""

    dense: float
    trials: Trials

    def has(self, settings: dict[Setting, list[float]]) -> bool:
        return all(
            (s, target) in self.trials for s, targets in settings.items() for target in targets
        )


def reported(earlier: dict, case: str, pattern: str) -> dict[int, Run]:
    """What the last report knew, by seed."""
    known = earlier.get("cases", {}).get(case, {}).get(pattern, {})
    runs = {}
    for seed, rows, dense in zip(
        known.get("seeds", ()), known.get("outcomes", ()), known.get("dense", ()), strict=True
    ):
        outcomes = [Outcome(**row | {"setting": Setting(**row["setting"])}) for row in rows]
        runs[seed] = Run(dense, {(o.setting, o.target): o for o in outcomes})
    return runs


def added(case: Case, pattern: str, work: Path, seed: int) -> Run | None:
    """What is in the folders of a seed."""
    folders = [case.folder(work, seed, pattern, of) for of in ("labels", "predictions")]
    dense = [
        json.loads((folder / BASIS_FILE).read_text())["dense"]["test_accuracy"]
        for folder in folders
        if (folder / BASIS_FILE).is_file()
    ]
    if not dense:
        return None
    first = case.folder(work, seed % case.fine_tunings, pattern, "labels")
    outcomes = [
        outcome
        for folder in {first: None, **dict.fromkeys(folders)}
        if (folder / CSV_FILE).is_file()
        for outcome in TrialTable(folder / CSV_FILE).outcomes
        if folder in folders or outcome.setting.selection == "magnitude"
    ]
    shown = case.all_trials(pattern, seed)
    return Run(
        dense[0],
        {(o.setting, o.target): o for o in outcomes if o.target in shown.get(o.setting, ())},
    )


def test_accuracy(model: Path, case: Case, data: TextData) -> float:
    """Of a dense model."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    loader = make_loader(
        tokenizer, data.test, EVALUATION_BATCH, max_length=MAX_LENGTH[case.dataset], by_length=True
    )
    dense = AutoModelForSequenceClassification.from_pretrained(model)
    return accuracy(dense, loader)


def check_same(case: Case, seed: int, known: float, found: float, folder: Path) -> None:
    """Raise SystemExit unless a dense model is as accurate as the one that is reported."""
    if known != found:
        raise SystemExit(
            f"{case.name}, seed {seed}: the dense model here ({folder}) has {found:.4f}, that of "
            f"{REPORT.name} {known:.4f}; remove that folder, or take the case out of that file to "
            "do all anew"
        )


def everything(earlier: dict, key: str, pattern: str, work: Path) -> dict[int, Run]:
    """What is known by seed: of the last report, and what has come since.

    Raises:
        SystemExit: the model that was fine-tuned here is another one.
    """
    case = CASES[key]
    runs = reported(earlier, key, pattern)
    for seed in case.seeds(pattern):
        new = added(case, pattern, work, seed)
        if new is None:
            continue
        known = runs.setdefault(seed, Run(new.dense, {}))
        check_same(case, seed, known.dense, new.dense, case.folder(work, seed, pattern, "*"))
        known.trials |= new.trials
    return runs


def last_report() -> dict:
    return json.loads(REPORT.read_text()) if REPORT.is_file() else {"made_by": []}


def report(work: Path, command: str | None) -> tuple[str, dict]:
    """The tables of what is there; ``command`` is what has added to it, if anything did."""
    earlier = last_report()
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
            known = everything(earlier, key, pattern, work)
            whole = {
                seed: run
                for seed, run in sorted(known.items())
                if run.has(case.trials(pattern, seed))
            }
            if known:
                document["cases"].setdefault(key, {})[pattern] = {
                    "seeds": list(known), "dense": [run.dense for run in known.values()],
                    "outcomes": [[asdict(o) for o in r.trials.values()] for r in known.values()],
                }  # fmt: skip
            main = [run for seed, run in whole.items() if seed in SEEDS]
            if not main:
                continue
            if f"## {case.name}" not in lines:
                dampings = ", ".join(f"{damping:g}" for damping in case.dampings)
                lines += [f"## {case.name}", "", f"Dampings: {dampings}.", ""]
            wider = [
                f"{setting.damping:g}"
                for setting in case.all_trials(pattern, SEEDS[0])
                if setting not in case.trials(pattern, SEEDS[0])
                and all(run.has({setting: targets}) for run in main)
            ]
            runs, dense = [list(run.trials.values()) for run in main], [run.dense for run in main]
            count = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
            also = f"; oBERT also with {', '.join(wider)}" if wider else ""
            lines += [f"{pattern}; dense {cell(dense)}; {count}{also}", ""]
            lines += [*accuracy_table(runs, targets), "", *loss_table(runs, targets), ""]
            if pattern == "unstructured":
                lines += ["Damping, greedy selection:", "", *damping_table(runs), ""]
            more = {seed: run for seed, run in whole.items() if seed not in SEEDS}
            if more:
                lines += more_seeds_lines(
                    runs,
                    {seed: list(run.trials.values()) for seed, run in more.items()},
                    [run.dense for run in more.values()],
                    MORE_SPARSITIES,
                )
    return "\n".join(lines), document


def main() -> None:
    settings = parse_arguments()
    command = shlex.join(["python", "benchmarks/evidence.py", *sys.argv[1:]])
    load_plugin(WANDA)
    if not settings.report:
        for key in settings.cases:
            for pattern in settings.patterns:
                known = everything(last_report(), key, pattern, settings.work)
                for seed in CASES[key].seeds(pattern):
                    if not settings.seeds or seed in settings.seeds:
                        measure(CASES[key], seed, pattern, settings.work, known.get(seed))
    text, document = report(settings.work, None if settings.report else command)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "evidence.md").write_text(text, encoding="utf-8")
    REPORT.write_text(json.dumps(document, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
