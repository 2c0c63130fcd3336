"""What gradients are taken of: given labels, or predictions at several temperatures.

    python benchmarks/temperature.py --sets trec  # a quarter of an hour

A fine-tuned MiniLM is pruned once for each, from the same texts, one seed; the rest as by default.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from functools import partial
from pathlib import Path

import torch
from dense_models import MAX_LENGTH, MINILM, Stages, fine_tuned
from evidence import TEXTS, TEXTS_PER_GRAD, header, row
from machine import machine
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from obert_kernels import estimate_fisher, model_loss, prediction_loss, prune
from obert_kernels.calibration import calibration_batches, held_back, tokens_at_once
from obert_kernels.classification import accuracy, for_backward, make_loader
from obert_kernels.downloads import cache_folder
from obert_kernels.losses import LossFn
from obert_kernels.text_data import load_demo_set

RESULTS = Path(__file__).parent / "results"
# A thousand stands for no softmax at all: squared differences of the logits.
LOSSES: dict[str, LossFn] = {
    "labels": model_loss,
    **{f"T = {t}": partial(prediction_loss, temperature=t) for t in (1, 4, 1000)},
}
SPARSITIES = [0.8, 0.9]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", default=["trec", "mr"], choices=["trec", "mr"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=cache_folder() / "benchmark_accuracy")
    return parser.parse_args()


def measure(name: str, settings: argparse.Namespace) -> dict:
    data = load_demo_set(name)
    folder = fine_tuned(MINILM, name, settings.seed, data, settings.work, Stages(name))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    length = MAX_LENGTH[name]
    batches = calibration_batches(
        tokenizer, data.train, TEXTS // TEXTS_PER_GRAD, TEXTS_PER_GRAD, max_length=length,
        max_tokens=tokens_at_once(model.config.hidden_size), seed=settings.seed,
    )  # fmt: skip
    held = held_back(tokenizer, data, max_length=length)
    test = list(make_loader(tokenizer, data.test, 32, max_length=length, by_length=True))
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    result: dict = {"dense": accuracy(model, test), "rows": {}}
    longest = max(batches, key=lambda batch: batch["input_ids"].shape[1])
    for label, loss_fn in LOSSES.items():
        with for_backward(longest, torch.device("cpu")):
            fisher = estimate_fisher(
                model, batches, num_grads=TEXTS // TEXTS_PER_GRAD,
                samples_per_grad=TEXTS_PER_GRAD, loss_fn=loss_fn,
            )  # fmt: skip
        found = []
        for sparsity in SPARSITIES:
            model.load_state_dict(dense)
            report = prune(model, sparsity=sparsity, fisher=fisher, calibration=held).report
            found.append((accuracy(model, test), report.settings["damping"]))
            print(name, label, sparsity, *found[-1], flush=True)
        model.load_state_dict(dense)
        result["rows"][label] = found
    return result


def markdown(document: dict) -> str:
    about = document["machine"]
    lines = [
        "# Gradients of labels, and of predictions at several temperatures",
        "",
        f"`{document['command']}` on {about['cpu']}, {about['threads']} threads, torch "
        f"{about['torch']}, {about['date']}.  Test accuracy in per cent of all-MiniLM-L6-v2 after "
        f"one shot from {TEXTS} texts in gradients of {TEXTS_PER_GRAD}, one seed; greedy "
        f"selection, joint update, damping chosen on 256 held-back texts.  T = 1000: as good "
        "as squared differences of logits.",
    ]
    for name, result in document["sets"].items():
        lines += ["", f"{name.upper()}, dense {100 * result['dense']:.1f}", ""]
        lines += header(["gradients of", *(f"{sparsity:.0%}" for sparsity in SPARSITIES)])
        for label, found in result["rows"].items():
            lines.append(row([label, *(f"{100 * share:.1f}" for share, _ in found)]))
    return "\n".join(lines) + "\n"


def main() -> None:
    settings = parse_arguments()
    document = {
        "command": shlex.join(["python", "benchmarks/temperature.py", *sys.argv[1:]]),
        "machine": machine(),
        "sets": {name: measure(name, settings) for name in settings.sets},
    }
    text = markdown(document)
    (RESULTS / "temperature.md").write_text(text, encoding="utf-8")
    (RESULTS / "temperature.json").write_text(json.dumps(document, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
