"""One step against sub-steps with fresh gradients; living rows against refilled blocks.

    python benchmarks/recomputation.py MODEL      # a MiniLM fine-tuned on MR; hours on two cores

One step takes as many gradients as four sub-steps together, of the same texts.  (Of more texts than
there are, each comes several times, in other gradients.)  results/recomputation.md was made when
4,096 texts in all were given: ``--gradients 64 --texts-per-grad 16`` and ``--gradients 256
--texts-per-grad 4`` today.
"gram" holds the living weights of every block where they were; "refilled" gathers the living
weights of a matrix and cuts them into full blocks anew.  The damping is chosen in every sub-step
on held-back texts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from itertools import product
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from benchmarks.support.machine import machine
from obert_kernels import prune
from obert_kernels.tasks.batches import calibration_batches, tokens_at_once
from obert_kernels.tasks.demo_sets import load_demo_set
from obert_kernels.tasks.evaluate import accuracy
from obert_kernels.tasks.loaders import make_loader
from obert_kernels.tasks.precision import prediction_text_loss

RESULTS = Path(__file__).parents[1] / "results"
MAX_LENGTH = 96
RUNS = {
    "one step": ("gram", "geometric", 1),
    "geometric": ("gram", "geometric", 4),
    "linear": ("gram", "linear", 4),
    "refilled": ("refilled", "geometric", 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--gradients", type=int, nargs="+", default=[64, 256], help="a sub-step")
    parser.add_argument("--texts-per-grad", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--name", default="recomputation", help="file name under results/")
    args = parser.parse_args()
    data = load_demo_set("mr")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForSequenceClassification.from_pretrained(args.model)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"max_length": MAX_LENGTH}
    test = make_loader(tokenizer, data.test, 64, by_length=True, **options)
    held = make_loader(tokenizer, data.dev, 64, **options)
    calibration = [batch for batch, _ in zip(held, range(4), strict=False)]
    about, rows = machine(), []
    about["dense"] = f"{accuracy(model, test):.4f}"
    for seed in args.seeds:
        for g, in_quarter in product(args.texts_per_grad, args.gradients):
            for estimator, schedule, steps in map(RUNS.__getitem__, args.runs):
                num_grads = in_quarter * 4 // steps
                batches = calibration_batches(
                    tokenizer, data.train, num_grads, g, steps=steps, seed=seed,
                    max_tokens=tokens_at_once(model.config.hidden_size), **options,
                )  # fmt: skip
                for sparsity in args.sparsity:
                    model.load_state_dict(dense)
                    report = prune(
                        model, batches, sparsity, num_grads=num_grads, samples_per_grad=g,
                        steps=steps, schedule=schedule, estimator=estimator,
                        calibration=calibration, loss_fn=prediction_text_loss,
                    ).report  # fmt: skip
                    rows.append({
                        "seed": seed, "texts_per_grad": g, "estimator": estimator, "steps": steps,
                        "schedule": schedule if steps > 1 else "", "num_grads": num_grads,
                        "sparsity": sparsity,
                        "accuracy": accuracy(model, test),
                        "damping": [
                            min((t for t in report.damping_trials if t.step == step),
                                key=lambda t: t.cost).relative
                            for step in range(1, steps + 1)
                        ],
                    })  # fmt: skip
                    print(rows[-1], flush=True)
    command = shlex.join(["python", "benchmarks/recomputation.py", *sys.argv[1:]])
    document = {"command": command, "machine": about, "rows": rows}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (RESULTS / f"{args.name}.md").write_text(markdown(command, about, rows, args))


def markdown(command: str, about: dict, rows: list[dict], args: argparse.Namespace) -> str:
    lines = [
        "# Sub-steps with fresh gradients",
        "",
        f"`{command}` on {about['cpu']}, {about['threads']} threads, torch {about['torch']}, "
        f"{about['date']}.  MiniLM-L6 on MR, dense {float(about['dense']):.1%}, "
        "gradients of predictions, greedy selection, joint update, damping chosen in every "
        f"sub-step; seeds of the texts {', '.join(map(str, args.seeds))}, one model: accuracy is "
        "mean ± standard deviation, then by seed.  Dampings, of the first seed, are relative to "
        "the mean diagonal of the Fisher.",
        "",
        "| texts per gradient | Fisher | sub-steps | gradients in each | texts in all | sparsity | "
        "accuracy | by seed | dampings |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for first in (row for row in rows if row["seed"] == args.seeds[0]):
        same = ("texts_per_grad", "num_grads", "estimator", "steps", "schedule", "sparsity")
        values = [
            100 * row["accuracy"] for row in rows if all(row[key] == first[key] for key in same)
        ]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        steps = f"{first['steps']} {first['schedule']}".strip()
        lines.append(
            f"| {first['texts_per_grad']} | {first['estimator']} | {steps} | {first['num_grads']} "
            f"| {first['num_grads'] * first['steps'] * first['texts_per_grad']} "
            f"| {first['sparsity']:.0%} | {statistics.mean(values):.1f}{spread} | "
            f"{', '.join(f'{value:.1f}' for value in values)} | "
            f"{', '.join(f'{value:.0e}' for value in first['damping'])} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
