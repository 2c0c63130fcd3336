"""Gradients of groups of samples by hooks, and by a backward pass for every group."""

from __future__ import annotations

import torch

from obert_kernels.gradients.batches import split_batch
from obert_kernels.gradients.losses import model_loss
from obert_kernels.gradients.per_samples import GroupGradients


def by_hooks(model, data, weights, count, group, loss_fn=None, at_once=32):
    groups = GroupGradients(model, weights, group, loss_fn, at_once)
    groups.check(data[0])
    found = {name: [] for name in weights}
    for _ in groups.run(data, count, lambda name, rows: found[name].append(rows.clone())):
        pass
    return {name: torch.cat(rows) for name, rows in found.items()}


def by_autograd(model, data, weights, count, group, loss_fn=None):
    """A backward pass for every group."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    rows = {name: [] for name in weights}
    pieces = [piece for batch in data for piece in split_batch(batch, group)][:count]
    assert len(pieces) == count
    for piece in pieces:
        loss = (loss_fn or model_loss)(model, piece)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for (name, weight), gradient in zip(weights.items(), found, strict=True):
            rows[name].append(torch.zeros_like(weight) if gradient is None else gradient)
    for module, mode in modes.items():
        module.training = mode
    return {name: torch.stack(rows[name]).flatten(1) for name in weights}


def assert_same(model, data, weights, count, group, loss_fn=None, tolerance=1e-5):
    expected = by_autograd(model, data, weights, count, group, loss_fn)
    found = by_hooks(model, data, weights, count, group, loss_fn)
    for name, rows in expected.items():
        assert found[name].shape == rows.shape
        for row, known in zip(found[name], rows, strict=True):
            assert (row.float() - known.float()).norm() <= tolerance * known.float().norm()
