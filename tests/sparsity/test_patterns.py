"""Shapes of masks: names, order of the weights, and groups along either dimension."""

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, unchanged
from torch import nn

from obert_kernels import GramFisher, estimate_fisher, find_weights, prune
from obert_kernels.pruning.saliencies import Problem
from obert_kernels.sparsity.patterns import find_pattern


def test_names():
    sizes = {"unstructured": 1, "block4": 4, "block16": 16, "block1x8": 8, "block16x1": 16}
    for name, size in sizes.items():
        pattern = find_pattern(name)
        assert pattern.group_size == size
        assert pattern.by_column == (name == "block16x1")
    for bad in ("block0", "4block", "block", "blocks", "", "block2x2", "block4x", "blockx4"):
        with pytest.raises(ValueError, match="pattern must be"):
            find_pattern(bad)


@pytest.mark.parametrize("name", ["unstructured", "block4", "block4x1"])
def test_flat_and_back(name):
    pattern = find_pattern(name)
    matrix = torch.arange(24.0).view(4, 6)
    flat = pattern.flat(matrix)
    assert torch.equal(pattern.matrix(flat, matrix), matrix)
    expected = [0, 6, 12, 18] if name == "block4x1" else [0, 1, 2, 3]
    assert flat[:4].tolist() == expected


class Turned(nn.Module):
    """A model whose matrix is the transpose of another's."""

    def __init__(self, weight: torch.Tensor, turned: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.mT.clone() if turned else weight.clone())
        self.turned = turned

    def forward(self, x, y):
        w = self.weight.mT if self.turned else self.weight
        return {"loss": (torch.tanh(x @ w.mT) - y).square().mean()}


@pytest.mark.parametrize("selection", ["greedy", "diagonal", "magnitude"])
@pytest.mark.parametrize("update", ["joint", "sum", "none"])
def test_columns_are_the_rows_of_the_transpose(selection, update):
    weight = torch.randn(8, 6)
    data = [{"x": torch.randn(5, 6), "y": torch.randn(5, 8)} for _ in range(20)]
    arguments = {
        "sparsity": 0.5, "params": "weight", "num_grads": 20, "block_size": 12, "damping": 1e-4,
        "selection": selection, "update": update,
    }  # fmt: skip
    upright, turned = Turned(weight, False), Turned(weight, True)
    found = prune(upright, data, pattern="block4x1", **arguments)
    expected = prune(turned, data, pattern="block4", **arguments)
    torch.testing.assert_close(upright.weight.data, turned.weight.data.mT)
    assert torch.equal(found.masks["weight"], expected.masks["weight"].mT)
    columns = found.masks["weight"].view(2, 4, 6)
    assert torch.equal(columns.any(1), columns.all(1))
    assert int(columns.any(1).sum()) == 6


@pytest.mark.parametrize("samples_per_grad", [None, 2])
def test_streamed_and_gathered_gradients_in_columns(samples_per_grad):
    model, data = TinyEncoder(), batches(24, 2 if samples_per_grad is None else 4)
    found = estimate_fisher(
        model, data, num_grads=24, samples_per_grad=samples_per_grad, block_size=8,
        pattern="block4x1",
    )  # fmt: skip
    by_row = estimate_fisher(
        model, data, num_grads=24, samples_per_grad=samples_per_grad, block_size=1
    )
    for name, weight in find_weights(model).items():
        fisher = found.fishers[name]
        assert isinstance(fisher, GramFisher)
        turned = by_row.fishers[name].gram.view(weight.shape).mT.flatten()
        i = torch.arange(8)
        diagonal = fisher.gram[:, i * (i + 3) // 2].flatten()[: weight.numel()]
        torch.testing.assert_close(diagonal, turned)


def test_an_estimate_by_rows_is_refused_for_columns():
    model = TinyEncoder()
    fisher = estimate_fisher(model, batches(), num_grads=24)
    before = snapshot(model)
    with pytest.raises(ValueError, match="call estimate_fisher with pattern='block4x1'"):
        prune(model, fisher=fisher, pattern="block4x1", damping=1e-4)
    assert unchanged(model, before)


@pytest.mark.parametrize(("name", "sparsity"), [("4:5", 0.2), ("7:10", 0.3), ("9:10", 0.1)])
def test_the_sparsity_of_n_of_m_may_be_given(name, sparsity):
    for given in (sparsity, 1 - (1 - sparsity)):
        assert find_pattern(name).target_sparsity(given) == pytest.approx(sparsity)


def test_groups_must_divide_the_matrix():
    with pytest.raises(
        ValueError, match=r"pattern block5: the 12 columns of layer\.0\.wide\.weight"
    ):
        prune(TinyEncoder(), batches(), pattern="block5")
    with pytest.raises(
        ValueError, match=r"pattern block9x1: the 24 rows of layer\.0\.wide\.weight"
    ):
        prune(TinyEncoder(), batches(), pattern="block9x1")


def test_scores_of_single_weights_are_added_up_by_group():
    given = {"model": None, "weights": {}, "keep": {}, "fishers": {}, "damping": 1.0}
    problem = Problem(
        **given, pattern=find_pattern("block2"), batches=None, loss_fn=None, progress=None
    )
    assert problem.grouped(torch.tensor([[1.0, 2, 3, 4]])).tolist() == [3, 7]
