"""Trials that differ in how the remaining weights are fitted."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
from test_grid import evaluate
from tiny import GREEDY

from obert_kernels import Pruner, PruningConfig, ReconstructionConfig, prune
from obert_kernels.trials import grid

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("once", [False, True])
def test_fits_share_a_fisher_and_what_it_was_estimated_on(estimates, once):
    """Also where the batches come once, and the first trial has no use for them afterwards."""
    settings = [
        replace(GREEDY, reconstruction=how)
        for how in (None, "auto", ReconstructionConfig(num_samples=3, ridge=0.1))
    ]
    model = tiny.TinyEncoder().eval()
    outcomes = grid.run_grid(
        model,
        lambda m, g: iter(tiny.batches(m, g)) if once else tiny.batches(m, g),
        evaluate,
        settings,
        [0.5],
        calibration=tiny.batches(2),
    ).outcomes
    assert len(estimates) == 1
    assert [outcome.config for outcome in outcomes] == settings
    assert [outcome.reconstruction_seconds > 0 for outcome in outcomes] == [False, True, True]
    assert len({outcome.dev_loss for outcome in outcomes}) == 3
    before = tiny.snapshot(model)
    for outcome in outcomes:
        prune(model, tiny.batches(4, 2), 0.5, config=outcome.config, calibration=tiny.batches(2))
        assert evaluate(model).dev_loss == outcome.dev_loss
        model.load_state_dict(before)


def test_what_needs_no_fisher_is_fitted_on_as_many_samples_as_its_fit_looks_at():
    asked = []

    def batches_of(num_grads, samples):
        asked.append((num_grads, samples))
        return tiny.batches(num_grads, samples)

    fit = ReconstructionConfig(num_samples=12)
    plain = PruningConfig(selection="magnitude", reconstruction=None)
    settings = [plain, replace(plain, reconstruction=fit)]
    model = tiny.TinyEncoder().eval()
    outcomes = grid.run_grid(model, batches_of, evaluate, settings, [0.5, 0.75]).outcomes
    assert asked == [(1, 12)]
    assert [outcome.reconstruction_seconds > 0 for outcome in outcomes] == [
        False,
        False,
        True,
        True,
    ]
    assert {outcome.point.texts for outcome in outcomes} == {None}
    assert outcomes[0].dev_loss != outcomes[2].dev_loss


def test_a_damping_for_all_sparsities_is_chosen_before_any_fit(monkeypatch):
    fitted = []
    real = Pruner.step

    def step(pruner, sparsity, *arguments, **options):
        fitted.append((sparsity, pruner.config.damping == "auto", pruner.config.fit is not None))
        return real(pruner, sparsity, *arguments, **options)

    monkeypatch.setattr(Pruner, "step", step)
    config = replace(GREEDY, damping="auto")
    loop = grid.TrialLoop(
        tiny.TinyEncoder().eval(), tiny.batches, evaluate, tiny.batches(2), one_damping=True
    )
    loop.run([(config, 0.5), (config, 0.75)])
    assert fitted == [(0.75, True, False), (0.5, False, True), (0.75, False, True)]
