"""When the remaining weights are fitted, on what, and when the fit is undone."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, train, unchanged
from torch.utils.data import DataLoader, IterableDataset

from obert_kernels import (
    FisherConfig,
    Pruner,
    PruningConfig,
    ReconstructionConfig,
    estimate_fisher,
    find_weights,
    prune,
)
from obert_kernels.pruning import fitting
from obert_kernels.pruning.predictions import divergence, predict

OPTIONS = {"num_grads": 24, "block_size": 12, "damping": 1e-4}


def trained():
    torch.manual_seed(0)
    model, data = TinyEncoder(), batches(64)
    train(model, data, 10)
    return model, data


def moved(dense, model, data):
    return divergence(dense, predict(model, data))


@pytest.mark.parametrize(
    "how",
    [
        {"sparsity": 0.6},
        {"sparsity": 0.6, "pattern": "block4"},
        {"sparsity": 0.6, "pattern": "block4x1"},
        {"pattern": "2:4"},
        {"sparsity": 0.6, "selection": "magnitude"},
        {"sparsity": 0.6, "selection": "diagonal", "update": "none"},
        {"sparsity": 0.6, "scope": "layer"},
        {"sparsity": {"re:layer.1": 0.7}},
        {"sparsity": 0.7, "steps": 3},
    ],
    ids=str,
)
def test_predictions_are_nearer_to_the_dense_model(how):
    """On samples that neither Fisher nor fit has seen; pruned weights stay zero."""
    model, data = trained()
    fresh = data[:16]
    dense, before = predict(model, fresh), snapshot(model)
    without = prune(model, data[16:], reconstruction=None, **how, **OPTIONS)
    plain = moved(dense, model, fresh)
    assert not without.report.fits and without.report.settings["reconstruction"] is None
    model.load_state_dict(before)
    result = prune(model, data[16:], **how, **OPTIONS)
    assert moved(dense, model, fresh) < 0.8 * plain
    fits = result.report.fits
    assert [fit.step for fit in fits] == list(range(1, how.get("steps", 1) + 1))
    assert fits[-1].is_kept and fits[-1].after < fits[-1].before
    for name, weight in find_weights(model).items():
        if name in result.masks:
            assert torch.equal(weight != 0, result.masks[name]), name
    assert f"{fits[-1].after:.4g} after" in str(result.report)


def test_matrices_of_no_sparsity_keep_weights_and_biases():
    model, data = trained()
    before = snapshot(model)
    prune(model, data, {"re:layer.1": 0.7}, **OPTIONS)
    after = snapshot(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"layer.1.{n}.{p}" for n in ("wide", "narrow") for p in ("weight", "bias")}


def test_without_batches_there_is_no_fit_unless_it_is_asked_for():
    model, _ = trained()
    result = prune(model, sparsity=0.5, selection="magnitude")
    assert not result.report.fits and result.report.settings["reconstruction"] is None
    before = snapshot(model)
    with pytest.raises(ValueError, match="batches is needed: a reconstruction"):
        prune(model, sparsity=0.7, selection="magnitude", reconstruction=ReconstructionConfig())
    assert unchanged(model, before)


def test_an_estimate_keeps_the_batches_for_the_fit():
    model, data = trained()
    before = snapshot(model)
    prune(model, data, 0.6, **OPTIONS)
    expected = snapshot(model)
    model.load_state_dict(before)
    fisher = estimate_fisher(model, data, num_grads=24, block_size=12)
    assert prune(model, sparsity=0.6, fisher=fisher, damping=1e-4).report.fits
    assert unchanged(model, expected)


class Endless(IterableDataset):
    """Has no length."""

    def __iter__(self):
        return iter(batches(64)[40:])


def test_batches_beside_an_estimate_are_those_of_the_fit():
    model, data = trained()
    before = snapshot(model)
    fisher = estimate_fisher(model, data, num_grads=24, block_size=12)
    prune(model, sparsity=0.6, fisher=fisher, damping=1e-4)
    expected = snapshot(model)
    model.load_state_dict(before)
    others = DataLoader(Endless(), batch_size=None)
    assert prune(model, others, 0.6, fisher=fisher, damping=1e-4).report.fits
    assert not unchanged(model, expected)


def test_a_fit_that_moves_predictions_further_is_undone(monkeypatch):
    model, data = trained()
    before = snapshot(model)
    prune(model, data, 0.6, reconstruction=None, **OPTIONS)
    expected = snapshot(model)
    model.load_state_dict(before)
    real = fitting.reconstruct

    def worse(model, *others):
        found = real(model, *others)
        with torch.no_grad():
            model.layer[0]["wide"].bias += 5
            model.layer[1]["narrow"].weight *= -3
        return found

    monkeypatch.setattr(fitting, "reconstruct", worse)
    report = prune(model, data, 0.6, **OPTIONS).report
    (fit,) = report.fits
    assert not fit.is_kept and fit.after > fit.before
    assert any("was undone" in note for note in report.notes) and "undone" in str(report)
    assert unchanged(model, expected)


def test_the_number_of_samples_is_kept_to(monkeypatch):
    seen = []
    real = fitting.reconstruct

    def noted(model, weights, masks, dense, samples, *others):
        seen.append(sum(len(batch["tokens"]) for batch in samples))
        return real(model, weights, masks, dense, samples, *others)

    monkeypatch.setattr(fitting, "reconstruct", noted)
    model, data = trained()
    config = ReconstructionConfig(num_samples=40)
    prune(model, data[8:], 0.6, calibration=data[:8], reconstruction=config, **OPTIONS)
    prune(model, data[8:], 0.7, reconstruction=config, **OPTIONS)
    assert seen == [40, 30]  # a quarter of them judges, where nothing is kept back


def test_steps_of_a_pruner_count_on(monkeypatch):
    model, data = trained()
    config = PruningConfig(damping=1e-4, fisher=FisherConfig(num_grads=24, block_size=12))
    pruner = Pruner(model, config)
    for sparsity in (0.4, 0.6):
        pruner.step(sparsity, data)
    assert [fit.step for fit in pruner.report().fits] == [1, 2]
    assert [len(fit["layers"]) for fit in pruner.report().to_dict()["reconstruction"]] == [4, 4]


@pytest.mark.parametrize("wrong", [True, 3, "yes", {"ridge": 0.1}])
def test_what_is_no_reconstruction_is_refused(wrong):
    with pytest.raises(TypeError, match="reconstruction must be 'auto', None or a Recon"):
        PruningConfig(reconstruction=wrong)


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"num_samples": 0}, ValueError),
        ({"num_samples": 1.5}, TypeError),
        ({"ridge": 0}, ValueError),
        ({"ridge": float("inf")}, ValueError),
        ({"ridge": "large"}, ValueError),
        ({"inputs": "both"}, ValueError),
        ({"residual": 1}, TypeError),
    ],
)
def test_values_out_of_range_are_refused(values, error):
    with pytest.raises(error, match=next(iter(values))):
        ReconstructionConfig(**values)


def test_a_configuration_goes_to_a_dictionary_and_back():
    config = PruningConfig(reconstruction=ReconstructionConfig(ridge=0.1, inputs="dense"))
    assert PruningConfig.from_dict(config.to_dict()) == config
    assert PruningConfig.from_dict(PruningConfig(reconstruction=None).to_dict()).fit is None
