"""Whole prunings by the CUDA kernels, on the host and on a device, beside those of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from devices import CUDA
from tiny import TinyEncoder, batches

from obert_kernels import Pruner, PruningConfig, prune

OPTIONS = [
    {"update": "sum"},
    {"update": "joint"},
    {"samples_per_grad": 2, "pattern": "block4"},
    {"steps": 3, "num_grads": 8, "damping": 1e-3},
    {"pattern": "2:4", "sparsity": 0.5, "block_size": 48},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_model_is_pruned_as_on_the_cpu(cuda_on_host, monkeypatch, options):
    torch.manual_seed(5)
    model = TinyEncoder()
    pruned = {}
    for where in ("device", "cpu"):
        if where == "cpu":
            monkeypatch.undo()
        else:
            cuda_on_host.reset_counters()
        pruned[where] = prune(
            copy.deepcopy(model), batches(),
            **{"sparsity": 0.6, "num_grads": 24, "block_size": 50, **options},
        )  # fmt: skip
        if where == "device":
            assert cuda_on_host.counters()["load_bytes"] > 0
    assert pruned["device"].report.sparsity == pruned["cpu"].report.sparsity
    for name, mask in pruned["cpu"].masks.items():
        assert torch.equal(mask, pruned["device"].masks[name])
    for a, b in zip(
        pruned["device"].model.parameters(), pruned["cpu"].model.parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def batches_on(device):
    return [{name: t.to(device) for name, t in batch.items()} for batch in batches()]


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_model_on_a_device_is_pruned_as_on_the_cpu(options):
    options = {"sparsity": 0.6, "num_grads": 24, "block_size": 50, "damping": 1e-3, **options}
    torch.manual_seed(5)
    model = TinyEncoder()
    here = prune(copy.deepcopy(model), batches(), **options)
    there = prune(copy.deepcopy(model).to(CUDA), batches_on(CUDA), **options)
    assert there.report.sparsity == here.report.sparsity
    weights = dict(here.model.named_parameters())
    # Gradients differ in their last bits, and so the order of weights that nearly tie.
    for name, mask in here.masks.items():
        found = there.masks[name]
        assert found.device.type == torch.device(CUDA).type
        assert (found.cpu() == mask).float().mean() > 0.99
        same, new = found.cpu() == mask, there.model.get_parameter(name).detach().cpu()
        torch.testing.assert_close(new[same], weights[name].detach()[same], rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
def test_steps_on_a_device():
    """The damping chosen by trials, then a Fisher of the remaining weights, then little memory."""
    torch.manual_seed(0)
    model = TinyEncoder().to(CUDA)
    pruner = Pruner(model, PruningConfig())
    for sparsity in (0.5, 0.9):
        report = pruner.step(sparsity, batches_on(CUDA))
        assert abs(report.sparsity - sparsity) < 0.01 and report.damping_trials
    report = prune(
        TinyEncoder().to(CUDA), batches_on(CUDA), 0.8, num_grads=24, damping=1e-3,
        max_memory=80_000,
    ).report  # fmt: skip
    assert report.memory["passes"] > 1
