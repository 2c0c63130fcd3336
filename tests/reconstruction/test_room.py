"""Memory: what is planned, and fewer samples where it does not hold all."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, unchanged

from obert_kernels import prune
from obert_kernels.gradients.batches import samples_in
from obert_kernels.reconstruction.memory import planned_bytes, that_fit
from obert_kernels.reconstruction.structure import Chain, Layer, Structure, Unit

OPTIONS = {"num_grads": 24, "block_size": 8, "damping": 1e-4}


def structure():
    """Of a block that computes 7 outputs from 5 inputs."""
    weight = torch.nn.Parameter(torch.zeros(7, 5))
    return Structure([Unit(None, 0, [[Layer("w", torch.nn.Linear(5, 7), weight, None)]])], {}, 4)


def test_all_samples_where_there_is_room():
    data, held = [torch.zeros(6, 3), torch.zeros(4, 3)], [torch.zeros(2, 3)]
    tokens = 12 * 3.0
    room = int(4 * tokens * (7 + 2 * 5))
    assert that_fit(data, held, room, 3.0, structure()) is data
    fewer = that_fit(data, held, room - 1, 3.0, structure())
    assert 0 < sum(samples_in(batch) for batch in fewer) < 10


@pytest.mark.parametrize(("chain", "outputs"), [(None, 7), (Chain([], [], True), 2 * 7)])
def test_of_blocks_that_run_alone_the_pruned_outputs_are_kept_too(chain, outputs):
    batch = {"input_ids": torch.zeros(6, 9), "attention_mask": torch.ones(6, 9)}
    found = structure()
    found.units[0].chain = chain
    room = 4 * (outputs + 2 * 5) * 6 * 9
    assert that_fit([batch], [], room, 1.0, found)[0] is batch
    assert samples_in(that_fit([batch], [], room // 2, 1.0, found)[0]) == 3


def test_one_sample_at_least():
    (batch,) = that_fit([torch.zeros(6, 3)], [], 1, 3.0, structure())
    assert len(batch) == 1


def test_fewer_samples_are_said_and_do():
    model = TinyEncoder()
    needed = prune(model, batches(), 0.5, **OPTIONS).report.memory
    assert needed["reconstruction"] == planned_bytes(
        {n: w for n, w in model.named_parameters() if n.startswith("layer") and w.dim() == 2}
    )
    limit = needed["gram"] + needed["gathered gradients"] + needed["other"]
    other = TinyEncoder()
    report = prune(other, batches(), 0.5, max_memory=limit, **OPTIONS).report
    assert report.memory["passes"] == 1
    assert any("fewer were taken" in note for note in report.notes)


def test_no_room_at_all_is_said_before_the_work():
    model = TinyEncoder(width=64)
    before = snapshot(model)
    with pytest.raises(MemoryError, match="leave the reconstruction out"):
        prune(model, batches(), 0.5, max_memory=500_000, **OPTIONS)
    assert unchanged(model, before)
    prune(model, batches(), 0.5, max_memory=1_000_000, reconstruction=None, **OPTIONS)
