"""Whole prunings on the device, gradients included, against oBERT's published procedure in torch.

BERT models of two sizes with random weights and random texts: times do not depend on what a model
has learnt.  Both sides take the same gradients, of the labels' loss; ours by one backward pass for
many of them, and none fits the remaining weights afterwards.  The reference and ours with its rules
(diagonal scores, sum update) must prune the same weights.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.kernels.gpu.timer import Deadline, Timer
from benchmarks.kernels.gpu.validation import Mismatch
from benchmarks.support.contender import prune_as_reference
from obert_kernels import find_weights, model_loss, prune

Row = dict[str, Any]
Batch = dict[str, Tensor]
REFERENCE = "reference"
SAME_RULES = "ours, its rules"
DEFAULT = "ours, greedy and joint"
OURS = (SAME_RULES, DEFAULT)
SPARSITY = 0.8
DAMPING = 1e-7
WARM_UP = 16  # gradients
# The reference works in float32: of weights whose scores nearly tie it takes others, and single
# entries of its inverses are off by up to 5e-4 (benchmarks/results/numerics).
LEAST_AGREEMENT = 0.999
LARGEST_UPDATE_ERROR = 1e-2


@dataclass(frozen=True)
class Model:
    """The size of a BERT classifier."""

    name: str
    layers: int
    hidden: int
    heads: int
    vocabulary: int = 30522

    def build(self, device: torch.device) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=self.vocabulary, hidden_size=self.hidden, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, intermediate_size=4 * self.hidden, num_labels=2,
        )  # fmt: skip
        return BertForSequenceClassification(config).to(device).eval()


@dataclass(frozen=True)
class Work:
    """What is pruned and on how many texts."""

    models: tuple[Model, ...] = (Model("MiniLM", 6, 384, 12), Model("BERT base", 12, 768, 12))
    gradients: int = 256
    texts_per_gradient: int = 16
    tokens: int = 64  # of a text
    texts_at_once: int = 256  # of ours; a multiple of those of a gradient
    rounds: int = 3

    def batches(
        self, model: Model, device: torch.device, texts: int, gradients: int
    ) -> list[Batch]:
        """All texts in batches; the same whatever the size of a batch."""
        torch.manual_seed(1)
        count = gradients * self.texts_per_gradient
        tokens = torch.randint(model.vocabulary, (count, self.tokens)).to(device)
        labels = torch.randint(2, (count,)).to(device)
        split = zip(tokens.split(texts), labels.split(texts), strict=True)
        return [
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": classes}
            for ids, classes in split
        ]


def reason_to_leave_out() -> str | None:
    """Why no model can be made here, or None."""
    return None if find_spec("transformers") else "transformers is not installed"


def contenders(
    model: nn.Module, size: Model, work: Work, gradients: int, device: torch.device
) -> dict[str, Callable[[], object]]:
    """What prunes the model in place, with the data that it needs."""
    one_by_one = work.batches(size, device, work.texts_per_gradient, gradients)
    together = work.batches(size, device, work.texts_at_once, gradients)

    def ours(**rules: Any) -> object:
        return prune(
            model, together, SPARSITY, num_grads=gradients, damping=DAMPING, loss_fn=model_loss,
            samples_per_grad=work.texts_per_gradient, reconstruction=None, **rules,
        )  # fmt: skip

    return {
        REFERENCE: lambda: prune_as_reference(model, one_by_one, model_loss, SPARSITY, DAMPING),
        SAME_RULES: lambda: ours(selection="diagonal", update="sum"),
        DEFAULT: lambda: ours(selection="greedy", update="joint"),
    }


def agreement(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], dense: dict[str, Tensor]
) -> tuple[float, float]:
    """Share of the weights that both prune or both keep; and how far the changes of those that both
    keep are apart, relative to the changes."""
    same, apart, changed = 0, 0.0, 0.0
    for name, weight in ours.items():
        other = theirs[name]
        same += int(((weight == 0) == (other == 0)).sum())
        kept = (weight != 0) & (other != 0)
        apart += float((weight - other)[kept].double().square().sum())
        changed += float((other - dense[name])[kept].double().square().sum())
    count = sum(weight.numel() for weight in ours.values())
    return same / count, math.sqrt(apart / changed) if changed else math.inf


class PrunedAgainAndAgain:
    """Prunes one model by turns, from the same weights each time."""

    def __init__(self, size: Model, work: Work, timer: Timer) -> None:
        self.size, self.work, self.timer = size, work, timer
        self.model = size.build(timer.device)
        self.weights = find_weights(self.model)
        self.dense = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.refused: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {}
        self.peak_gib: dict[str, float] = {}
        self.agreement: float | None = None
        self.update_error: float | None = None

    def turn(self, gradients: int, keep: bool) -> float:
        """Let each contender prune once; return the seconds that took.

        Args:
            gradients: their number.
            keep: whether the times count.

        Raises:
            Mismatch: ours does not prune what the reference prunes, or anything is not finite.
        """
        calls = contenders(self.model, self.size, self.work, gradients, self.timer.device)
        pruned: dict[str, dict[str, Tensor]] = {}
        spent = 0.0
        for name, call in calls.items():
            if name in self.refused:
                continue
            self.restore()
            try:
                seconds, peak = self.timer.once(name, call)
            except torch.OutOfMemoryError:
                self.refused[name] = "out of memory"
                continue
            finally:
                self.model.zero_grad(set_to_none=True)
            spent += seconds
            if keep:
                self.seconds.setdefault(name, []).append(seconds)
                self.peak_gib[name] = max(self.peak_gib.get(name, 0.0), peak / 2**30)
            pruned[name] = {name: w.detach().clone() for name, w in self.weights.items()}
        self.compare(pruned)
        return spent

    def restore(self) -> None:
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(self.dense[name])

    def compare(self, pruned: dict[str, dict[str, Tensor]]) -> None:
        for name, weights in pruned.items():
            if not all(bool(weight.isfinite().all()) for weight in weights.values()):
                raise Mismatch(f"{self.size.name}: {name} left weights that are not finite")
        if REFERENCE in pruned and SAME_RULES in pruned:
            share, error = agreement(pruned[SAME_RULES], pruned[REFERENCE], self.dense)
            self.agreement, self.update_error = share, error
            if share < LEAST_AGREEMENT or error > LARGEST_UPDATE_ERROR:
                raise Mismatch(
                    f"{self.size.name}: {share:.2%} of the weights are pruned or kept as the "
                    f"reference does, at least {LEAST_AGREEMENT:.1%} are wanted; updates differ "
                    f"by {error:.1e}, at most {LARGEST_UPDATE_ERROR:g} is wanted"
                )

    def row(self) -> Row:
        """Medians so far."""
        medians = {name: statistics.median(times) for name, times in self.seconds.items()}
        theirs = medians.get(REFERENCE)
        return {
            "model": self.size.name,
            "weights": sum(weight.numel() for weight in self.weights.values()),
            "gradients": self.work.gradients,
            "texts_per_gradient": self.work.texts_per_gradient,
            "tokens": self.work.tokens,
            "rounds": len(self.seconds[SAME_RULES]),
            "seconds": medians,
            "all_seconds": self.seconds,
            "peak_gib": self.peak_gib,
            "ratios": {name: theirs / medians[name] for name in OURS} if theirs else {},
            "agreement": self.agreement,
            "update_error": self.update_error,
            "refused": self.refused,
        }


def measure_model(size: Model, work: Work, timer: Timer, deadline: Deadline) -> Iterator[Row]:
    """A row after each round, of all rounds so far; none where the time is too short.

    Few gradients come first: they say how long a round may take, and whether the results agree.
    """
    prunings = PrunedAgainAndAgain(size, work, timer)
    few = min(WARM_UP, work.gradients)
    longest = prunings.turn(few, keep=False) * work.gradients / few
    for _ in range(work.rounds):
        if not deadline.allows(longest):
            return
        longest = prunings.turn(work.gradients, keep=True)
        yield prunings.row()


HEADER = (
    "| model | weights | gradients x texts | rounds | reference s | its rules s | "
    "greedy and joint s | times faster | peak GiB |\n|---|---|---|---|---|---|---|---|---|"
)


def table_row(row: Row) -> str:
    """Reference, ours with its rules, ours with the default rules."""
    names = (REFERENCE, *OURS)
    seconds = [
        f"{row['seconds'][name]:.3g}" if name in row["seconds"] else row["refused"].get(name, "")
        for name in names
    ]
    ratios = ", ".join(f"{ratio:.1f}x" for ratio in row["ratios"].values())
    peaks = ", ".join(f"{row['peak_gib'][name]:.1f}" for name in names if name in row["peak_gib"])
    return (
        f"| {row['model']} | {row['weights'] / 1e6:.1f} M | {row['gradients']} x "
        f"{row['texts_per_gradient']} | {row['rounds']} | {' | '.join(seconds)} | {ratios} | "
        f"{peaks} |"
    )
