"""Batches to gradients: any kind of batch, the model left as it was, clear errors."""

from typing import NamedTuple

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, unchanged
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from obert_kernels import batch_gradients, estimate_fisher, find_weights


def collect(model, data, count, **kwargs):
    return list(batch_gradients(model, data, find_weights(model), count, **kwargs))


def test_gradients_are_those_of_autograd_in_eval_mode():
    model, data = TinyEncoder(), batches(3)
    found = collect(model, data, 3)
    model.eval()
    for batch, gradients in zip(data, found, strict=True):
        model.zero_grad()
        model(**batch)["loss"].backward()
        for name, weight in find_weights(model).items():
            torch.testing.assert_close(gradients[name], weight.grad)


def test_the_model_is_left_as_it_was():
    model = TinyEncoder()
    model.layer[0].eval()
    model.layer[1]["wide"].weight.requires_grad_(False)
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.layer[0]["wide"].weight.grad = torch.ones_like(model.layer[0]["wide"].weight)
    modes = [m.training for m in model.modules()]
    before = snapshot(model)
    with torch.no_grad():
        found = collect(model, batches(), 5)
    assert found[0]["layer.1.wide.weight"].abs().sum() > 0, "frozen weights are pruned too"
    assert [m.training for m in model.modules()] == modes
    assert not model.layer[1]["wide"].weight.requires_grad
    assert model.head.weight.grad.eq(1).all(), "a training step under way loses nothing"
    assert model.layer[0]["wide"].weight.grad.eq(1).all()
    assert unchanged(model, before)


def test_the_model_is_left_as_it_was_after_an_error():
    model = TinyEncoder()
    data = batches(3)
    data[1] = {"tokens": data[1]["tokens"]}
    with pytest.raises(TypeError, match="returned no loss for a batch with the keys"):
        collect(model, data, 3)
    assert all(m.training for m in model.modules())


def test_loss_fn_and_plain_loader():
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    loader = DataLoader(TensorDataset(torch.randn(12, 5), torch.randint(0, 2, (12,))), 4)

    def loss_fn(model, batch):
        inputs, labels = batch
        return nn.functional.cross_entropy(model(inputs), labels)

    weights = find_weights(model, "re:.*weight")
    assert len(list(batch_gradients(model, loader, weights, 7, loss_fn))) == 7
    with pytest.raises(TypeError, match="needs loss_fn"):
        next(batch_gradients(model, loader, weights, 1))


class Pair(NamedTuple):
    tokens: torch.Tensor
    labels: torch.Tensor


def test_batches_may_be_named_tuples():
    """As a DataLoader makes them of samples that are."""
    model = TinyEncoder()
    data = [Pair(**batch) for batch in batches(2)]

    def loss_fn(model, batch):
        return model(batch.tokens, batch.labels)["loss"]

    for samples_per_grad in (None, 2):
        options = {"num_grads": 2, "samples_per_grad": samples_per_grad, "loss_fn": loss_fn}
        assert estimate_fisher(model, data, **options).fishers


def test_unused_weights_have_zero_gradients():
    model = TinyEncoder()
    model.unused = nn.Linear(3, 3)
    weights = find_weights(model, ["unused", "layer.0.wide"])
    gradients = next(batch_gradients(model, batches(), weights, 1))
    assert not gradients["unused.weight"].any() and gradients["layer.0.wide.weight"].any()


def test_too_few_batches():
    model = TinyEncoder()
    assert len(collect(model, batches(3), 8)) == 8
    with pytest.raises(ValueError, match="ended after 3 of num_grads=8"):
        collect(model, iter(batches(3)), 8)

    class ReadOnce:
        """As a progress bar around an iterator."""

        def __init__(self):
            self.left = iter(batches(3))

        def __iter__(self):
            yield from self.left

    with pytest.raises(ValueError, match="ended after 3 of num_grads=8"):
        collect(model, ReadOnce(), 8)
    with pytest.raises(ValueError, match="batches is empty"):
        collect(model, [], 8)


def test_bad_values_are_named():
    model, data = TinyEncoder(), batches(4)
    with pytest.raises(ValueError, match="batch 0: the loss is nan"):
        collect(model, data, 1, loss_fn=lambda m, b: m(**b)["loss"] * float("nan"))
    with pytest.raises(ValueError, match="must be a scalar"):
        collect(model, data, 1, loss_fn=lambda m, b: m(**b)["logits"])
    with pytest.raises(ValueError, match="has no gradient"):
        collect(model, data, 1, loss_fn=lambda m, b: m(**b)["loss"].detach())

    def explode(model, batch):
        loss = model(**batch)["loss"]
        weight = model.layer[1]["narrow"].weight
        # sqrt has an infinite slope at zero: the loss is finite, the gradient is not
        return loss + (weight * 0).abs().sum().sqrt()

    with pytest.raises(ValueError, match=r"batch 0: the gradient of layer\.1\.narrow\.weight"):
        collect(model, data, 1, loss_fn=explode)
