"""The reconstruction of a whole encoder: seconds of its parts, and of the same written out plainly.

    python -m benchmarks.kernels.encoder_fit      # some minutes on 2 cores

Random weights of a BERT's shapes and random texts; masks at random, the same share in each matrix.
Ours chooses a ridge for each layer among four on held-back texts; the plain way is given one, sees
no held-back texts, and runs once.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.support.plain_reconstruction import reconstruct_plainly
from benchmarks.support.report import made_by, new_document, table, write
from obert_kernels import ReconstructionConfig, find_weights
from obert_kernels.gradients.losses import default_loss
from obert_kernels.reconstruction import fit, stage
from obert_kernels.reconstruction.moments import Moments

SHAPES = {"MiniLM-L6": (384, 6, 12), "BERT-base": (768, 12, 12)}
SETTLE = 0.3
BATCH = 64


def bert(shape: str) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    width, layers, heads = SHAPES[shape]
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=4 * width,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def texts(count: int, length: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1000, 30000, (count, length), generator=generator)
    return [
        {"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(BATCH)
    ]


class Parts:
    """Seconds inside some functions, while the block lasts."""

    PLACES = (
        ("moments", Moments, "add"),
        ("systems", fit, "fit_on_masks"),
    )

    def __init__(self) -> None:
        self.seconds = dict.fromkeys((name for name, _, _ in self.PLACES), 0.0)

    def __enter__(self) -> Parts:
        self._real = [(owner, name, getattr(owner, name)) for _, owner, name in self.PLACES]
        for (part, owner, name), (_, _, real) in zip(self.PLACES, self._real, strict=True):
            setattr(owner, name, self._timed(part, real))
        return self

    def __exit__(self, *error: object) -> None:
        for owner, name, real in self._real:
            setattr(owner, name, real)

    def _timed(self, part: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return real(*args)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return timed


def pruned(dense: nn.Module, sparsity: float) -> tuple[nn.Module, dict[str, Tensor]]:
    model = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(1)
    masks = {}
    with torch.no_grad():
        for name, weight in find_weights(model).items():
            masks[name] = torch.rand(weight.shape, generator=generator) >= sparsity
            weight.mul_(masks[name])
    return model, masks


def measure(shape: str, sparsity: float, config: Mapping[str, Any]) -> dict[str, Any]:
    dense = bert(shape)
    weights = find_weights(dense)
    before = {**weights, **stage.biases_of(dense, weights)}
    values = {name: value.detach().clone() for name, value in before.items()}
    data = texts(config["texts"], config["length"], 0)
    held = texts(config["texts"] // 4, config["length"], 2)
    found: dict[str, list[float]] = {}
    parts: list[dict[str, float]] = []

    def ours() -> None:
        model, masks = pruned(dense, sparsity)
        with Parts() as timed:
            start = time.perf_counter()
            stage.reconstruct(
                model, find_weights(model), masks, values, data, held, default_loss,
                ReconstructionConfig(num_samples=config["texts"]), lambda *told: None,
            )  # fmt: skip
            found.setdefault("ours", []).append(time.perf_counter() - start)
        parts.append(timed.seconds)

    def plain() -> None:
        model, masks = pruned(dense, sparsity)
        start = time.perf_counter()
        reconstruct_plainly(dense, model, masks, data, 0.1)
        found.setdefault("plain", []).append(time.perf_counter() - start)

    ways = [ours] if shape in config["no_plain"] else [ours, plain]
    for _ in range(config["rounds"]):
        for way in ways:
            time.sleep(SETTLE)
            way()
    median = {way: statistics.median(seconds) for way, seconds in found.items()}
    row: dict[str, Any] = {"shape": shape, "sparsity": sparsity, "ours_s": median["ours"]}
    for part in parts[0]:
        row[f"{part}_s"] = statistics.median(seconds[part] for seconds in parts)
    row["rest_s"] = row["ours_s"] - row["moments_s"] - row["systems_s"]
    if "plain" in median:
        row |= {"plain_s": median["plain"], "ratio": median["plain"] / median["ours"]}
    return {**row, "rounds": found}


def markdown(document: Mapping[str, Any]) -> str:
    config = document["config"]
    rows = [
        (
            row["shape"], f"{row['sparsity']:.0%}", f"{row['ours_s']:.1f}", f"{row['rest_s']:.1f}",
            f"{row['moments_s']:.1f}", f"{row['systems_s']:.1f}",
            f"{row['plain_s']:.0f}" if "plain_s" in row else "-",
            f"{row['ratio']:.1f}x" if "ratio" in row else "-",
        )
        for row in document["outcomes"]
    ]  # fmt: skip
    head = (
        f"# Reconstruction of an encoder\n\n{made_by(document)[0]}.  {config['texts']} texts of "
        f"{config['length']} tokens, a quarter as many held back; medians of {config['rounds']} "
        "rounds, alternated.  systems: the rows' least squares, for four ridges on some rows and "
        "one on all; the rest: forward passes of the dense and of the pruned model, mostly.\n"
    )
    columns = ("shape", "sparsity", "ours s", "the rest", "moments", "systems", "plain s", "ratio")
    return "\n".join([head, *table(columns, rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.8, 0.9])
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--length", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-plain", nargs="*", default=["BERT-base"], choices=SHAPES)
    config = vars(parser.parse_args())
    document = new_document("encoder_fit", config)
    for shape in config["shape"]:
        for sparsity in config["sparsity"]:
            document["outcomes"].append(measure(shape, sparsity, config))
            print(document["outcomes"][-1], flush=True)
    print(f"wrote {write(document, markdown)}\n{markdown(document)}")


if __name__ == "__main__":
    main()
