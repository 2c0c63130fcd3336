"""Time and memory of whole one-shot runs, each in a process of its own; the reference among them.

    python benchmarks/evidence_costs.py minilm-mr --methods greedy reference greedy --seeds 0 1 2
    python benchmarks/evidence_costs.py mpnet-mr --methods greedy --sparsity 0.7

Seconds are those of the pruning: texts and model are loaded and the model is evaluated outside.
"reference" is the procedure that its authors published, with the fastest plain-torch update we
know how to write: m = 1024 gradients of 16 texts, one backward pass each, then one einsum and one
baddbmm per gradient and matrix; backward passes in bfloat16 where ours are.  Peak memory is the
process's, Python, torch and the model included.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.accuracy.dense_models import MAX_LENGTH, Stages, fine_tuned
from benchmarks.accuracy.evidence import CASES, RESULTS, TEXTS, TEXTS_PER_GRAD, WANDA, Case
from benchmarks.accuracy.evidence_tables import header, row
from benchmarks.support.contender import ReferenceInverse
from benchmarks.support.machine import machine
from obert_kernels import find_weights, load_plugin, prune
from obert_kernels.tasks.batches import calibration_batches, held_back, tokens_at_once
from obert_kernels.tasks.demo_sets import load_demo_set
from obert_kernels.tasks.downloads import cache_folder
from obert_kernels.tasks.evaluate import accuracy
from obert_kernels.tasks.loaders import make_loader
from obert_kernels.tasks.precision import LOSSES, text_loss

METHODS = ("magnitude", "wanda", "diagonal", "greedy", "reference")
REFERENCE_GRADS, BLOCK_SIZE = 1024, 50


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument(
        "--methods", nargs="+", default=list(METHODS), choices=METHODS,
        help="one process each, in this order; a method may come twice",
    )  # fmt: skip
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--pattern", default="unstructured", help="of all but the reference")
    parser.add_argument("--damping", type=float, default=1e-7, help="of diagonal and reference")
    parser.add_argument("--texts", type=int, default=TEXTS, help="of all but the reference")
    parser.add_argument("--add", action="store_true", help="keep earlier rows of the case")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0],
        help="the methods with the first, then with the next; of fine-tuning and of the texts",
    )  # fmt: skip
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmark_accuracy")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def prune_as_reference(
    model: nn.Module, batches: list[Any], sparsity: float, damping: float
) -> dict[str, float]:
    """Diagonal scores, one global ranking, sum update; returns seconds by stage."""
    model.eval()
    weights = find_weights(model)
    fishers = {
        name: ReferenceInverse(len(batches), BLOCK_SIZE, weight.numel(), damping)
        for name, weight in weights.items()
    }
    seconds = {"gradients": 0.0, "fisher": 0.0}
    for batch in batches:
        start = time.perf_counter()
        model.zero_grad()
        text_loss(model, batch).backward()
        middle = time.perf_counter()
        for name, weight in weights.items():
            fishers[name].add_grad(weight.grad.flatten())
        seconds["gradients"] += middle - start
        seconds["fisher"] += time.perf_counter() - middle
    start = time.perf_counter()
    with torch.no_grad():
        scores = torch.cat([fishers[name].scores(w.flatten()) for name, w in weights.items()])
        removed = torch.zeros(len(scores), dtype=torch.bool)
        removed[scores.topk(round(sparsity * len(scores)), largest=False).indices] = True
        parts = removed.split([weight.numel() for weight in weights.values()])
        for (name, weight), part in zip(weights.items(), parts, strict=True):
            new = fishers[name].update(weight.flatten(), ~part)
            weight.copy_(new.view_as(weight))
    return {**seconds, "selection": time.perf_counter() - start}


def prune_with_ours(
    model: nn.Module, method: str, batches: list[Any], calibration: list[Any], case: Case,
    settings: argparse.Namespace,
) -> dict[str, float]:  # fmt: skip
    options: dict[str, Any] = {"selection": method}
    if method == "greedy":
        options |= {"calibration": calibration}
    elif method == "diagonal":
        options |= {"update": "sum", "damping": settings.damping}
    report = prune(
        model, None if method == "magnitude" else batches, settings.sparsity,
        num_grads=settings.texts // TEXTS_PER_GRAD, samples_per_grad=TEXTS_PER_GRAD,
        pattern=settings.pattern,
        loss_fn=LOSSES["predictions" if method == "greedy" else "labels"],
        fisher_dtype=getattr(torch, case.fisher_dtype),
        **options,
    ).report  # fmt: skip
    seconds = report.seconds
    selection = sum(seconds.get(stage, 0.0) for stage in ("scores", "masks", "update"))
    shown = {name: seconds.get(name, 0.0) for name in ("gradients", "fisher", "damping")}
    return {**shown, "selection": selection}


def measure(case: Case, method: str, seed: int, settings: argparse.Namespace) -> dict[str, Any]:
    """One run, in this process."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    load_plugin(WANDA)
    data = load_demo_set(case.dataset)
    folder = fine_tuned(
        case.dense, case.dataset, seed % case.fine_tunings, data, settings.work,
        Stages("fine-tuning"),
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    length = MAX_LENGTH[case.dataset]
    reference = method == "reference"
    # One gradient a batch for the reference; as many as fit for ours.
    batches = calibration_batches(
        tokenizer, data.train, REFERENCE_GRADS if reference else settings.texts // TEXTS_PER_GRAD,
        TEXTS_PER_GRAD, max_length=length, seed=seed,
        max_tokens=1 if reference else tokens_at_once(model.config.hidden_size),
        by_length=method == "greedy",  # whose gradients are those of predictions
    )  # fmt: skip
    held = held_back(tokenizer, data, max_length=length)
    start = time.perf_counter()
    if reference:
        by_stage = prune_as_reference(model, batches, settings.sparsity, settings.damping)
    else:
        by_stage = prune_with_ours(model, method, batches, held, case, settings)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    test = make_loader(tokenizer, data.test, 64, max_length=length, by_length=True)
    texts = {"magnitude": 0, "reference": REFERENCE_GRADS * TEXTS_PER_GRAD}.get(
        method, settings.texts
    )
    return {
        "method": method,
        "seed": seed,
        "sparsity": settings.sparsity,
        "pattern": "unstructured" if reference else settings.pattern,
        "texts": texts,
        "seconds": seconds,
        **by_stage,
        "peak_gib": peak,
        "accuracy": accuracy(model, test),
    }


def markdown(document: dict[str, Any]) -> str:
    lines = [
        "# Whole one-shot runs: time and memory",
        "",
        "One process for each row, those of one command in the order shown; seconds of the pruning "
        "(texts and model are loaded, the model evaluated outside), peak memory of the process.  "
        f"Reference: m = {REFERENCE_GRADS} gradients of {TEXTS_PER_GRAD} texts, one backward pass "
        "and one einsum and baddbmm per matrix each, diagonal scores, sum update, B = "
        f"{BLOCK_SIZE}.  Others: gradients of {TEXTS_PER_GRAD} texts each, "
        "many in a backward pass; greedy with gradients of the model's predictions, texts of "
        "about the same length in each, joint update and damping chosen by itself (ours), "
        "diagonal with sum update and a given damping (oBERT on our kernels).  Accuracy on the "
        "test texts; a seed is one of fine-tuning (MPNet is fine-tuned once) and of the texts.",
        "",
    ]
    columns = (
        "method", "seed", "pattern", "sparsity", "texts", "accuracy", "gradients s", "Fisher s",
        "damping s", "selection s", "whole s", "peak GiB", "reference : it",
    )  # fmt: skip
    for name, part in document.items():
        about, rows = part["machine"], part["runs"]
        lines += [
            f"## {name}",
            "",
            f"`{part['command']}` on {about['cpu']}, {about['threads']} threads, torch "
            f"{about['torch']}, {about['date']}.",
            "",
            *header(columns),
        ]
        references = {run["seed"]: run["seconds"] for run in rows if run["method"] == "reference"}
        for run in rows:
            compares = run["seed"] in references and run["pattern"] == "unstructured"
            ratio = f"{references[run['seed']] / run['seconds']:.1f}" if compares else ""
            stages = [run.get(s, 0.0) for s in ("gradients", "fisher", "damping", "selection")]
            cells = [
                run["method"], run["seed"], run["pattern"], f"{run['sparsity']:.0%}", run["texts"],
                f"{run['accuracy']:.1%}",
                *(f"{seconds:.1f}" for seconds in (*stages, run["seconds"])),
                f"{run['peak_gib']:.1f}", ratio,
            ]  # fmt: skip
            lines.append(row(cells))
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    settings = parse_arguments()
    case = CASES[settings.case]
    if settings.child:
        print(json.dumps(measure(case, settings.methods[0], settings.seeds[0], settings)))
        return
    runs = []
    for seed, method in product(settings.seeds, settings.methods):
        command = [
            sys.executable, __file__, settings.case, "--child", "--methods", method,
            "--sparsity", str(settings.sparsity), "--damping", str(settings.damping),
            "--seeds", str(seed), "--texts", str(settings.texts),
            "--pattern", settings.pattern,
            "--work", str(settings.work),
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
        print(runs[-1], flush=True)
    path = RESULTS / "evidence_costs.json"
    document = json.loads(path.read_text()) if path.is_file() else {}
    shown = shlex.join(["python", "benchmarks/evidence_costs.py", *sys.argv[1:]])
    if settings.add:
        shown = f"{document[case.name]['command']}; {shown}"
        runs = [*document[case.name]["runs"], *runs]
    document[case.name] = {"command": shown, "machine": machine(), "runs": runs}
    path.write_text(json.dumps(document, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(document), encoding="utf-8")


if __name__ == "__main__":
    main()
