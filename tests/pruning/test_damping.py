"""Damping chosen by trial prunings: the search, the batches held out, the model untouched."""

import math

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, train, unchanged
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from obert_kernels import NumericalError, estimate_fisher, find_weights, model_loss, prune
from obert_kernels.fisher.estimate import Estimation
from obert_kernels.gradients.losses import default_loss
from obert_kernels.pruning import prunings
from obert_kernels.pruning.damping import choose_damping, mean_diagonal
from obert_kernels.pruning.predictions import divergence, predict
from obert_kernels.pruning.weights import present_masks
from obert_kernels.sparsity.patterns import UNSTRUCTURED


def search(loss_after, scale=1.0):
    counts = []
    best, trials = choose_damping(scale, lambda d: (loss_after(d), None), counts.append)
    assert counts == list(range(1, len(trials) + 1))
    assert [t.damping for t in trials] == sorted(t.damping for t in trials)
    assert all(t.damping == pytest.approx(t.relative * scale) for t in trials)
    assert min(trials, key=lambda t: t.loss).damping == best
    return best, trials


@pytest.mark.parametrize("at", [1e-6, 3e-5, 1e-3, 1e-2, 0.5, 30.0])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_the_search_finds_the_least_of_a_valley(at, scale):
    best, trials = search(lambda damping: abs(math.log10(damping / scale / at)), scale)
    assert abs(math.log10(best / scale / at)) <= 0.25 + 1e-6
    assert len(trials) <= 3 + math.ceil(2 * abs(math.log10(at / 1e-2)))


def test_the_search_has_ends():
    best, _ = search(lambda damping: damping)
    assert best == pytest.approx(1e-6)
    best, _ = search(lambda damping: -damping)
    assert best == pytest.approx(1e2)


@pytest.mark.parametrize("scale", [0.0, float("inf"), float("nan")])
def test_a_fisher_of_zeros_or_worse_has_no_scale(scale):
    best, _ = choose_damping(scale, lambda damping: (abs(damping - 1e-2), None), lambda count: None)
    assert best == pytest.approx(1e-2)


def test_what_breaks_down_is_avoided():
    def loss_after(damping):
        if damping < 5e-2:
            raise NumericalError("block 3 is not positive definite", 3)
        return damping

    best, trials = search(loss_after)
    assert best == pytest.approx(0.1)
    assert sum(math.isinf(t.loss) for t in trials) >= 2

    # However far it breaks down, what holds is found.
    def late(damping):
        if damping < 20.0:
            raise NumericalError("block 3 is not positive definite", 3)
        return damping

    assert search(late)[0] == pytest.approx(31.6, rel=0.01)

    def never(damping):
        raise NumericalError("block 3 is not positive definite", 3)

    with pytest.raises(NumericalError, match="block 3"):
        search(never)
    # A loss that is not a number is no better than none.
    assert search(lambda damping: math.nan if damping < 0.05 else 1.0)[0] > 0.05


def test_divergence_counts_before_loss():
    def change_after(damping):
        steps = abs(math.log10(damping / 1e-3))
        return -damping, None if damping > 1 else steps

    best, trials = choose_damping(1.0, change_after, lambda count: None)
    assert best == pytest.approx(1e-3)
    assert all(trial.cost == trial.divergence for trial in trials)
    best, trials = choose_damping(1.0, lambda d: (-d, math.nan if d < 0.05 else d), print)
    assert best == pytest.approx(0.1)
    assert trials[0].divergence == math.inf


def trained():
    model, data = TinyEncoder(), batches(48)
    train(model, data, 10)
    return model, data


def class_loss(model, batch):
    return model(**batch)["loss"]


class Unlabelled(TinyEncoder):
    """Says no classes."""

    def forward(self, tokens, labels=None):
        return {"loss": super().forward(tokens, labels)["loss"]}


@pytest.mark.parametrize("kind", [TinyEncoder, Unlabelled])
@pytest.mark.parametrize("loss_fn", [None, class_loss])
def test_auto_takes_the_best_of_its_trials(kind, loss_fn):
    model, data = kind(), batches(48)
    train(model, data, 10)
    dense = predict(model, data[:12])
    fisher = estimate_fisher(model, data[12:], num_grads=36, block_size=12)
    before = snapshot(model)
    stages = []
    result = prune(
        model, sparsity=0.6, fisher=fisher, calibration=data[:12], loss_fn=loss_fn,
        progress=lambda stage, done, total: stages.append((stage, done, total)),
        reconstruction=None,
    )  # fmt: skip
    report = result.report
    trials = report.damping_trials
    by = "loss" if kind is Unlabelled else "divergence"
    best = min(trials, key=lambda trial: getattr(trial, by))
    assert report.settings["damping"] == best.damping
    assert report.to_dict()["damping_trials"] == [trial._asdict() for trial in trials]
    assert ("damping", len(trials), len(trials)) in stages and "damping" in report.seconds
    assert f"damping {best.damping:.3g}, by {by} after trials" in str(report)
    after = snapshot(model)
    # What it found is true of the model it returns, and of a call with that number.
    assert predict(model, data[:12]).loss == pytest.approx(best.loss, rel=1e-4)
    for trial in trials:
        model.load_state_dict(before)
        prune(model, sparsity=0.6, fisher=fisher, damping=trial.damping, reconstruction=None)
        found = predict(model, data[:12])
        assert found.loss == pytest.approx(trial.loss, rel=1e-4)
        if by == "divergence":
            assert divergence(dense, found) == pytest.approx(trial.divergence, rel=1e-4)
        assert unchanged(model, after) == (trial == best)


def test_scale_of_the_fisher():
    model, data = trained()
    weights = find_weights(model)
    with torch.no_grad():
        weights["layer.0.wide.weight"][:, :6] = 0
    estimate = estimate_fisher(model, data, num_grads=48, block_size=7, loss_fn=model_loss)
    keep = present_masks(weights, UNSTRUCTURED)
    total = 0.0
    for batch in data:
        model.eval()
        gradients = torch.autograd.grad(model(**batch)["loss"], list(weights.values()))
        masks = keep.values()
        total += sum(
            float((g.flatten() * k).square().sum()) for g, k in zip(gradients, masks, strict=True)
        )
    living = sum(int(mask.sum()) for mask in keep.values())
    found = mean_diagonal({n: f.mean_squares() for n, f in estimate.fishers.items()}, keep)
    assert found == pytest.approx(total / 48 / living, rel=1e-4)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_trial_leaves_the_model_as_it_was(error):
    model, data = trained()
    before = snapshot(model)
    modes = [module.training for module in model.modules()]
    calls = []

    def loss_fn(model, batch):
        calls.append(1)
        if len(calls) == 42:  # after 24 gradients and 12 batches before pruning: inside a trial
            assert not unchanged(model, before)
            raise error
        return model(**batch)["loss"]

    with pytest.raises(error):
        prune(model, data, 0.5, num_grads=24, loss_fn=loss_fn)
    assert unchanged(model, before)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("max_memory", [None, 120_000])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_by_default_and_in_passes(max_memory, scope, monkeypatch):
    model, data = trained()
    counted = []
    real = Estimation.accumulate
    monkeypatch.setattr(
        Estimation, "accumulate", lambda *a, **k: counted.append(1) or real(*a, **k)
    )
    searches = []
    monkeypatch.setattr(
        prunings, "choose_damping", lambda *a, **k: searches.append(1) or choose_damping(*a, **k)
    )
    report = prune(model, data, 0.5, num_grads=36, max_memory=max_memory, scope=scope,
        reconstruction=None,
    ).report  # fmt: skip
    assert max_memory or len(counted) == 1, "one Fisher serves all trials"
    assert (report.memory["passes"] > 1) == (max_memory is not None)
    assert len(report.damping_trials) >= 3
    assert len(searches) == 1, "for all passes"
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert not report.notes


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num_grads", [18, 19])
def test_what_comes_in_another_order_cannot_be_kept_back_twice(shuffle, num_grads):
    samples = [{name: values[0] for name, values in batch.items()} for batch in batches(96)]
    loader = DataLoader(samples, batch_size=4, shuffle=shuffle)  # 6 of 24 batches are kept back
    notes = prune(TinyEncoder(), loader, 0.5, num_grads=num_grads).report.notes
    assert len(notes) == (num_grads > 18) * (1 + shuffle)
    assert not shuffle or not notes or "in another order every time" in notes[0]


def test_the_order_is_noted_where_batches_are_cut_or_uncounted():
    samples = [{name: values[0] for name, values in batch.items()} for batch in batches(96)]
    loader = DataLoader(samples, batch_size=4, shuffle=True)

    def loss_fn(model, batch):  # no mean over samples
        return model(**batch)["loss"] * len(batch["labels"])

    options = {"num_grads": 40, "samples_per_grad": 2, "loss_fn": loss_fn}
    notes = prune(TinyEncoder(), loader, 0.5, **options).report.notes
    assert "every gradient took" in notes[0] and "in another order every time" in notes[1]


class Endless(IterableDataset):
    """Batches without a number of them."""

    def __iter__(self):
        return iter(batches(100))


@pytest.mark.parametrize("damping", ["auto", 1e-3])
def test_a_loader_that_does_not_know_its_length(damping):
    loader = DataLoader(Endless(), batch_size=None)
    report = prune(TinyEncoder(), loader, 0.5, num_grads=8, damping=damping).report
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


class Losses(nn.Module):
    """Gives a loss, and nothing to choose a class by."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **batch):
        return {"loss": self.model(**batch)["loss"]}


def test_batches_to_choose_on_must_be_good_for_it():
    data = batches(24)
    model = TinyEncoder()
    before = snapshot(model)
    options = {"sparsity": 0.5, "num_grads": 8}
    with pytest.raises(ValueError, match="calibration is empty"):
        prune(model, data, calibration=iter(()), **options)
    left_out = {**data[0], "labels": torch.full((4,), -100)}
    report = prune(model, data, calibration=[left_out], **options).report
    assert report.damping_trials[0].divergence is not None, "its loss does not count"
    model.load_state_dict(before)
    with pytest.raises(ValueError, match="batch 1 of those that the damping is chosen on gives a"):
        prune(Losses(model), data, calibration=[data[0], left_out], **options)
    with torch.no_grad():
        model.embedding.weight[19] = torch.nan
    clean = [{**batch, "tokens": batch["tokens"] % 19} for batch in data]
    broken = {**clean[0], "tokens": torch.full((4, 6), 19)}
    with pytest.raises(ValueError, match=r"batch 0 of those .* gives logits with NaN"):
        prune(model, clean, calibration=[broken], **options)
    for at in (6, 7):
        spoiled = [*clean[:at], broken, *clean[at + 1 :]]
        for samples_per_grad in (None, 1, 2):
            with pytest.raises(ValueError, match=f"batch {at}: the loss is nan"):
                prune(model, spoiled, samples_per_grad=samples_per_grad, **options)
    with pytest.raises(ValueError, match="batch 0: the loss is nan"):
        prune(model, [broken], **options, calibration=clean[:1])
    with pytest.raises(ValueError, match="4 samples for the Fisher, number 1: the loss is nan"):
        prune(
            model, [*clean[:3], broken, *clean[4:8]], 0.5, samples_per_grad=4, num_grads=2,
            loss_fn=lambda model, batch: 2 ** model(**batch)["loss"],
        )  # fmt: skip


@pytest.mark.parametrize("steps", [1, 2])
def test_an_autocast_around_it_all_does_not_hide_new_weights(steps):
    """Which keeps its copies of weights until it ends."""
    data = batches(48)
    options = {"sparsity": 0.6, "num_grads": 16, "steps": steps}

    def outside(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return default_loss(model, batch)

    model, other = TinyEncoder(), TinyEncoder()
    other.load_state_dict(model.state_dict())
    expected = prune(other, data, loss_fn=outside, **options).report
    with torch.autocast("cpu", torch.bfloat16):
        model(**data[0])
        report = prune(model, data, **options).report
        logits = model.eval()(**data[0])["logits"]
    divergences = [trial.divergence for trial in report.damping_trials]
    assert min(divergences) > 0
    assert len(divergences) == len(expected.damping_trials)
    assert report.settings["damping"] == pytest.approx(expected.settings["damping"], rel=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(**data[0])["logits"], logits), "and what follows sees them"


def test_bad_damping_is_named():
    model, data = TinyEncoder(), batches()
    with pytest.raises(ValueError, match="a positive number or 'auto', got 'car'"):
        prune(model, data, damping="car")
    with pytest.raises(ValueError, match="damping must be positive"):
        prune(model, data, damping=0)
    fisher = estimate_fisher(model, data, num_grads=8)
    with pytest.raises(ValueError, match="needs calibration batches"):
        prune(model, fisher=fisher)
