"""One-shot accuracy of MiniLM-L6 on TREC and MR: magnitude, oBERT, greedy selection.

    python benchmarks/accuracy.py

fine-tunes one model per task and seed, estimates one Fisher for each, prunes at every sparsity
with every method from the same weights and the same gradients, and writes
``benchmarks/results/accuracy_oneshot.md`` and ``.json``.  Fine-tuned models and finished parts
are kept in ``--work``, so an interrupted run goes on where it stopped.  About 40 minutes on two
cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import statistics
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging as transformers_logging

import obert_kernels
from benchmarks.accuracy.dense_models import MAX_LENGTH, MINILM, Stages, fine_tuned
from benchmarks.support.machine import machine
from obert_kernels.files import write_json
from obert_kernels.tasks.batches import calibration_batches, tokens_at_once
from obert_kernels.tasks.demo_sets import load_demo_set
from obert_kernels.tasks.downloads import cache_folder
from obert_kernels.tasks.evaluate import accuracy
from obert_kernels.tasks.loaders import make_loader
from obert_kernels.tasks.precision import bfloat16_is_faster, text_loss

RESULTS = Path(__file__).parents[1] / "results"
METHODS: dict[str, dict[str, Any]] = {
    "magnitude": {"selection": "magnitude", "update": "none"},
    "oBERT, sum update": {"selection": "diagonal", "update": "sum"},
    "oBERT, joint update": {"selection": "diagonal", "update": "joint"},
    "greedy, joint update": {"selection": "greedy", "update": "joint"},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datasets", nargs="+", default=["trec", "mr"], choices=list(MAX_LENGTH))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8])
    parser.add_argument("--epochs", type=float, default=2.0, help="of fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--num-grads", type=int, default=256)
    parser.add_argument("--grad-batch-size", type=int, default=16, help="texts per gradient")
    parser.add_argument("--block-size", type=int, default=50)
    parser.add_argument("--damping", type=float, default=1e-8)
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmark_accuracy")
    return parser.parse_args()


def measure(dataset: str, seed: int, settings: argparse.Namespace) -> dict[str, Any]:
    """Return the accuracies of one task and seed: dense, and by method and sparsity."""
    progress = Stages(f"{dataset} seed {seed}:")
    start = time.perf_counter()
    data = load_demo_set(dataset)
    dense_model = replace(MINILM, epochs=settings.epochs, learning_rate=settings.learning_rate)
    folder = fine_tuned(dense_model, dataset, seed, data, settings.work, progress)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    length = MAX_LENGTH[dataset]
    test = make_loader(tokenizer, data.test, 64, max_length=length, by_length=True)
    batches = calibration_batches(
        tokenizer,
        data.train,
        settings.num_grads,
        settings.grad_batch_size,
        max_length=length,
        max_tokens=tokens_at_once(model.config.hidden_size),
        by_length=False,
        seed=seed,
    )
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    result = {"dense": accuracy(model, test), "test_texts": len(data.test)}
    fisher = obert_kernels.estimate_fisher(
        model,
        batches,
        num_grads=settings.num_grads,
        samples_per_grad=settings.grad_batch_size,
        block_size=settings.block_size,
        loss_fn=text_loss,
        progress=progress,
    )
    for method, options in METHODS.items():
        shared = {} if method == "magnitude" else {"fisher": fisher, "damping": settings.damping}
        result[method] = {}
        for sparsity in settings.sparsities:
            model.load_state_dict(dense)
            obert_kernels.prune(model, sparsity=sparsity, progress=progress, **shared, **options)
            result[method][f"{sparsity:g}"] = accuracy(model, test)
    result["seconds"] = time.perf_counter() - start
    return result


def code_digest() -> str:
    """Changes with the package, so that nothing measured with other code is taken for its own."""
    digest = hashlib.sha256()
    for path in sorted(Path(obert_kernels.__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def measure_all(settings: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Measure every task and seed that has not been measured with these settings before."""
    relevant = {
        name: value
        for name, value in vars(settings).items()
        if name not in ("datasets", "seeds", "work")
    }
    relevant |= {"max_length": MAX_LENGTH, "methods": METHODS, "code": code_digest()}
    key = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()[:12]
    results: dict[str, dict[str, Any]] = {}
    for dataset in settings.datasets:
        for seed in settings.seeds:
            path = settings.work / "measured" / key / f"{dataset}-seed{seed}.json"
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, measure(dataset, seed, settings))
            results.setdefault(dataset, {})[str(seed)] = json.loads(path.read_text())
            print(f"{dataset} seed {seed}: {results[dataset][str(seed)]['seconds']:.0f} s")
    return results


def environment() -> dict[str, Any]:
    packages = ("obert-kernels", "transformers", "tokenizers")
    return {
        **machine(),
        "bfloat16": bfloat16_is_faster(),
        **{name: version(name) for name in packages},
    }


def table(by_seed: dict[str, Any], sparsities: list[float]) -> list[str]:
    """Markdown rows: mean and standard deviation over the seeds, in per cent."""

    def cell(values: list[float]) -> str:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{100 * statistics.mean(values):.1f} ± {100 * spread:.1f}"

    runs = list(by_seed.values())
    header = ["method", *(f"{100 * sparsity:g} %" for sparsity in sparsities)]
    rows = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for method in METHODS:
        cells = [cell([run[method][f"{s:g}"] for run in runs]) for s in sparsities]
        rows.append("| " + " | ".join([method, *cells]) + " |")
    dense = cell([run["dense"] for run in runs])
    return [f"Dense: {dense}; {runs[0]['test_texts']} test texts.", "", *rows]


def report(results: dict[str, Any], settings: argparse.Namespace, command: str) -> str:
    about = environment()
    lines = [
        "# One-shot accuracy",
        "",
        f"{MINILM.name} fine-tuned, pruned in one shot (encoder linear layers, unstructured, one "
        "global ranking), no training afterwards.  Test accuracy in per cent, mean ± standard "
        f"deviation over {len(settings.seeds)} seeds of fine-tuning and gradients; every "
        "second-order row of a seed uses the same gradients, those of the loss, as in the paper.",
        "",
        f"Settings: {settings.epochs:g} epochs at learning rate {settings.learning_rate:g}, batch "
        f"32; {settings.num_grads} gradients of {settings.grad_batch_size} texts, block size "
        f"{settings.block_size}, damping {settings.damping:g}.",
        "",
    ]
    for dataset, by_seed in results.items():
        lines += [f"## {dataset.upper()}", "", *table(by_seed, settings.sparsities), ""]
    lines += [
        f"Made by `{command}` on {about['date']}: "
        + ", ".join(f"{name} {value}" for name, value in about.items() if name != "date")
        + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    settings = parse_arguments()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    results = measure_all(settings)
    text = report(results, settings, command)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "accuracy_oneshot.md").write_text(text, encoding="utf-8")
    options = {**vars(settings), "work": None, "max_length": MAX_LENGTH}
    write_json(
        RESULTS / "accuracy_oneshot.json",
        {"command": command, "settings": options, "versions": environment(), "results": results},
    )
    print(text)


if __name__ == "__main__":
    main()
