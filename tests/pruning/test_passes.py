"""A damping chosen in passes under a memory limit is the one chosen without a limit."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, train, unchanged

from obert_kernels import NumericalError, Pruner, PruningConfig, prune
from obert_kernels.fisher import memory
from obert_kernels.fisher.estimate import Estimation
from obert_kernels.fisher.gram import GramFisher
from obert_kernels.pruning.damping import choose_damping
from obert_kernels.pruning.step import PruningStep

OPTIONS = {"num_grads": 12, "block_size": 12}
pytestmark = pytest.mark.usefixtures("limits_are_of_the_fisher")


@pytest.fixture(scope="module")
def trained() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = TinyEncoder()
    train(model, batches(20), 10)
    # Matrices whose gradients differ in size, so that a part of them says little about all.
    with torch.no_grad():
        model.layer[0]["narrow"].weight.mul_(30)
        model.layer[1]["wide"].weight.mul_(0.02)
    return snapshot(model)


def pruned(state, *arguments, **options):
    model = TinyEncoder()
    model.load_state_dict(state)
    result = prune(model, batches(20), *arguments, **{**OPTIONS, **options})
    return model, result.report


@pytest.mark.parametrize(
    ("arguments", "options", "held"),
    [
        *(((0.6,), {}, held) for held in range(4)),
        ((0.6,), {"samples_per_grad": 2}, 3),
        ((0.6, "block4"), {"update": "sum", "selection": "diagonal"}, 3),
        ((0.6,), {"scope": "layer"}, 3),
        ((0.6,), {"scope": "layer"}, 0),
        ((0.6,), {"update": "none"}, 2),
        (({"layer.0.wide": 0.7, "layer.0.narrow": 0.0, "re:layer.1": 0.4},), {}, 3),
        ((None, "2:4"), {}, 2),
        ((0.75,), {"steps": 2}, 3),
    ],
)
def test_the_same_with_and_without_a_limit(trained, arguments, options, held, monkeypatch):
    monkeypatch.setattr(memory, "_MOST_TRIALS", held)
    whole, expected = pruned(trained, *arguments, **options)
    assert expected.memory["passes"] == 1
    model, report = pruned(trained, *arguments, max_memory=60_000, **options)
    assert report.memory["passes"] > 1
    assert [t._asdict() for t in report.damping_trials] == [
        t._asdict() for t in expected.damping_trials
    ]
    assert report.settings == expected.settings
    assert report.layers == expected.layers and report.notes == expected.notes
    assert unchanged(model, snapshot(whole))


def test_a_part_of_the_matrices_would_have_chosen_another(trained):
    """So that the test above can fail."""
    _, expected = pruned(trained, 0.6)
    _, first = pruned(trained, 0.6, params="layer.0.wide")
    assert first.settings["damping"] != pytest.approx(expected.settings["damping"], rel=0.1)
    assert first.damping_trials[0].damping != pytest.approx(
        expected.damping_trials[0].damping, rel=0.1
    )


def test_a_search_goes_on_where_the_step_before_ended_in_passes_too(trained):
    found = []
    for max_memory in (None, 60_000):
        model = TinyEncoder()
        model.load_state_dict(trained)
        config = PruningConfig(fisher=dataclasses.replace(PruningConfig().fisher, **OPTIONS))
        pruner = Pruner(model, config, max_memory=max_memory)
        for sparsity in (0.4, 0.7):
            pruner.step(sparsity, batches(20))
        found.append((snapshot(model), pruner.report()))
    (whole, expected), (split, report) = found
    assert report.memory["passes"] > 1 == expected.memory["passes"]
    assert report.damping_trials == expected.damping_trials
    assert all(torch.equal(whole[name], split[name]) for name in whole)


@pytest.mark.parametrize(("scope", "per_round"), [("global", 6), ("layer", 3)])
def test_what_the_choice_costs(trained, scope, per_round, monkeypatch):
    """P passes for the scale; then each round of trials goes on where the last one ended, and
    nothing is left to do after the last."""
    estimates = []
    real = Estimation.accumulate

    def counted(self, weights, *arguments, **options):
        estimates.append(list(weights))
        return real(self, weights, *arguments, **options)

    monkeypatch.setattr(Estimation, "accumulate", counted)
    options = {"scope": scope, "max_memory": 60_000}
    _, report = pruned(trained, 0.6, damping=1e-6, **options)
    assert report.memory["passes"] == 4
    assert len(estimates) == (7 if scope == "global" else 4)
    estimates.clear()
    _, report = pruned(trained, 0.6, **options)
    rounds, rest = divmod(len(estimates) - 4, per_round)
    assert rest == 0 and rounds < len(report.damping_trials)
    for before, after in itertools.pairwise(estimates):
        assert before != after, "what is at hand is not estimated again"


def test_trials_that_break_down_take_no_others_with_them(trained, monkeypatch):
    _, plain = pruned(trained, 0.6)
    least = plain.settings["damping"] * 1.1
    real = GramFisher.greedy_scores

    def scores(self, weight, keep, damping, group_size=1):
        if damping < least and "layer.1.wide" in self.name:
            raise NumericalError("layer.1.wide.weight: block 0 is not positive definite", 0)
        return real(self, weight, keep, damping, group_size)

    monkeypatch.setattr(GramFisher, "greedy_scores", scores)
    _, expected = pruned(trained, 0.6)
    _, report = pruned(trained, 0.6, max_memory=60_000)
    assert report.memory["passes"] > 1
    assert float("inf") in [trial.cost for trial in expected.damping_trials]
    assert report.damping_trials == expected.damping_trials


def test_no_damping_will_do(trained, monkeypatch):
    def score(self, fishers, damping):
        raise NumericalError("layer.9: block 3 is not positive definite", 3)

    monkeypatch.setattr(PruningStep, "score", score)
    with pytest.raises(NumericalError, match=r"layer\.9: block 3"):
        pruned(trained, 0.6, max_memory=60_000)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4])
@pytest.mark.parametrize("at", [1e-6, 2e-4, 1e-2, 0.5, 80.0])
def test_what_is_prepared_together_changes_no_search(at, at_once):
    def change_after(damping):
        if damping < 1e-5:
            raise NumericalError("broken")
        return abs(torch.log10(torch.tensor(damping / at)).item()), None

    def prepare(dampings):
        assert 1 <= len(dampings) <= at_once
        rounds.append(dampings)

    rounds: list[list[float]] = []
    for start in (None, 1e-6, 30.0):
        expected = choose_damping(1.0, change_after, print, start)
        rounds.clear()
        found = choose_damping(1.0, change_after, print, start, at_once=at_once, prepare=prepare)
        assert found == expected
        tried = {trial.damping for trial in expected[1]}
        assert tried <= {damping for one in rounds for damping in one}
        assert sum(map(len, rounds)) <= len(tried) + at_once, "few are made in vain"
