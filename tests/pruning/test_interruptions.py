"""An error before any line of the package leaves model and pruner as they were."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from interrupts import differences, interrupt, lines_of, state_of
from tiny import TinyEncoder, batches
from torch import nn

from obert_kernels import FisherConfig, Pruner, PruningConfig, estimate_fisher, prune

DATA = batches(6, 3)
SMALL = {"num_grads": 3, "block_size": 12}


class Calls:
    """A model in training, and a call that prunes it."""

    def __init__(self, how: Callable[[nn.Module], object], sparse: bool = False) -> None:
        torch.manual_seed(0)
        self.model = TinyEncoder(4).train()
        self.model.layer[1].eval()  # modes differ
        self.model.embedding.weight.requires_grad_(False)
        first = self.model.layer[0]["wide"].weight
        first.grad = torch.ones_like(first)
        first.register_hook(torch.abs)
        self.model.head.register_forward_hook(lambda module, args, output: None)
        if sparse:
            with torch.no_grad():
                first[:, :3] = 0
        # A leaf that the loss needs and the model does not have.
        self.scale = torch.ones((), requires_grad=True)
        self.scale.grad = torch.ones(())
        self.pruner: Pruner | None = None
        self.how = how

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model(**batch)["loss"] * self.scale

    def state(self) -> dict[str, Any]:
        pruner = {} if self.pruner is None else {
            "masks": {name: mask.clone() for name, mask in self.pruner.masks.items()},
            "history": list(self.pruner._history),
            "relative damping": self.pruner._relative_damping,
        }  # fmt: skip
        masks = pruner.pop("masks", {})
        scale = {"scale": self.scale.requires_grad, "scale grad": self.scale.grad}
        random_state = {"random": torch.get_rng_state()}
        return state_of(self.model) | pruner | masks | scale | random_state

    def __call__(self) -> object:
        return self.how(self)


def pruned(*arguments: Any, **options: Any) -> Callable[[Calls], object]:
    return lambda calls: prune(
        calls.model, DATA, *arguments, loss_fn=calls.loss, **{**SMALL, **options}
    )


def step_of_a_pruner(calls: Calls) -> object:
    if calls.pruner is None:
        return None
    return calls.pruner.step(0.7, DATA)


def from_estimate(calls: Calls) -> object:
    fisher = estimate_fisher(calls.model, DATA, loss_fn=calls.loss, **SMALL)
    return prune(calls.model, sparsity=0.5, fisher=fisher, calibration=DATA[:2], loss_fn=calls.loss)


def failing(calls: Calls) -> object:
    """Ends in an error of its own, so that lines that put things back are interrupted, too."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "2/2 update":
            raise RuntimeError("a progress bar that fails")

    return pruned(0.5, damping=1e-3, steps=2, progress=progress)(calls)


CASES: dict[str, tuple[Callable[[Calls], object], bool]] = {
    "auto": (pruned(0.5, calibration=DATA[:2]), False),
    "groups": (pruned(0.5, samples_per_grad=2, calibration=DATA[:2]), False),
    "passes": (pruned(0.5, samples_per_grad=1, max_memory=9_000, calibration=DATA[:1]), False),
    "steps": (pruned(0.8, damping=1e-3, steps=2, scope="layer", max_memory=12_000), True),
    "2:4": (pruned(None, "2:4", damping=1e-3), False),
    "block4": (pruned(0.5, "block4", damping=1e-3, selection="diagonal"), True),
    "magnitude": (pruned(0.5, selection="magnitude"), False),
    "pruner": (step_of_a_pruner, False),
    "estimate": (from_estimate, False),
    "failing": (failing, False),
}


def prepared(case: str) -> Calls:
    how, sparse = CASES[case]
    calls = Calls(how, sparse)
    if case == "pruner":
        fisher = FisherConfig(**SMALL)
        calls.pruner = Pruner(calls.model, PruningConfig(fisher=fisher), loss_fn=calls.loss)
        calls.pruner.step(0.4, DATA)
    return calls


def points(case: str) -> list[tuple[tuple[str, int], int]]:
    """Every line that runs, its first time; and some later time of those that run again."""
    chance = random.Random(0)
    found = []
    for line, count in lines_of(prepared(case)).items():
        found.append((line, 1))
        if count > 1:
            found.append((line, chance.randint(2, count)))
    return found


def check(case: str, line: tuple[str, int], hit: int, error: BaseException) -> None:
    calls = prepared(case)
    before = calls.state()
    came_out = interrupt(calls, line, hit, error)
    after = calls.state()
    where = f"{case}: {type(error).__name__} at time {hit} of {line[0]}:{line[1]}"
    assert came_out, f"{where} was lost"
    assert not differences(before, after), where


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_interruption_before_any_line_changes_nothing(case: str, one_thread: None) -> None:
    for line, hit in points(case):
        check(case, line, hit, KeyboardInterrupt())


@pytest.mark.parametrize("case", CASES)
def test_an_interruption_before_some_lines_changes_nothing(case: str, one_thread: None) -> None:
    for line, hit in random.Random(case).sample(points(case), 12):
        check(case, line, hit, KeyboardInterrupt())
