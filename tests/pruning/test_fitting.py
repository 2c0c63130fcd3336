"""The fit after a pruning step: on which batches, what it leaves alone, and all or nothing."""

from __future__ import annotations

import pytest
from interrupts import differences, state_of
from tiny import TinyEncoder, batches
from torch import nn

from obert_kernels import prune

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
