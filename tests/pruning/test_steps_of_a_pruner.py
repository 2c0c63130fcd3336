"""A Pruner: steps one after the other, all or nothing, with training between them, and resumed."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, train, unchanged

from obert_kernels import FisherConfig, Pruner, PruningConfig, prune
from obert_kernels.pruning import passes

CONFIG = PruningConfig(
    damping=1e-3, fisher=FisherConfig(num_grads=8, samples_per_grad=2, block_size=10)
)


def test_a_step_is_what_prune_does():
    model, other = TinyEncoder(), TinyEncoder()
    other.load_state_dict(model.state_dict())
    pruner = Pruner(model, CONFIG)
    report = pruner.step(0.6, batches())
    result = prune(other, batches(), 0.6, config=CONFIG)
    assert unchanged(model, snapshot(other))
    assert all(torch.equal(mask, pruner.masks[name]) for name, mask in result.masks.items())
    assert report.settings == result.report.settings
    assert report.layers == result.report.layers == pruner.report().layers


def test_steps_with_training_between_them():
    model, data = TinyEncoder(), batches()
    pruner = Pruner(model, CONFIG)
    for sparsity in (0.5, 0.75, 0.9):
        report = pruner.step(sparsity, data)
        assert report.sparsity == pytest.approx(sparsity, abs=0.01)
        train(model, data, 1)
        with pytest.raises(ValueError, match=r"pruned weights that are not zero .* apply_masks"):
            pruner.step(0.95, data)
        pruner.apply_masks()
    for name, mask in pruner.masks.items():
        assert not pruner.weights[name][~mask].any()
    whole = pruner.report()
    assert whole.sparsity == pytest.approx(0.9, abs=0.01)
    assert whole.predicted_increase > report.predicted_increase > 0
    assert whole.seconds["fisher"] > report.seconds["fisher"]
    assert whole.settings["sparsity"] == 0.9


def test_a_failed_step_changes_nothing():
    model, data = TinyEncoder(), batches()
    pruner = Pruner(model, CONFIG)
    pruner.step(0.5, data)
    before, masks, report = snapshot(model), pruner.masks, pruner.report()

    def broken():
        yield from data[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruner.step(0.9, broken())
    assert unchanged(model, before)
    assert all(torch.equal(masks[name], mask) for name, mask in pruner.masks.items())
    assert pruner.report() == report


def test_one_fisher_serves_several_sparsities():
    model = TinyEncoder()
    before = snapshot(model)
    fisher = Pruner(model, CONFIG).fisher(batches())
    for sparsity in (0.4, 0.8):
        model.load_state_dict(before)
        Pruner(model, CONFIG).step(sparsity, fisher=fisher)
        found = snapshot(model)
        model.load_state_dict(before)
        prune(model, batches(), sparsity, config=CONFIG)
        assert unchanged(model, found)


def test_before_the_first_step():
    model = TinyEncoder()
    pruner = Pruner(model)
    assert pruner.config == PruningConfig()
    assert all(mask.all() for mask in pruner.masks.values())
    pruner.apply_masks()
    with pytest.raises(ValueError, match="nothing has been pruned yet"):
        pruner.report()
    with pytest.raises(ValueError, match="batches is needed"):
        pruner.step(0.5)


def test_a_mapping_prunes_some_and_leaves_others():
    model = TinyEncoder()
    pruner = Pruner(model, CONFIG)
    untouched = {n: w.detach().clone() for n, w in pruner.weights.items() if "layer.1" in n}
    report = pruner.step({"re:layer.0": 0.5}, batches())
    assert {layer.name for layer in report.layers} == set(pruner.weights) - set(untouched)
    assert all(torch.equal(pruner.weights[name], weight) for name, weight in untouched.items())
    assert all(pruner.masks[name].all() for name in untouched)
    pruner.step({"re:layer.1": 0.25}, batches())
    assert {layer.name: layer.sparsity for layer in pruner.report().layers} == {
        name: 0.25 if "layer.1" in name else 0.5 for name in pruner.weights
    }


def test_another_pruner_goes_on_where_one_stood(tmp_path):
    data = batches(40)
    config = PruningConfig(fisher=FisherConfig(num_grads=8, samples_per_grad=2, block_size=10))
    model = TinyEncoder()
    train(model, data, 5)
    pruner = Pruner(model, config)
    pruner.step(0.5, data)
    torch.save({"model": model.state_dict(), "pruner": pruner.state_dict()}, tmp_path / "state")
    pruner.step(0.8, data)
    state = torch.load(tmp_path / "state", weights_only=True)
    again = TinyEncoder()
    resumed = Pruner(again, PruningConfig.from_dict(state["pruner"]["config"]))
    with pytest.raises(ValueError, match="pruned weights that are not zero"):
        resumed.load_state_dict(state["pruner"])
    assert all(mask.all() for mask in resumed.masks.values()), "nothing is taken over by half"
    again.load_state_dict(state["model"])
    resumed.load_state_dict(state["pruner"])
    resumed.step(0.8, data)
    assert unchanged(model, snapshot(again))
    assert [t.relative for t in resumed.report().damping_trials] == [
        t.relative for t in pruner.report().damping_trials if t.step == 2
    ], "the search for a damping begins where the last one ended"


def test_a_state_of_something_else_is_refused():
    pruner = Pruner(TinyEncoder())
    state = pruner.state_dict()
    with pytest.raises(TypeError, match=r"what state_dict\(\) returned is needed, got a NoneType"):
        pruner.load_state_dict(None)
    with pytest.raises(ValueError, match="other matrices"):
        Pruner(TinyEncoder(width=8)).load_state_dict(state)
    with pytest.raises(ValueError, match="version 7 is not known"):
        pruner.load_state_dict({**state, "version": 7})


def test_what_stands_in_the_model_now_is_pruned():
    """Not what stood there when the pruner was made."""
    model = TinyEncoder()
    pruner = Pruner(model, PruningConfig(selection="magnitude"))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    pruner.step(0.5)
    assert pruner.report().sparsity == 0.5
    assert all((w == 0).any() for n, w in model.named_parameters() if n in pruner.masks)
    model.layer[0]["wide"].weight.data[0, 0] = torch.inf
    with pytest.raises(ValueError, match="holds NaN or infinite weights"):
        pruner.step(0.75)


def test_weights_that_are_pruned_already_stay_so():
    model = TinyEncoder()
    prune(model, sparsity=0.5, selection="magnitude")
    pruner = Pruner(model, CONFIG)
    train(model, batches(), 1)
    with pytest.raises(ValueError, match="pruned weights that are not zero"):
        pruner.step(0.75, batches())
    pruner.apply_masks()
    assert sum(int((w == 0).sum()) for w in pruner.weights.values()) == 576
    assert pruner.step(0.75, batches()).sparsity == 0.75


def test_a_step_with_nothing_to_do_is_no_loss():
    pruner = Pruner(TinyEncoder(), CONFIG)
    pruner.step(0.6, batches())
    assert "nothing was pruned" in pruner.step(0.5, batches()).notes[0]
    assert pruner.report().predicted_increase > 0 and not pruner.report().notes


def test_faults_of_a_step_and_of_a_state():
    pruner = Pruner(TinyEncoder(), CONFIG)
    with pytest.raises(ValueError, match="sparsity is empty"):
        pruner.step({}, batches())
    state = pruner.state_dict()
    with pytest.raises(ValueError, match="has no masks"):
        pruner.load_state_dict({k: v for k, v in state.items() if k != "masks"})
    other = Pruner(TinyEncoder(), PruningConfig(pattern="block4"))
    with pytest.raises(ValueError, match="its masks have pattern unstructured, not block4"):
        other.load_state_dict(state)


def test_an_interruption_after_the_writing_leaves_nothing_of_the_step(monkeypatch):
    def interrupted(*arguments):
        real(*arguments)
        assert not unchanged(model, before)
        raise KeyboardInterrupt

    real = passes.commit
    monkeypatch.setattr(passes, "commit", interrupted)
    model = TinyEncoder()
    pruner, before = Pruner(model, CONFIG), snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        pruner.step(0.5, batches())
    assert unchanged(model, before)
    assert all(mask.all() for mask in pruner.masks.values())
