"""An error before any line of the package leaves model and pruner as they were."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from interrupts import differences, interrupt, lines_of, state_of
from tiny import TinyEncoder, batches
from torch import nn

from obert_kernels import (
    FisherConfig,
    Pruner,
    PruningConfig,
    estimate_fisher,
    prune,
    register_saliency,
)
from obert_kernels.fisher.gram import GramFisher
from obert_kernels.pruning.rollback import Rollback
from obert_kernels.pruning.saliencies import greedy
from obert_kernels.trials.grid import TrialLoop
from obert_kernels.trials.outcome import Scores

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
        rest = {"random": torch.get_rng_state(), "Ctrl-C": signal.getsignal(signal.SIGINT)}
        return state_of(self.model) | pruner | masks | scale | rest

    def __call__(self) -> object:
        return self.how(self)


def pruned(*arguments: Any, **options: Any) -> Callable[[Calls], object]:
    return lambda calls: prune(
        calls.model, DATA, *arguments, loss_fn=calls.loss, **{**SMALL, **options}
    )


def step_of_a_pruner(calls: Calls) -> object:
    assert calls.pruner is not None
    return calls.pruner.step(0.7, DATA)


def state_of_a_pruner(calls: Calls) -> object:
    assert calls.pruner is not None
    state = calls.pruner.state_dict()
    state["relative_damping"] = 0.5
    for mask in state["masks"].values():
        mask.fill_(True)
    return calls.pruner.load_state_dict(state)


def from_estimate(calls: Calls) -> object:
    fisher = estimate_fisher(calls.model, DATA, loss_fn=calls.loss, **SMALL)
    return prune(calls.model, sparsity=0.5, fisher=fisher, calibration=DATA[:2], loss_fn=calls.loss)


def failing(calls: Calls) -> object:
    """Ends in an error of its own, so that lines that put things back are interrupted, too."""

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "2/2 update":
            raise RuntimeError("a progress bar that fails")

    return pruned(0.5, damping=1e-3, steps=2, progress=progress)(calls)


def grid(calls: Calls) -> object:
    """Prunes and trains, and puts everything back even where it succeeds."""
    fisher = FisherConfig(num_grads=3, samples_per_grad=1, block_size=12)

    def recover(result: Any) -> None:
        calls.model.train()
        for parameter in calls.model.parameters():
            parameter.grad = torch.ones_like(parameter)
            parameter.data.add_(1)

    return TrialLoop(
        calls.model, lambda num_grads, group: DATA, lambda model: Scores(0.9, 0.3, 0.9),
        loss_fn=calls.loss, calibration=DATA[:1], recover=recover, one_damping=True,
    ).run([(PruningConfig(fisher=fisher), sparsity) for sparsity in (0.5, 0.25)])  # fmt: skip


CASES: dict[str, tuple[Callable[[Calls], object], bool]] = {
    "auto": (pruned(0.5, calibration=DATA[:2]), False),
    "groups": (pruned(0.5, samples_per_grad=2, calibration=DATA[:2]), False),
    "passes": (pruned(0.5, samples_per_grad=1, max_memory=9_000, calibration=DATA[:1]), False),
    "steps": (pruned(0.8, damping=1e-3, steps=2, scope="layer", max_memory=12_000), True),
    "2:4": (pruned(None, "2:4", damping=1e-3), False),
    "block4": (pruned(0.5, "block4", damping=1e-3, selection="diagonal"), True),
    "magnitude": (pruned(0.5, selection="magnitude"), False),
    "pruner": (step_of_a_pruner, False),
    "state": (state_of_a_pruner, False),
    "estimate": (from_estimate, False),
    "failing": (failing, False),
    "grid": (grid, True),
}


def prepared(case: str) -> Calls:
    how, sparse = CASES[case]
    calls = Calls(how, sparse)
    if case in ("pruner", "state"):
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
    """One point in fifteen; all of them with ``OBERT_EVERY_LINE=1``."""
    for line, hit in points(case)[:: 1 if os.environ.get("OBERT_EVERY_LINE") else 15]:
        check(case, line, hit, KeyboardInterrupt())


@pytest.mark.parametrize("case", CASES)
def test_an_interruption_before_some_lines_changes_nothing(case: str, one_thread: None) -> None:
    for line, hit in random.Random(case).sample(points(case), 6):
        check(case, line, hit, KeyboardInterrupt())


ERRORS = [MemoryError("no room"), GeneratorExit(), RuntimeError("broken"), SystemExit(1)]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["loss", "batches", "progress", "selection", "update"])
def test_whatever_somebody_elses_code_raises(
    place: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each at its third call, and at its very last."""

    def run(calls: Calls, stop_at: int | None) -> int:
        count = 0

        def here(at: str) -> None:
            nonlocal count
            count += at == place
            if count == stop_at:
                raise error

        def loss(model: nn.Module, batch: Any) -> torch.Tensor:
            here("loss")
            return calls.loss(model, batch)

        def data() -> Iterator[Any]:
            for batch in DATA:
                here("batches")
                yield batch

        @register_saliency("somebody's")
        def saliency(problem: Any) -> Any:
            here("selection")
            return greedy(problem)

        real = GramFisher.update

        def update(self: GramFisher, *arguments: Any) -> Any:
            here("update")
            return real(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(GramFisher, "update", update)
            prune(
                calls.model, data(), 0.5, loss_fn=loss, progress=lambda *_: here("progress"),
                calibration=DATA[:1], selection="somebody's", update="joint", steps=2, **SMALL,
            )  # fmt: skip
        return count

    last = run(Calls(pruned()), None)
    for stop_at in (min(3, last), last):
        calls = Calls(pruned())
        before = calls.state()
        with pytest.raises(type(error)):
            run(calls, stop_at)
        del before["random"]  # data that shuffle may draw from it
        after = {name: value for name, value in calls.state().items() if name != "random"}
        assert not differences(before, after)


def test_a_second_ctrl_c_waits_until_all_is_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """People press it twice."""
    real = Rollback._put_back

    def pressed_meanwhile(self: Rollback) -> None:
        signal.raise_signal(signal.SIGINT)
        real(self)

    monkeypatch.setattr(Rollback, "_put_back", pressed_meanwhile)
    calls = prepared("failing")
    before = calls.state()
    with pytest.raises(KeyboardInterrupt):
        calls()
    assert not differences(before, calls.state())


def test_work_in_another_thread_is_put_back_as_well() -> None:
    calls = prepared("failing")
    before = calls.state()
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="progress bar"):
        pool.submit(calls).result()
    assert not differences(before, calls.state())
