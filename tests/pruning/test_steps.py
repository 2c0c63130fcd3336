"""Pruning in sub-steps: targets, fresh gradients, living weights alone, nothing lost."""

import itertools

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, train, unchanged

from obert_kernels import LayerReport, estimate_fisher, find_weights, prune, register_saliency
from obert_kernels.fisher.estimate import Estimation
from obert_kernels.fisher.living import LiveFisher
from obert_kernels.pruning import prunings
from obert_kernels.pruning.damping import choose_damping
from obert_kernels.pruning.predictions import divergence, predict
from obert_kernels.sparsity.schedules import sub_targets


def test_linear_takes_equal_numbers_and_geometric_equal_shares():
    assert sub_targets(0.0, 0.8, 4, "linear") == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert sub_targets(0.5, 0.9, 2, "linear") == pytest.approx([0.7, 0.9])
    left = [1 - s for s in [0.2, *sub_targets(0.2, 0.9, 5, "geometric")]]
    shares = [b / a for a, b in itertools.pairwise(left)]
    assert shares == pytest.approx([shares[0]] * 5)
    for schedule in ("linear", "geometric"):
        assert sub_targets(0.1, 0.7, 3, schedule)[-1] == 0.7
        assert sub_targets(0.0, 0.7, 1, schedule) == [0.7]
        assert sub_targets(0.0, 1.0, 2, schedule) == [0.5, 1.0]
        assert sub_targets(0.8, 0.7, 2, schedule) == [0.7, 0.7]


def test_bad_steps_are_refused_before_the_work():
    model = TinyEncoder()
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        prune(model, batches(), steps=0)
    with pytest.raises(ValueError, match="schedule must be 'linear' or 'geometric'"):
        prune(model, batches(), steps=2, schedule="cubic")


class Seen:
    """Batches that note which of them were looked at."""

    def __init__(self, data):
        self.data, self.taken = data, []

    def __iter__(self):
        for index, batch in enumerate(self.data):
            self.taken.append(index)
            yield batch


@pytest.mark.usefixtures("limits_are_of_the_fisher")
@pytest.mark.parametrize("samples_per_grad", [None, 2])
@pytest.mark.parametrize("max_memory", [None, 100_000])
def test_every_step_sees_fresh_batches(samples_per_grad, max_memory):
    data = Seen(batches(30, 4))
    per_batch = 1 if samples_per_grad is None else 2
    result = prune(
        TinyEncoder(), data, 0.7, num_grads=8 * per_batch, samples_per_grad=samples_per_grad,
        steps=3, damping=1e-4, block_size=20, max_memory=max_memory,
    )  # fmt: skip
    assert (result.report.memory["passes"] > 1) == (max_memory is not None)
    assert [i for i in data.taken if i > 0] == list(range(1, 24))
    assert result.report.sparsity == pytest.approx(0.7, abs=0.01)
    assert not result.report.notes


def test_batches_that_serve_twice_are_noted():
    result = prune(TinyEncoder(), batches(10), 0.5, num_grads=8, steps=2, damping=1e-4)
    assert result.report.notes == [
        "16 gradients were taken from 10 batches, gone through 1.6 times"
    ]


def test_later_steps_hold_the_living_weights_alone(monkeypatch):
    kinds = []
    real = Estimation.accumulate

    def watched(*args, **kwargs):
        found = real(*args, **kwargs)
        kinds.append(found)
        return found

    monkeypatch.setattr(Estimation, "accumulate", watched)
    model = TinyEncoder()
    result = prune(model, batches(), 0.9, num_grads=8, steps=3, damping=1e-4)
    first, *later = kinds
    assert not any(isinstance(f, LiveFisher) for f in first.values())
    assert all(isinstance(f, LiveFisher) for found in later for f in found.values())
    size = [sum(f.num_bytes for f in found.values()) for found in kinds]
    assert size[0] > 2 * size[1] > 4 * size[2]
    for layer in result.report.layers:
        assert isinstance(layer, LayerReport)
        assert layer.predicted_increase > 0
    for name, weight in find_weights(model).items():
        assert torch.equal(weight != 0, result.masks[name])


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("pattern", ["unstructured", "block4", "block4x1"])
def test_exact_counts_with_every_pattern(scope, pattern):
    model = TinyEncoder()
    result = prune(
        model, batches(), 0.75, pattern, num_grads=8, steps=2, damping=1e-4, scope=scope,
        block_size=10,
    )  # fmt: skip
    assert result.report.sparsity == 0.75
    if scope == "layer":
        assert {layer.sparsity for layer in result.report.layers} == {0.75}


def test_damping_is_chosen_in_every_step(monkeypatch):
    starts = []

    def noted(scale, change_after, tried, start, **options):
        starts.append(start)
        return choose_damping(scale, change_after, tried, start, **options)

    monkeypatch.setattr(prunings, "choose_damping", noted)
    model, data = TinyEncoder(), batches(40)
    train(model, data, 5)
    report = prune(model, data, 0.8, num_grads=12, steps=2).report
    by_step = {step: [t for t in report.damping_trials if t.step == step] for step in (1, 2)}
    best = [min(trials, key=lambda t: t.cost) for trials in by_step.values()]
    assert report.settings["damping"] == best[1].damping
    assert starts == [None, best[0].relative], "the second search begins where the first ended"
    assert str(report).count("by divergence after trials") == 2


@pytest.mark.parametrize("at", [1, 2])
def test_a_failure_in_any_step_leaves_the_model_as_it_was(monkeypatch, at):
    model = TinyEncoder()
    before = snapshot(model)
    calls = []
    real = Estimation.accumulate

    def failing(*args, **kwargs):
        calls.append(0)
        if len(calls) > at:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(Estimation, "accumulate", failing)
    with pytest.raises(KeyboardInterrupt):
        prune(model, batches(), 0.9, num_grads=8, steps=3, damping=1e-4)
    assert unchanged(model, before)


def test_a_fisher_serves_one_step():
    model = TinyEncoder()
    fisher = estimate_fisher(model, batches(), num_grads=8)
    with pytest.raises(ValueError, match="steps needs batches"):
        prune(model, fisher=fisher, steps=2, damping=1e-4)


def test_a_selection_without_a_fisher_is_asked_in_every_step():
    seen = []

    @register_saliency("lively", uses_fisher=False)
    def lively(problem):
        left = sum(int(keep.sum()) for keep in problem.keep.values())
        seen.append(left)
        return {name: problem.flat(name).abs() for name in problem.names()}

    model, other = TinyEncoder(), TinyEncoder()
    other.load_state_dict(model.state_dict())
    result = prune(model, sparsity=0.75, selection="lively", steps=2)
    total = sum(mask.numel() for mask in result.masks.values())
    assert seen == [total, total // 2] and result.report.sparsity == 0.75
    once = prune(other, sparsity=0.75, selection="magnitude")
    assert unchanged(model, snapshot(other))
    assert all(torch.equal(once.masks[name], mask) for name, mask in result.masks.items())


def test_passes_that_prune_nothing_choose_no_damping():
    model = TinyEncoder()
    names = list(find_weights(model))
    targets = {name: 0.0 if name == names[0] else 0.5 for name in names}
    settings = {"num_grads": 16, "samples_per_grad": 2, "block_size": 12}
    whole = estimate_fisher(model, batches(), **settings).plan.total_bytes
    result = prune(model, batches(), targets, max_memory=int(0.75 * whole), **settings)
    assert result.report.memory["passes"] > 1
    first, *others = result.report.layers
    assert first.predicted_increase == 0 < result.report.predicted_increase
    assert first.pruned == 0 and all(2 * layer.pruned == layer.weights for layer in others)
    divergences = [trial.divergence for trial in result.report.damping_trials]
    assert all(value > 1e-6 for value in divergences)
    assert [trial.chosen for trial in result.report.damping_trials].count(True) == 1


@pytest.mark.usefixtures("limits_are_of_the_fisher")
@pytest.mark.parametrize("update", ["joint", "none"])
def test_a_damping_is_chosen_where_something_is_pruned(update):
    """One ranking in passes, and the matrices of the first are sparse enough."""
    model = TinyEncoder()
    prune(model, sparsity=0.9, selection="magnitude", params=["re:layer.0"])
    settings = {"num_grads": 16, "samples_per_grad": 2, "block_size": 12, "estimator": "gram"}
    whole = estimate_fisher(model, batches(), **settings).plan.total_bytes
    result = prune(model, batches(), 0.6, max_memory=int(0.75 * whole), update=update, **settings)
    assert result.report.memory["passes"] > 1 and result.report.sparsity == pytest.approx(0.6, 0.01)
    assert [layer.name for layer in result.report.layers] == list(find_weights(model))
    assert len({trial.divergence for trial in result.report.damping_trials}) > 1, "no trial alike"


def test_every_step_is_judged_by_the_model_before_all():
    model, data = TinyEncoder(), batches(40)
    train(model, data, 5)
    before = predict(model, data[:10])
    result = prune(model, data[10:], 0.8, num_grads=12, steps=2, calibration=data[:10],
        reconstruction=None,
    )  # fmt: skip
    last = [trial for trial in result.report.damping_trials if trial.chosen][-1]
    assert last.step == 2
    after = divergence(before, predict(model, data[:10]))
    assert after == pytest.approx(last.divergence, rel=1e-4)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_steps_begin_at_the_present_sparsity(scope):
    left = []

    @register_saliency("noting", uses_fisher=False)
    def noting(problem):
        left.append(sum(int(keep.sum()) for keep in problem.keep.values()))
        return {name: problem.flat(name).abs() for name in problem.names()}

    model, stages = TinyEncoder(), []
    prune(model, sparsity=0.5, selection="magnitude", scope=scope)
    half = sum(int((weight != 0).sum()) for weight in find_weights(model).values())
    prune(
        model, sparsity=0.75, selection="noting", scope=scope, steps=2, schedule="linear",
        progress=lambda stage, *_: stages.append(stage.split()[0]),
    )  # fmt: skip
    assert left == [half, half * 3 // 4] and set(stages) == {"1/2", "2/2"}
