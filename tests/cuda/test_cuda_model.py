"""Whole prunings by the CUDA kernels, executed on the host, beside those of the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import TinyEncoder, batches

from obert_kernels import prune


@pytest.mark.parametrize(
    "options",
    [
        {"update": "sum"},
        {"update": "joint"},
        {"samples_per_grad": 2, "pattern": "block4"},
        {"steps": 3, "num_grads": 8, "damping": 1e-3},
        {"pattern": "2:4", "sparsity": 0.5, "block_size": 48},
    ],
    ids=str,
)
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
