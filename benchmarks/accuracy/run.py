"""Measure an experiment (see experiment.py) and write results/<experiment>/<machine>.json and .md.

    python -m benchmarks.accuracy.run one_shot        # some hours on two cores
    python -m benchmarks.accuracy.run one_shot --only data=trec pattern=block4
    python -m benchmarks.accuracy.run gradients_of --set seed=0 texts=64 --results /tmp/tiny

Every outcome is written when it is there: an interrupted run goes on where it stopped, and what an
earlier run left in the file is not measured again.  Fine-tuned models are kept in ``--work``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy.dense_models import MAX_LENGTH, fine_tuned
from benchmarks.accuracy.experiment import Point, key, load, points, reconstruction
from benchmarks.accuracy.prune_once import loss_and_batches, prune_once, prune_whole
from benchmarks.accuracy.tables import Row, markdown, parts
from benchmarks.support.report import RESULTS, machine_name, new_document, write
from obert_kernels import FisherConfig, PruningConfig, load_plugin, make_grid, run_grid
from obert_kernels.tasks.classification import ClassificationTask
from obert_kernels.tasks.downloads import cache_folder
from obert_kernels.tasks.precision import choose_precision, precision_name
from obert_kernels.trials.outcome import Outcome, Scores

WANDA = Path(__file__).parent / "wanda.py"
Record = Callable[[Point, Row], None]
# Selections that share nothing with others.
ALONE = ("sparsegpt",)
# Points with the same can share estimates.
SHARED = ("pattern", "gradients_of", "by_length", "fisher_dtype", "estimator", "steps")
DENSE_DIGITS = 4  # to which an accuracy must be that of the model measured before


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("experiment", help="its name, or a file")
    parser.add_argument("--only", nargs="+", default=[], metavar="FIELD=VALUE", help="points")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="FIELD=VALUE",
        help="in place of what the experiment says; needs --results",
    )  # fmt: skip
    parser.add_argument("--anew", action="store_true", help="forget what earlier runs left")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmark_accuracy")
    parser.add_argument("--in-this-process", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.set and args.results == RESULTS:
        parser.error("--set measures something else: give --results, another folder")
    return args


def fields(given: list[str]) -> dict[str, Any]:
    """FIELD=VALUE, the value JSON or else a word."""
    found = {}
    for text in given:
        name, _, value = text.partition("=")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def measure(wanted: list[Point], known: list[Row], work: Path, record: Record) -> None:
    """Measure complete points, those of a model and a seed together.

    Raises:
        SystemExit: outcomes of another dense model are there.
    """
    for (model, data, seed, model_seed), some in parts(
        wanted, "model", "data", "seed", "model_seed"
    ):
        task = load_task(model, data, seed, model_seed, work)
        dense = task.evaluate(task.model, "test").accuracy
        check_same(known, {"model": model, "data": data, "seed": seed}, dense)

        def with_dense(point: Point, row: Row, dense: float = dense) -> None:
            record(point, {"dense": dense, **row})

        measure_one_by_one(task, [p for p in some if goes_alone(p)], with_dense)
        for _, here in parts([p for p in some if not goes_alone(p)], *SHARED):
            measure_grid(task, here, with_dense)


def goes_alone(point: Point) -> bool:
    return point.get("steps") is not None or point["selection"] in ALONE


def load_task(
    model: str, data: str, seed: int, model_seed: int | None, work: Path
) -> ClassificationTask:
    folder = fine_tuned(model, data, seed if model_seed is None else model_seed, work)
    return ClassificationTask.load(
        str(folder), f"demo:{data}", max_length=MAX_LENGTH[data], seed=seed
    )


def check_same(known: list[Row], where: Mapping[str, Any], dense: float) -> None:
    for row in known:
        same = all(row.get(name) == value for name, value in where.items())
        if same and round(row.get("dense", dense) - dense, DENSE_DIGITS):
            raise SystemExit(
                f"{where}: the dense model here has {dense:.4f}, that of the outcomes there are "
                f"{row['dense']:.4f}; --anew forgets them"
            )


def measure_grid(task: ClassificationTask, wanted: list[Point], record: Record) -> None:
    """As ``obert-prune sweep`` does it: an estimate serves all points that can share it."""
    first = wanted[0]
    loss_fn, batches_of = loss_and_batches(task, first)
    trials = {Outcome(configuration(point), point["sparsity"]): point for point in wanted}
    by_key = {outcome.key: point for outcome, point in trials.items()}
    configs = list({outcome.key[0]: outcome.config for outcome in trials}.values())
    sparsities = list(dict.fromkeys(outcome.target for outcome in trials))
    every = [Outcome(*trial) for trial in product(configs, sparsities)]
    unwanted = [outcome for outcome in every if outcome.key not in by_key]

    def scores(model: torch.nn.Module) -> Scores:
        held, test = task.evaluate(model, "dev"), task.evaluate(model, "test")
        return Scores(held.accuracy, held.loss, test.accuracy)

    run_grid(
        task.model, batches_of, scores, configs, sparsities,
        loss_fn=loss_fn, calibration=task.damping_batches(), finished=unwanted,
        on_outcome=lambda outcome: record(by_key[outcome.key], figures(outcome)),
    )  # fmt: skip


def configuration(point: Point) -> PruningConfig:
    axes = ("texts", "texts_per_grad", "block_size", "selection", "update", "damping")
    given = {name: [point[name]] for name in axes if name in point}
    fisher = FisherConfig(
        estimator=point.get("estimator", "gram"), dtype=point.get("fisher_dtype", "float64")
    )
    base = PruningConfig(
        pattern=point["pattern"], fisher=fisher, reconstruction=reconstruction(point)
    )
    return make_grid(**given, base=base)[0]


FIGURES = (
    "dev_accuracy", "dev_loss", "test_accuracy", "predicted_increase", "damping_used",
    "gradients_seconds", "fisher_seconds", "damping_seconds", "selection_seconds",
    "reconstruction_seconds", "trial_seconds", "error",
)  # fmt: skip


def figures(outcome: Outcome) -> Row:
    row = {"reached": outcome.sparsity, **{name: getattr(outcome, name) for name in FIGURES}}
    if outcome.config.fit is None:
        del row["reconstruction_seconds"]
    return {name: value for name, value in row.items() if value not in (None, "")}


def measure_one_by_one(task: ClassificationTask, wanted: list[Point], record: Record) -> None:
    """With ``steps``, and for ALONE, there is nothing to share; the damping of each is shown."""
    for point in wanted:
        with prune_once(task, point) as row:
            held, test = task.evaluate(task.model, "dev"), task.evaluate(task.model, "test")
            scores = {"dev_accuracy": held.accuracy, "dev_loss": held.loss}
            record(point, {**scores, "test_accuracy": test.accuracy, **row})


def measure_in_processes(wanted: list[Point], arguments: list[str], record: Record) -> None:
    """A process of its own for each, so that time and memory are its own."""
    for point in wanted:
        command = [sys.executable, "-m", __spec__.name, *arguments]
        command += ["--in-this-process", json.dumps(point)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        record(point, json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    args = parse_arguments()
    load_plugin(WANDA)
    if args.in_this_process:
        point = json.loads(args.in_this_process)
        names = ("model", "data", "seed", "model_seed")
        task = load_task(*(point.get(name) for name in names), args.work)
        print(json.dumps(prune_whole(task, point)))
        return
    experiment = load(args.experiment)
    config, apart = experiment["defaults"], experiment.get("each_in_a_process", False)
    only, changed = fields(args.only), fields(args.set)
    wanted = [{**point, **changed} for point in points(experiment)]
    if changed:
        wanted = [json.loads(text) for text in dict.fromkeys(map(json.dumps, wanted))]
    wanted = [p for p in wanted if all(({**config, **p}).get(n) == v for n, v in only.items())]

    document = new_document(experiment["name"], config, **({"set": changed} if changed else {}))
    made_by = document["made_by"][0]
    made_by["machine"]["precision"] = precision_name(choose_precision("auto"))
    name = machine_name(made_by["machine"])
    path = args.results / experiment["name"] / f"{name}.json"
    if path.is_file() and not args.anew:
        document = json.loads(path.read_text(encoding="utf-8"))
        if (document["config"], document.get("set", {})) != (config, changed):
            raise SystemExit(f"{path} is of another config or --set: --anew forgets it")
    outcomes = document["outcomes"]
    axes = dict.fromkeys([*(n for p in points(experiment) for n in p), *changed])
    there = Counter(key(axes, row) for row in outcomes)
    left = []
    for point in wanted:
        there[key(axes, point)] -= 1
        if there[key(axes, point)] < 0:
            left.append(point)
    print(f"{len(left)} of {len(wanted)} outcomes to measure, into {path}", flush=True)

    def record(point: Point, row: Row) -> None:
        if made_by not in document["made_by"]:
            document["made_by"].append(made_by)
        outcomes.append({**{name: point[name] for name in axes if name in point}, **row})
        write(document, lambda document: markdown(document, experiment), name, args.results)
        print(json.dumps(outcomes[-1]), flush=True)

    complete = [{**config, **point} for point in left]
    if apart:
        measure_in_processes(complete, [args.experiment, "--work", str(args.work)], record)
    else:
        measure(complete, outcomes, args.work, record)


if __name__ == "__main__":
    main()
