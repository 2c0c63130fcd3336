"""Gradients of zero say nothing: an error where all are, a note where those of a matrix are."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, unchanged

from obert_kernels import estimate_fisher, prune

SMALL = {"num_grads": 6, "block_size": 12}


def constant(model, batch):
    return model(**batch)["loss"] * 0 + 1.0


def tiny_loss(model, batch):
    return model(**batch)["loss"] * 1e-30


class HalfUsed(TinyEncoder):
    """Its second layer counts for nothing."""

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        x = x + self.layer[0]["narrow"](torch.relu(self.layer[0]["wide"](x)))
        y = self.layer[1]["narrow"](torch.relu(self.layer[1]["wide"](x)))
        loss = torch.nn.functional.cross_entropy(self.head((x + 0 * y).mean(dim=1)), labels)
        return {"loss": loss}


HALF = r"all gradients of layer\.1\.wide\.weight, layer\.1\.narrow\.weight are zero"


@pytest.mark.parametrize("damping", [1e-6, "auto"])
@pytest.mark.parametrize(
    "options", [{}, {"samples_per_grad": 2}, {"max_memory": 60_000}, {"scope": "layer"}]
)
def test_a_fisher_of_zeros_is_refused(damping, options):
    model = TinyEncoder()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"^all gradients of layer\.0\.wide.* and 1 more are zero"):
        prune(model, batches(), 0.5, loss_fn=constant, damping=damping, **SMALL, **options)
    assert unchanged(model, before)


def test_an_estimate_of_zeros_is_refused():
    with pytest.raises(ValueError, match="are zero, which says nothing about any weight"):
        estimate_fisher(TinyEncoder(), batches(), loss_fn=constant, **SMALL)
    half = estimate_fisher(HalfUsed(), batches(), **SMALL)
    assert len(half.notes) == 1
    with pytest.raises(ValueError, match=HALF):  # of the matrices that this call prunes
        prune(HalfUsed(), sparsity={"re:layer.1": 0.5}, fisher=half, damping=1e-6)


def test_float16_underflow_is_found():
    with pytest.raises(ValueError, match="float16 loses small gradients"):
        prune(TinyEncoder(dtype=torch.float16), batches(), 0.5, loss_fn=small_in_half, damping=1e-6,
              **SMALL)  # fmt: skip


def small_in_half(model, batch):
    return model(**batch)["loss"] * 1e-7


def test_squares_that_a_float32_fisher_cannot_hold_are_found():
    options = {"loss_fn": tiny_loss, "damping": 1e-60, **SMALL}
    with pytest.raises(ValueError, match="a float32 Fisher their squares"):
        prune(TinyEncoder(), batches(), 0.5, fisher_dtype=torch.float32, **options)
    assert not prune(TinyEncoder(), batches(), 0.5, **options | {"damping": 1e-62}).report.notes


@pytest.mark.parametrize("damping", [1e-6, "auto"])
@pytest.mark.parametrize("options", [{}, {"samples_per_grad": 2}, {"max_memory": 60_000}])
def test_matrices_that_count_for_nothing_are_noted(damping, options):
    report = prune(HalfUsed(), batches(), 0.5, damping=damping, **SMALL, **options).report
    (note,) = (note for note in report.notes if "are zero" in note)
    assert note.startswith("all gradients of layer.1.wide.weight, layer.1.narrow.weight are zero")
    assert note in str(report)


def test_a_matrix_without_weights_needs_no_gradients():
    model = TinyEncoder()
    with torch.no_grad():
        model.layer[0]["wide"].weight.zero_()
    assert not prune(model, batches(), 0.6, damping=1e-6, **SMALL).report.notes
