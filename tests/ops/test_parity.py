"""Parity with the reference algorithm, written out here from its published formulas.

Its inverse is updated gradient by gradient in float32; its scores and updates divide by
diag + eps; its 4-block form solves the 4 x 4 blocks; the update is the sum of single ones.
"""

import pytest
import torch
from problems import gradients, relative_error
from tiny import TinyEncoder, batches

from obert_kernels import (
    EmpiricalBlockFisherInverse,
    GramFisher,
    find_weights,
    model_loss,
    prune,
    select_masks,
)

EPS = torch.finfo(torch.float32).eps


class PlainReference:
    """The reference algorithm in plain torch, in the type asked for."""

    def __init__(self, m, block_size, d, damp, dtype=torch.float32):
        self.m, self.size, self.d = m, block_size, d
        self.blocks = -(-d // block_size)
        self.f_inv = (torch.eye(block_size, dtype=dtype) / damp).repeat(self.blocks, 1, 1)

    def padded(self, v):
        return torch.cat([v, v.new_zeros(self.blocks * self.size - self.d)]).view(-1, self.size)

    def add_grad(self, g):
        g = self.padded(g.to(self.f_inv.dtype))
        fg = torch.einsum("bij,bj->bi", self.f_inv, g)
        alpha = (self.m + torch.einsum("bi,bi->b", g, fg)).sqrt()
        fg = fg / alpha[:, None]
        self.f_inv -= fg[:, :, None] * fg[:, None, :]

    def diag(self):
        return self.f_inv.diagonal(dim1=1, dim2=2).flatten()[: self.d]

    def mul(self, v):
        product = torch.bmm(self.f_inv, self.padded(v)[:, :, None])
        return product.flatten()[: self.d]

    def scores(self, w):
        return w**2 / (2 * self.diag() + EPS)

    def update(self, w, pruned):
        return (w - self.mul(w * pruned / (self.diag() + EPS))) * ~pruned

    def groups(self, c):
        """[groups, c, c] diagonal blocks of the inverse."""
        split = self.f_inv.view(self.blocks, self.size // c, c, self.size // c, c)
        return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, c, c)[: self.d // c]

    def group_scores(self, w, c):
        q = w.view(-1, c, 1)
        return 0.5 * (q.mT @ torch.linalg.solve(self.groups(c), q)).flatten()

    def group_update(self, w, pruned, c):
        q = (w * pruned).view(-1, c, 1)
        return (w - self.mul(torch.linalg.solve(self.groups(c), q).flatten())) * ~pruned


@pytest.fixture(params=[(50, 200), (50, 211), (32, 64), (1, 10), (64, 40)], ids=str)
def both(request):
    block_size, d = request.param
    g = gradients(64, d, 1e-3)
    ours = EmpiricalBlockFisherInverse(64, block_size, d, 1e-6)
    theirs = PlainReference(64, block_size, d, 1e-6, torch.float64)
    for row in g:
        ours.add_grad(row)
        theirs.add_grad(row)
    return ours, theirs, d


def test_interface_of_the_class(both):
    ours, theirs, d = both
    assert (ours.m, ours.d, ours.damp, ours.num_blocks) == (64, d, 1e-6, theirs.blocks)
    assert ours.f_inv.shape == theirs.f_inv.shape and ours.f_inv.dtype == torch.float32
    assert relative_error(ours.f_inv, theirs.f_inv) < 1e-6
    assert relative_error(ours.diag(), theirs.diag()) < 1e-6
    v = torch.randn(d)
    assert relative_error(ours.mul(v), theirs.mul(v.double())) < 1e-6
    assert ours.mul(v.bfloat16()).dtype == torch.float32
    for call in (ours.add_grad, ours.mul):
        with pytest.raises(ValueError, match=f"must have {d} values"):
            call(torch.zeros(d + 1))


def test_reading_between_gradients(both):
    """m is fixed at construction, and reading early must not disturb the rest."""
    _, _, d = both
    g = gradients(20, d, 1e-3)
    ours, theirs = EmpiricalBlockFisherInverse(64, 50, d, 1e-6), PlainReference(64, 50, d, 1e-6)
    assert relative_error(ours.diag(), theirs.diag()) < 1e-6
    for i, row in enumerate(g):
        ours.add_grad(row.view(1, -1))
        theirs.add_grad(row)
        if i in (0, 3, 17):
            assert relative_error(ours.diag(), theirs.diag()) < 1e-4
    assert relative_error(ours.f_inv, theirs.f_inv) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_gradient_is_copied_when_it_is_added(dtype):
    """Its memory is used again, as that of ``.grad`` is; large ones are copied in pieces."""
    d = 150_001
    ours, expected = EmpiricalBlockFisherInverse(40, 20, d, 1e-3), GramFisher(d, 20)
    g = torch.empty(d, 2, dtype=dtype)
    for i in range(40):
        g.normal_()
        row = g[:, i % 2] if i < 20 else g[:, 0].contiguous()
        ours.add_grad(row)
        expected.accumulate(row.clone())
        row.zero_()
        g.zero_()
    torch.testing.assert_close(ours.diag(), expected.diagonal(1e-3), rtol=1e-6, atol=0)


def setup_pair(d=400, block_size=40, damping=1e-6):
    g = gradients(64, d, 1e-3)
    fisher = GramFisher(d, block_size)
    fisher.accumulate(g)
    theirs = PlainReference(64, block_size, d, damping, torch.float64)
    for row in g:
        theirs.add_grad(row)
    return fisher, theirs, torch.randn(d, dtype=torch.float64), damping


@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.9])
def test_unstructured_scores_masks_and_update(sparsity):
    fisher, theirs, w, damping = setup_pair()
    scores = fisher.scores(w, damping)
    assert relative_error(scores, theirs.scores(w)) < 1e-6
    keep = torch.ones(400, dtype=torch.bool)
    mask = select_masks({"w": scores}, {"w": keep}, sparsity)["w"]
    threshold = theirs.scores(w).sort().values[round(sparsity * 400) - 1]
    assert torch.equal(~mask, theirs.scores(w) <= threshold)
    new, _ = fisher.update(w, mask, damping, rule="sum")
    assert relative_error(new, theirs.update(w, ~mask)) < 1e-9


@pytest.mark.parametrize("c", [2, 4, 8])
def test_group_scores_masks_and_update(c):
    fisher, theirs, w, damping = setup_pair()
    scores = fisher.scores(w, damping, c)
    assert relative_error(scores, theirs.group_scores(w, c)) < 1e-6
    keep = torch.ones(400, dtype=torch.bool)
    mask = select_masks({"w": scores}, {"w": keep}, 0.5, c)["w"]
    lowest = theirs.group_scores(w, c).argsort()[: 200 // c]
    assert set((~mask.view(-1, c)[:, 0]).nonzero().flatten().tolist()) == set(lowest.tolist())
    new, _ = fisher.update(w, mask, damping, c, "sum")
    assert relative_error(new, theirs.group_update(w, ~mask, c)) < 1e-9


def test_a_model_is_pruned_as_by_the_reference():
    """Its masks in one ranking, its weights; from gradients of the loss, batch by batch."""
    model, data, m = TinyEncoder(), batches(24), 24
    weights = find_weights(model)
    known = {
        name: PlainReference(m, 10, weight.numel(), 1e-4, torch.float64)
        for name, weight in weights.items()
    }
    model.eval()
    for batch in data:
        found = torch.autograd.grad(model_loss(model, batch), list(weights.values()))
        for reference, gradient in zip(known.values(), found, strict=True):
            reference.add_grad(gradient.flatten())
    flat = {name: weight.detach().flatten().double() for name, weight in weights.items()}
    scores = torch.cat([reference.scores(flat[name]) for name, reference in known.items()])
    bar = scores.sort().values[round(0.6 * len(scores)) - 1]
    expected = {}
    for name, reference in known.items():
        pruned = reference.scores(flat[name]) <= bar
        expected[name] = (pruned, reference.update(flat[name], pruned))
    result = prune(
        model, data, 0.6, num_grads=m, damping=1e-4, block_size=10, selection="diagonal",
        update="sum", loss_fn=model_loss, reconstruction=None,
    )  # fmt: skip
    for name, (pruned, new) in expected.items():
        assert torch.equal(result.masks[name].flatten(), ~pruned)
        assert relative_error(weights[name].detach().flatten(), new) < 1e-5
