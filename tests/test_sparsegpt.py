"""SparseGPT as a contender: the sweep of one matrix by hand, and of whole encoders."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import partial

import pytest
import torch
from tiny import snapshot, unchanged
from tiny_text import TINY
from torch import Tensor, nn

from benchmarks.accuracy import prune_once, run, sparsegpt
from benchmarks.accuracy.sparsegpt import prune_as_sparsegpt, sweep
from obert_kernels import find_weights
from obert_kernels.tasks.evaluate import Evaluation


def problem(rows: int, columns: int, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A matrix and the Hessian of correlated inputs, float64."""
    inputs = torch.randn(tokens, columns).double() @ torch.randn(columns, columns).double()
    return torch.randn(rows, columns).double(), inputs.T @ inputs


def damped(hessian: Tensor) -> Tensor:
    one = torch.eye(len(hessian)).double()
    return hessian + sparsegpt.DAMPING * hessian.diagonal().mean() * one


def error(change: Tensor, hessian: Tensor) -> float:
    """Sum of squares of what changes at the outputs."""
    return float((change @ hessian * change).sum())


# ---- one matrix --------------------------------------------------------------------


def test_one_column_is_removed_as_by_the_optimal_brain_surgeon():
    weight, hessian = problem(rows=7, columns=12)
    weight[:, 0] /= 1e3
    new, keep = sweep(weight, hessian, 1 / 12)
    inverse = torch.linalg.inv(damped(hessian))
    assert torch.equal(keep.all(dim=0), torch.arange(12) > 0) and not keep[:, 0].any()
    expected = weight - weight[:, :1] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(new, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "pattern, sparsity, together", [("unstructured", 0.6, 4), ("2:4", 0.5, 4), ("1:3", None, 3)]
)
def test_a_sweep_is_one_removal_after_the_other(monkeypatch, pattern, sparsity, together):
    """With masks by hand from what each weight costs when its turn comes, and the inverse Hessian
    of the columns that are left computed anew for each."""
    monkeypatch.setattr(sparsegpt, "WINDOW", 4)
    weight, hessian = problem(rows=6, columns=12)
    new, keep = sweep(weight, hessian, sparsity, pattern)
    inverses = [torch.linalg.inv(damped(hessian)[j:, j:]) for j in range(12)]
    by_hand, mask = weight.clone(), torch.ones_like(keep)
    for j in range(12):
        if j % together == 0:
            here = slice(j, j + together)
            diagonal = torch.stack([inverse[0, 0] for inverse in inverses[here]])
            costs = by_hand[:, here].square() / diagonal
            if pattern == "unstructured":
                before, after = round(0.6 * 6 * j), round(0.6 * 6 * (j + together))
                mask[:, here] = costs > costs.flatten().sort().values[after - before - 1]
            else:
                kept = int(pattern[0])
                mask[:, here] = costs >= costs.sort(dim=1).values[:, -kept, None]
        inverse = inverses[j]
        removed = torch.where(mask[:, j], 0, by_hand[:, j])
        by_hand[:, j:] -= removed[:, None] / inverse[0, 0] * inverse[0]
    assert torch.equal(keep, mask)
    torch.testing.assert_close(new, by_hand * mask, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8, 0.95])
def test_outputs_change_less_than_by_magnitude(sparsity):
    weight, hessian = problem(rows=20, columns=300, tokens=500)
    new, keep = sweep(weight, hessian, sparsity)
    assert int((~keep).sum()) == round(sparsity * weight.numel())
    assert torch.equal(new != 0, keep)
    by_size = weight.abs() > weight.abs().flatten().sort().values[int((~keep).sum()) - 1]
    assert error(new - weight, hessian) < error(weight * ~by_size, hessian)
    assert error(new - weight, hessian) < error(weight * ~keep, hessian)


def test_sparsity_0_changes_nothing_and_1_leaves_nothing():
    weight, hessian = problem(rows=5, columns=9)
    new, keep = sweep(weight.float(), hessian, 0.0)
    assert torch.equal(new.float(), weight.float()) and keep.all()
    new, keep = sweep(weight, hessian, 1.0)
    assert not new.any() and not keep.any()


def test_other_patterns_are_refused():
    weight, hessian = problem(rows=4, columns=6)
    with pytest.raises(ValueError, match="prunes unstructured or N:M, got pattern 'block2'"):
        sweep(weight, hessian, 0.5, "block2")
    with pytest.raises(ValueError, match="not divisible by 4"):
        sweep(weight, hessian, 0.5, "2:4")
    with pytest.raises(ValueError, match="sparsity must be between 0 and 1"):
        sweep(weight, hessian, 1.5)


# ---- a model -----------------------------------------------------------------------


@pytest.fixture(params=["Bert", "MPNet"])
def model(request) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=20, intermediate_size=32, **TINY
    )
    model = getattr(transformers, f"{request.param}ForSequenceClassification")(config).train()
    with torch.no_grad():  # as published: of normal size, or attention sees nothing
        for weight in find_weights(model).values():
            weight.normal_(std=0.3)
    return model


def texts(filler: int = 0) -> list[dict[str, Tensor]]:
    """Three batches; of padding, what stands there."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for length in (5, 7, 9):
        tokens = torch.randint(2, 20, (8, length), generator=generator)
        mask = torch.arange(length) < torch.randint(2, length + 1, (8, 1), generator=generator)
        tokens[~mask] = filler
        found.append({"input_ids": tokens, "attention_mask": mask.long()})
    return found


@pytest.mark.parametrize("pattern, sparsity", [("unstructured", 0.7), ("2:4", 0.5)])
def test_every_linear_layer_of_the_encoder_is_pruned_alike(model, pattern, sparsity):
    before = snapshot(model)
    result = prune_as_sparsegpt(model, texts(), sparsity, pattern)
    weights = find_weights(model)
    assert result.model is model and model.training
    assert result.masks.keys() == weights.keys() and len(weights) == 12
    for (name, weight), layer in zip(weights.items(), result.report.layers, strict=True):
        assert torch.equal(weight != 0, result.masks[name]) and layer.name == name
        assert int((weight == 0).sum()) == layer.pruned == round(sparsity * weight.numel())
        if pattern == "2:4":
            assert ((weight != 0).view(-1, 4).sum(dim=1) == 2).all()
    rest = {name: value for name, value in model.state_dict().items() if name not in weights}
    assert all(torch.equal(value, before[name]) for name, value in rest.items())


def test_a_model_stays_at_sparsity_0(model):
    before = snapshot(model)
    prune_as_sparsegpt(model, texts(), 0.0)
    assert unchanged(model, before)


def test_each_block_sees_the_model_pruned_so_far(model):
    """By hand: the inputs of a block's matrices in the whole model, when the blocks before it are
    pruned and it and those after it are not."""
    by_hand = copy.deepcopy(model).eval()
    prune_as_sparsegpt(model, texts(), 0.7, dtype=torch.float64)
    real = [batch["attention_mask"].bool() for batch in texts()]
    for block in (".layer.0.", ".layer.1."):
        weights = {n: weight for n, weight in find_weights(by_hand).items() if block in n}
        inputs: dict[str, list[Tensor]] = {name: [] for name in weights}
        with ExitStack() as hooks, torch.no_grad():
            for name, seen in inputs.items():
                module = by_hand.get_submodule(name.removesuffix(".weight"))
                note = partial(lambda seen, module, args: seen.append(args[0]), seen)
                hooks.enter_context(module.register_forward_pre_hook(note))
            for batch in texts():
                by_hand(**batch)
        for name, weight in weights.items():
            x = torch.cat([x[at] for x, at in zip(inputs[name], real, strict=True)]).double()
            weight.data.copy_(sweep(weight.detach(), x.T @ x, 0.7)[0])
            torch.testing.assert_close(model.get_parameter(name), weight, msg=name)


def test_padding_does_not_count(model):
    other = copy.deepcopy(model)
    prune_as_sparsegpt(model, texts(filler=0), 0.5)
    prune_as_sparsegpt(other, texts(filler=7), 0.5)
    for name, weight in find_weights(model).items():
        torch.testing.assert_close(weight, other.get_parameter(name))


# ---- as a way of an experiment -----------------------------------------------------


class Task:
    """What the runner asks of a task."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def evaluate(self, model: nn.Module, part: str) -> Evaluation:
        """Accuracy: the mean share of zeros, to see what was evaluated."""
        zeros = [float((weight == 0).float().mean()) for weight in find_weights(model).values()]
        return Evaluation(sum(zeros) / len(zeros), 0.0)


def test_an_experiment_prunes_with_it_and_puts_the_weights_back(monkeypatch, model):
    task, asked, rows = Task(model), [], []
    monkeypatch.setattr(run, "load_task", lambda *where: task)

    def batches_of(count, texts_per_grad):
        asked.append((count, texts_per_grad))
        return texts()

    monkeypatch.setattr(prune_once, "loss_and_batches", lambda *args: (None, batches_of))
    before = snapshot(model)
    point = {
        "model": "m", "data": "trec", "seed": 0, "texts": 64, "texts_per_grad": 16,
        "pattern": "unstructured", "sparsity": 0.5, "selection": "sparsegpt",
    }  # fmt: skip
    run.measure([point], [], None, lambda point, row: rows.append(row))
    assert asked == [(4, 16)] and unchanged(model, before)
    assert rows[0]["dense"] == 0 and rows[0]["test_accuracy"] == pytest.approx(0.5)
    assert rows[0]["fisher_seconds"] > 0 < rows[0]["selection_seconds"]
