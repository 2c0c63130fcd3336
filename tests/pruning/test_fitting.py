"""The fit after a pruning step: on which batches, what it leaves alone, and all or nothing."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from interrupts import differences, state_of
from tiny import TinyEncoder, batches, snapshot, unchanged
from torch import nn

from obert_kernels import ReconstructionConfig, prune, register_saliency
from obert_kernels.ops.status import NotFiniteError
from obert_kernels.pruning import fitting

OPTIONS = {"num_grads": 8, "damping": 1e-3, "block_size": 8}


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("count", [1, 40])
def test_no_hook_stays_behind_if_it_was_interrupted_as_it_came(kind, count, monkeypatch):
    """Between the call that adds it and the block that takes it away again."""
    model = TinyEncoder()
    before = state_of(model)
    real, calls = getattr(nn.Module, kind), []

    def interrupted(*arguments, **options):
        handle = real(*arguments, **options)
        calls.append(kind)
        if len(calls) == count:
            raise KeyboardInterrupt
        return handle

    monkeypatch.setattr(nn.Module, kind, interrupted)
    with pytest.raises(KeyboardInterrupt):
        prune(model, batches(), 0.5, selection="magnitude")
    assert not differences(before, state_of(model))


@register_saliency("looks at batches", uses_fisher=False)
def looks(problem):
    assert sum(1 for _ in problem.batches) == 24
    return {name: problem.flat(name).abs() for name in problem.names()}


def test_a_selection_that_looks_at_batches_leaves_an_iterator_to_the_fit():
    found = []
    for data in (batches(), iter(batches())):
        model = TinyEncoder()
        model.load_state_dict(found[0] if found else model.state_dict())
        found += [snapshot(model)] if not found else []
        report = prune(model, data, 0.5, selection="looks at batches").report
        assert len(report.fits[0].layers) == 4
        found.append(snapshot(model))
    torch.testing.assert_close(found[1], found[2])


def test_batches_without_an_end_are_not_read_to_it():
    taken = []

    def data():
        for batch in cycle(batches()):
            taken.append(len(batch["tokens"]))
            yield batch

    reconstruction = ReconstructionConfig(num_samples=20)
    prune(TinyEncoder(), data(), 0.5, selection="magnitude", reconstruction=reconstruction)
    assert sum(taken) == 8 * 20


def test_no_batches_at_all_are_an_error_that_says_so():
    model = TinyEncoder()
    before = snapshot(model)
    for data in ([], iter([])):
        with pytest.raises(ValueError, match=r"batches is empty: .*iterator may be used up"):
            prune(model, data, 0.5, selection="magnitude")
        assert unchanged(model, before)


def test_a_fit_judged_on_its_own_batches_says_so():
    own = "judged on the batches it was made from"
    for data, is_alone in ((batches(1, 1), True), (batches(1, 2), False), (batches(4, 1), False)):
        notes = prune(TinyEncoder(), data, 0.5, selection="magnitude").report.notes
        assert any(own in note for note in notes) == is_alone


def test_nothing_is_undone_where_nothing_was_fitted():
    """Every layer is left out: predictions do not move at all."""
    model = TinyEncoder()
    for block in model.layer:
        for layer in block.values():
            layer.register_forward_hook(lambda module, args, output: 2 * output)
    report = prune(model, batches(), 0.5, selection="magnitude").report
    (note,) = report.notes
    assert "computes more than its matrix and bias" in note and not report.fits[0].layers


def test_activations_that_are_not_finite_are_told_without_a_damping():
    model = TinyEncoder()
    before = snapshot(model)
    data = batches()
    with torch.no_grad():
        model.embedding.weight[:] *= 1e38
    before = snapshot(model)
    with pytest.raises(NotFiniteError, match="batch 0 of those that the fit is judged on"):
        prune(model, data, 0.5, selection="magnitude")
    with pytest.raises(NotFiniteError, match="batch 0 of those that the fit is judged on"):
        prune(model, data, 0.5, selection="magnitude", calibration=data[:2])
    assert unchanged(model, before)


@pytest.mark.parametrize("selection", ["magnitude", "greedy"])
def test_other_layers_keep_weights_and_biases(selection):
    model = TinyEncoder()
    before = snapshot(model)
    prune(model, batches(), {"layer.0.narrow.weight": 0.5}, selection=selection,
        **({} if selection == "magnitude" else OPTIONS))  # fmt: skip
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"layer.0.narrow.weight", "layer.0.narrow.bias"}


def test_a_fit_undone_gives_weights_and_biases_back_exactly(monkeypatch):
    expected = TinyEncoder(dtype=torch.bfloat16)
    model = TinyEncoder(dtype=torch.bfloat16)
    model.load_state_dict(expected.state_dict())
    prune(expected, batches(), 0.5, selection="magnitude", reconstruction=None)
    costs = iter([1.0, 2.0])
    monkeypatch.setattr(fitting, "_cost", lambda judge: next(costs))
    report = prune(model, batches(), 0.5, selection="magnitude").report
    assert not report.fits[0].is_kept and "was undone" in report.notes[0]
    assert unchanged(model, expected.state_dict())
