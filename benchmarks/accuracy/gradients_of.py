"""What gradients are taken of, and which texts share one: accuracy after one shot, and seconds.

    python benchmarks/gradients_of.py --sets trec  # a quarter of an hour

A fine-tuned MiniLM is pruned once for each, from the same texts; the rest as by default.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.accuracy.dense_models import MAX_LENGTH, MINILM, Stages, fine_tuned
from benchmarks.accuracy.evidence import TEXTS, TEXTS_PER_GRAD
from benchmarks.accuracy.evidence_tables import cell, header, row
from benchmarks.support.machine import machine
from obert_kernels import estimate_fisher, model_loss, prediction_loss, prune
from obert_kernels.gradients.losses import LossFn
from obert_kernels.tasks.batches import calibration_batches, held_back, tokens_at_once
from obert_kernels.tasks.demo_sets import load_demo_set
from obert_kernels.tasks.downloads import cache_folder
from obert_kernels.tasks.evaluate import accuracy
from obert_kernels.tasks.loaders import make_loader
from obert_kernels.tasks.precision import for_backward

RESULTS = Path(__file__).parents[1] / "results"
# What gradients are of, and whether texts of about the same length share one.
WAYS: dict[str, tuple[LossFn, bool]] = {
    "labels": (model_loss, False),
    "labels, by length": (model_loss, True),
    "predictions": (prediction_loss, False),
    "predictions, by length": (prediction_loss, True),
}
SPARSITIES = [0.5, 0.8, 0.9]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["trec", "mr"], choices=["trec", "mr"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmark_accuracy")
    return parser.parse_args()


def measure(name: str, seed: int, work: Path) -> dict:
    """Accuracy and seconds of each way, one seed of fine-tuning and texts."""
    data = load_demo_set(name)
    folder = fine_tuned(MINILM, name, seed, data, work, Stages(name))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    length = MAX_LENGTH[name]
    held = held_back(tokenizer, data, max_length=length)
    test = list(make_loader(tokenizer, data.test, 64, max_length=length, by_length=True))
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    result: dict = {"dense": accuracy(model, test), "ways": {}}
    for way, (loss_fn, by_length) in WAYS.items():
        batches = calibration_batches(
            tokenizer, data.train, TEXTS // TEXTS_PER_GRAD, TEXTS_PER_GRAD, max_length=length,
            max_tokens=tokens_at_once(model.config.hidden_size), by_length=by_length, seed=seed,
        )  # fmt: skip
        longest = max(batches, key=lambda batch: batch["input_ids"].shape[1])
        start = time.perf_counter()
        with for_backward(longest, torch.device("cpu")):
            fisher = estimate_fisher(
                model, batches, num_grads=TEXTS // TEXTS_PER_GRAD,
                samples_per_grad=TEXTS_PER_GRAD, loss_fn=loss_fn,
            )  # fmt: skip
        found: dict = {"seconds": time.perf_counter() - start, "accuracy": []}
        for sparsity in SPARSITIES:
            model.load_state_dict(dense)
            prune(model, sparsity=sparsity, fisher=fisher, calibration=held)
            found["accuracy"].append(accuracy(model, test))
        model.load_state_dict(dense)
        print(name, seed, way, found, flush=True)
        result["ways"][way] = found
    return result


def markdown(document: dict) -> str:
    about = document["machine"]
    lines = [
        "# Gradients of labels and of predictions",
        "",
        f"`{document['command']}` on {about['cpu']}, {about['threads']} threads, torch "
        f"{about['torch']}, {about['date']}.  Test accuracy in per cent of all-MiniLM-L6-v2 after "
        f"one shot from {TEXTS} texts in gradients of {TEXTS_PER_GRAD}; greedy selection, joint "
        "update, damping chosen on 256 held-back texts; mean ± standard deviation over the seeds "
        f"{document['seeds']}.  By length: texts of about the same length share a gradient; else "
        "those that do are random.  Seconds of the estimate, gradients and Gram.",
    ]
    for name, by_seed in document["sets"].items():
        dense = cell([result["dense"] for result in by_seed])
        lines += ["", f"{name.upper()}, dense {dense}", ""]
        lines += header(["gradients of", "seconds", *(f"{share:.0%}" for share in SPARSITIES)])
        for way in WAYS:
            found = [result["ways"][way] for result in by_seed]
            seconds = statistics.median(one["seconds"] for one in found)
            columns = zip(*(one["accuracy"] for one in found), strict=True)
            lines.append(row([way, f"{seconds:.0f}", *(cell(list(values)) for values in columns)]))
    return "\n".join(lines) + "\n"


def main() -> None:
    settings = parse_arguments()
    document = {
        "command": shlex.join(["python", "benchmarks/gradients_of.py", *sys.argv[1:]]),
        "machine": machine(),
        "seeds": settings.seeds,
        "sets": {
            name: [measure(name, seed, settings.work) for seed in settings.seeds]
            for name in settings.sets
        },
    }
    text = markdown(document)
    (RESULTS / "gradients_of.md").write_text(text, encoding="utf-8")
    (RESULTS / "gradients_of.json").write_text(json.dumps(document, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
