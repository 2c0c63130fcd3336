"""A grid of trials: which there are, on how few estimates, in how much time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny import GREEDY

from obert_kernels import (
    GramFisher,
    NumericalError,
    Pruner,
    PruningConfig,
    ReconstructionConfig,
    find_weights,
    prune,
    register_saliency,
)
from obert_kernels.pruning import score_cache
from obert_kernels.pruning.score_cache import ScoreCache
from obert_kernels.trials import grid
from obert_kernels.trials.outcome import (
    Outcome,
    Scores,
    batches_for,
    best_by_target,
    make_grid,
    point_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# run_grid


def evaluate(model: torch.nn.Module) -> Scores:
    """Figures that depend on the weights."""
    batches = tiny.batches(6, 8)
    with torch.no_grad():
        losses = [float(model(**batch)["loss"]) for batch in batches]
        right = [(model(**b)["logits"].argmax(1) == b["labels"]).float().mean() for b in batches]
    return Scores(float(sum(right)) / 6, sum(losses) / 6, float(right[0]))


def tiny_grid(
    model: torch.nn.Module, settings: list[PruningConfig], sparsities: list[float], **options
):
    model.eval()
    return grid.run_grid(
        model,
        lambda num_grads, texts: tiny.batches(num_grads, texts),
        evaluate,
        settings,
        sparsities,
        params=["re:layer.*weight"],
        calibration=tiny.batches(2),
        **options,
    )


MAGNITUDE = PruningConfig(selection="magnitude")
SETTINGS = make_grid(
    texts=[16],
    texts_per_grad=[2, 4],
    block_size=[8],
    damping=["auto", 1e-3],
    selection=["greedy", "diagonal", "magnitude"],
    base=PruningConfig(reconstruction=ReconstructionConfig(num_samples=16)),
)


def test_one_sparsity_is_no_list():
    with pytest.raises(TypeError, match=r"sparsities is a list .* write \[0.8\]"):
        tiny_grid(tiny.TinyEncoder(), SETTINGS, 0.8)


def test_one_estimate_serves_all_its_trials_and_the_weights_come_back(estimates):
    model = tiny.TinyEncoder()
    before = tiny.snapshot(model)
    seen: list[Outcome] = []
    result = tiny_grid(model, SETTINGS, [0.5, 0.75], on_outcome=seen.append)
    assert len(result.outcomes) == 2 * len(SETTINGS) == 18 and not result.left_out
    assert result.outcomes == seen
    assert sorted(estimates) == [(4, 4, 8), (8, 2, 8)]
    assert tiny.unchanged(model, before)
    for outcome in result.outcomes:
        assert not outcome.error
        assert outcome.sparsity == pytest.approx(outcome.target, abs=0.01)
        assert outcome.trial_seconds > outcome.selection_seconds > 0
        fisher = outcome.config.uses_fisher
        assert (outcome.damping_used is not None) == fisher
        assert (outcome.predicted_increase is not None) == fisher
        assert (outcome.gradients_seconds > 0) == (outcome.fisher_seconds > 0) == fisher
        assert (outcome.damping_seconds > 0) == (outcome.point.damping == "auto")
    keys = [outcome.key for outcome in result.outcomes]
    assert [key[1] for key in keys] == [0.5, 0.75] * len(SETTINGS), "sparsities stand together"


def test_trials_are_those_of_single_calls():
    model = tiny.TinyEncoder()
    before = tiny.snapshot(model)
    for outcome in tiny_grid(model, SETTINGS, [0.75, 0.5]).outcomes:
        found = outcome.point
        how = {} if found.damping is None else {"damping": found.damping}
        prune(
            model,
            tiny.batches(*batches_for(outcome.config)),
            outcome.target,
            params=["re:layer.*weight"],
            num_grads=found.num_grads or 1,
            samples_per_grad=found.texts_per_grad,
            block_size=found.block_size,
            selection=found.selection,
            update=found.update,
            reconstruction=outcome.config.reconstruction,
            calibration=tiny.batches(2),
            **how,
        )
        assert evaluate(model) == (
            outcome.dev_accuracy, outcome.dev_loss, outcome.test_accuracy
        )  # fmt: skip
        model.load_state_dict(before)


def test_finished_trials_need_no_estimate(estimates):
    model = tiny.TinyEncoder()
    first = tiny_grid(model, SETTINGS[:4], [0.5])
    estimates.clear()
    again = tiny_grid(model, SETTINGS[:4], [0.5], finished=first.outcomes, max_memory=1)
    assert again.outcomes == first.outcomes and not estimates
    more = tiny_grid(model, SETTINGS, [0.5], finished=first.outcomes)
    assert len(more.outcomes) == len(SETTINGS)
    assert len(estimates) == len({point_of(s)[2:5] for s in SETTINGS[4:] if s.uses_fisher})


@pytest.mark.usefixtures("limits_are_of_the_fisher")
def test_a_fisher_that_does_not_fit_is_made_in_passes(estimates):
    model = tiny.TinyEncoder()
    setting = replace(GREEDY, fisher=replace(GREEDY.fisher, num_grads=8))
    whole = tiny_grid(model, [setting], [0.5]).outcomes[0]
    estimates.clear()
    passes = tiny_grid(model, [setting], [0.5], max_memory=40_000).outcomes[0]
    assert not estimates
    assert passes.dev_loss == pytest.approx(whole.dev_loss, rel=1e-5)
    assert passes.gradients_seconds > 0 and passes.fisher_seconds > 0
    with pytest.raises(MemoryError, match="max_memory"):
        tiny_grid(model, [setting], [0.5], max_memory=100)


def test_a_damping_that_is_too_small_fails_alone(monkeypatch):
    real = Pruner.step

    def step(pruner: Pruner, *arguments: Any, **options: Any) -> Any:
        if pruner.config.damping == 1e-9:
            raise NumericalError("block 3 is not\npositive definite", 3)
        return real(pruner, *arguments, **options)

    monkeypatch.setattr(Pruner, "step", step)
    model = tiny.TinyEncoder()
    outcomes = tiny_grid(model, [replace(GREEDY, damping=1e-9), GREEDY], [0.5]).outcomes
    assert outcomes[0].error == "block 3 is not positive definite"
    assert outcomes[0].dev_accuracy is None and outcomes[0].fisher_seconds > 0
    assert not outcomes[1].error
    assert best_by_target(outcomes) == {0.5: outcomes[1]}


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_trial_leaves_the_model_as_it_was(monkeypatch, error):
    model = tiny.TinyEncoder()
    before = tiny.snapshot(model)
    seen: list[Outcome] = []

    real = evaluate

    def interrupted(model: torch.nn.Module) -> Scores:
        if len(seen) == 2:
            assert not tiny.unchanged(model, before)
            raise error
        return real(model)

    monkeypatch.setattr("test_grid.evaluate", interrupted)
    with pytest.raises(error):
        tiny_grid(model, SETTINGS, [0.5], on_outcome=seen.append)
    assert len(seen) == 2 and tiny.unchanged(model, before)


def test_a_mistake_in_a_selection_is_no_failed_trial():
    @register_saliency("mistaken", uses_fisher=False)
    def mistaken(problem):
        return {name: 1 / 0 for name in problem.names()}

    with pytest.raises(ZeroDivisionError):
        tiny_grid(tiny.TinyEncoder(), [replace(GREEDY, selection="mistaken", update="none")], [0.5])


@pytest.mark.parametrize(
    ("sparsity", "options", "message"),
    [
        (1.5, {}, "sparsity"),
        (0.7, {"pattern": "2:4"}, "prunes to a sparsity of 0.5"),
        (0.5, {"pattern": "block5"}, "not divisible by 5"),
        (0.5, {"scope": "model"}, "scope must be"),
        (0.5, {"estimator": "guess"}, "estimator must be"),
        (0.5, {"pattern": "3:6"}, "multiple of 6"),
    ],
)
def test_faults_are_found_before_any_work(estimates, sparsity, options, message):
    with pytest.raises(ValueError, match=message):
        tiny_grid(tiny.TinyEncoder(), [GREEDY, MAGNITUDE], [sparsity], **options)
    assert not estimates


@pytest.mark.parametrize(
    "changed",
    [
        {"pattern": "block4"}, {"scope": "layer"}, {"params": ("re:layer.0",)}, {"steps": 2},
        {"reconstruction": None},
        {"fisher": {"dtype": "float32"}}, {"fisher": {"gradients_of": "labels"}},
    ],
)  # fmt: skip
def test_configurations_may_differ_in_anything(changed):
    """Nothing is dropped, and no Fisher serves what it was not made for."""
    fisher = replace(GREEDY.fisher, **changed.get("fisher", {}))
    other = replace(GREEDY, **{**changed, "fisher": fisher})
    model = tiny.TinyEncoder()
    model.eval()
    outcomes = grid.run_grid(
        model, tiny.batches, evaluate, [GREEDY, other, replace(other, damping=1e-2)], [0.5]
    ).outcomes
    assert [outcome.config for outcome in outcomes] == [GREEDY, other, replace(other, damping=1e-2)]
    assert not any(outcome.error for outcome in outcomes)
    before = tiny.snapshot(model)
    for outcome in outcomes:
        data = tiny.batches(4, 2)
        prune(model, data, 0.5, config=outcome.config)
        assert evaluate(model).dev_loss == outcome.dev_loss
        model.load_state_dict(before)
    broken = replace(GREEDY, params=("nothing",))
    with pytest.raises(ValueError, match="matches no prunable weight"):
        grid.run_grid(model, tiny.batches, None, [broken, GREEDY], [0.5])


def test_patterns_that_share_a_fisher_share_no_scores():
    model = tiny.TinyEncoder()
    fisher = replace(GREEDY.fisher, block_size=12)
    configs = [replace(GREEDY, pattern=name, fisher=fisher) for name in ("block4", "2:4")]
    outcomes = tiny_grid(model, configs, [0.5]).outcomes
    assert [outcome.sparsity for outcome in outcomes] == [0.5, 0.5]


def test_outcomes_are_told_when_the_weights_are_back():
    model = tiny.TinyEncoder()
    before = tiny.snapshot(model)
    told = []
    tiny_grid(
        model, [GREEDY], [0.5], on_outcome=lambda _: told.append(tiny.unchanged(model, before))
    )
    assert told == [True]


def test_a_model_that_hooks_cannot_serve_is_pruned_in_passes(monkeypatch):
    """Its gathered gradients do not fit beside the whole Fisher; that shows at the estimate."""
    model, weights = tiny.TinyEncoder(), find_weights(tiny.TinyEncoder(), ["re:layer.*weight"])
    setting = replace(GREEDY, fisher=replace(GREEDY.fisher, num_grads=16))

    def not_a_mean(model, batch):
        return model(**batch)["loss"] * len(batch["labels"])

    plan = Pruner(model, replace(setting, params=tuple(weights))).plan(streamed=True)
    budget = plan.total_bytes + 1000
    (outcome,) = tiny_grid(model, [setting], [0.5], loss_fn=not_a_mean, max_memory=budget).outcomes
    assert outcome.sparsity == 0.5 and not outcome.error


def test_automatic_damping_needs_calibration():
    with pytest.raises(ValueError, match="calibration"):
        grid.run_grid(
            tiny.TinyEncoder(), tiny.batches, evaluate, [replace(GREEDY, damping="auto")], [0.5],
            params=["re:layer.*weight"],
        )  # fmt: skip


# Scores that trials share


def test_scores_are_computed_once_for_all_sparsities(monkeypatch):
    asked = []
    real = GramFisher.greedy_scores

    def counted(fisher, weight, keep, damping, *others):
        asked.append(damping)
        return real(fisher, weight, keep, damping, *others)

    monkeypatch.setattr(GramFisher, "greedy_scores", counted)
    model = tiny.TinyEncoder()
    matrices = len(find_weights(model, ["re:layer.*weight"]))
    outcomes = tiny_grid(model, [replace(GREEDY, damping="auto")], [0.5, 0.6, 0.75]).outcomes
    assert len(asked) == matrices * len(set(asked)), "each damping once"
    alone = [tiny_grid(model, [outcome.config], [outcome.target]) for outcome in outcomes]
    assert [o.dev_loss for o in outcomes] == [found.outcomes[0].dev_loss for found in alone]


def test_only_a_few_scores_are_kept():
    cache, made = ScoreCache(), []

    def ask(key):
        return cache.once(key, lambda: made.append(key) or {"w": torch.tensor([key])})["w"].item()

    keys = list(range(7))
    assert [ask(key) for key in keys] == keys == made
    assert ask(6) == 6 and made == keys
    assert ask(0) == 0 and made == [*keys, 0], "the one asked for longest ago is gone"


@pytest.mark.parametrize(
    ("free", "limit", "kept"),
    [(100, None, False), (10**9, None, True), (None, None, False), (0, 0, False), (0, 10**6, True)],
)
def test_scores_are_kept_where_there_is_room(monkeypatch, free, limit, kept):
    monkeypatch.setattr(score_cache, "available_memory", lambda device: free)
    weights = find_weights(tiny.TinyEncoder(), ["re:layer.*weight"])
    limit = None if limit is None else 500 + limit
    assert (ScoreCache.if_room(weights, 500, limit) is not None) == kept


def test_what_evaluate_trains_is_put_back_too():
    model = tiny.TinyEncoder()
    before = tiny.snapshot(model)
    heads = []

    def trained(model):
        heads.append(model.head.weight.detach().clone())
        tiny.train(model.train(), tiny.batches(2), 1)
        return Scores(0.5, 0.5, 0.5)

    config = PruningConfig(selection="magnitude", reconstruction=None)
    grid.run_grid(model.eval(), lambda m, g: [], trained, [config], [0.5, 0.8])
    assert tiny.unchanged(model, before) and not model.training
    assert torch.equal(heads[0], heads[1]), "each trial begins with the model given"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate": lambda model: 0.9}, r"evaluate must return obert_kernels\.Scores\(dev_acc"),
        ({"evaluate": 0.9}, "evaluate is a function, got a float"),
        ({"batches_of": []}, "batches_of is a function, got a list"),
        ({"settings": GREEDY}, r"settings is a list of values to try, got Pruning.*write \["),
        ({"settings": [{"damping": 1}]}, "settings are PruningConfigs, see make_grid, got {'da"),
    ],
)
def test_what_a_grid_cannot_work_with(options, message):
    model = tiny.TinyEncoder()
    before = tiny.snapshot(model)
    given = {
        "batches_of": lambda m, g: [],
        "evaluate": evaluate,
        "settings": [PruningConfig(selection="magnitude", reconstruction=None)],
    }
    with pytest.raises(TypeError, match=message):
        grid.run_grid(model, sparsities=[0.5], **{**given, **options})
    assert tiny.unchanged(model, before)


def test_batches_to_choose_on_that_come_once_serve_all_trials():
    found = grid.run_grid(
        tiny.TinyEncoder(),
        tiny.batches,
        evaluate,
        [replace(GREEDY, damping="auto")],
        [0.5, 0.8],
        calibration=iter(tiny.batches(2)),
    )
    assert len(found.outcomes) == 2 and not any(outcome.error for outcome in found.outcomes)
