"""Tiny models and batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from obert_kernels import FisherConfig, PruningConfig
from obert_kernels.trials.outcome import Outcome

GREEDY = PruningConfig(
    damping=1e-3, fisher=FisherConfig(num_grads=4, samples_per_grad=2, block_size=8)
)


class TinyEncoder(nn.Module):
    """Two numbered layers, an embedding and a head: the shape of a BERT, 700 weights."""

    def __init__(self, width: int = 12, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, width)
        self.layer = nn.ModuleList(
            nn.ModuleDict(
                {"wide": nn.Linear(width, 2 * width), "narrow": nn.Linear(2 * width, width)}
            )
            for _ in range(2)
        )
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(width, 3)
        self.to(dtype)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor | None = None) -> dict:
        x = self.embedding(tokens)
        for layer in self.layer:
            x = x + layer["narrow"](torch.relu(layer["wide"](x)))
        logits = self.head(self.dropout(x).mean(dim=1))
        if labels is None:
            return {"logits": logits}
        return {"logits": logits, "loss": nn.functional.cross_entropy(logits, labels)}


def batches(count: int = 24, size: int = 4) -> list[dict[str, torch.Tensor]]:
    """A task that can be learnt: which third of the vocabulary is most frequent."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(count):
        tokens = torch.randint(0, 20, (size, 6), generator=generator)
        thirds = nn.functional.one_hot(tokens // 7, 3).sum(dim=1)
        result.append({"tokens": tokens, "labels": thirds.argmax(dim=1)})
    return result


def train(model: nn.Module, data: list[dict[str, torch.Tensor]], epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for batch in data * epochs:
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class FakeClock:
    """Seconds that only pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def outcome(config: PruningConfig = GREEDY, target: float = 0.5, **figures: Any) -> Outcome:
    given = {"sparsity": target, "dev_accuracy": 0.9, "dev_loss": 0.3, "test_accuracy": 0.8}
    return Outcome(config, target, **{**given, **figures})
