"""Gradients of groups where layers are shared, recomputed, skipped, or fed in unusual ways."""

import pytest
import torch
from gradients_by_hand import assert_same, by_autograd, by_hooks
from tiny import TinyEncoder, batches
from torch import nn
from torch.utils.checkpoint import checkpoint

from obert_kernels import batch_gradients, estimate_fisher, find_weights, prediction_loss
from obert_kernels.batches import split_batch
from obert_kernels.group_gradients import GroupGradients, NotServed
from obert_kernels.losses import model_loss


class Shared(nn.Module):
    """One layer called twice, two layers with one weight, activations in place."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.twin = nn.Linear(6, 6)
        self.twin.weight = self.first.weight
        self.other = nn.Linear(6, 2)
        self.unused = nn.Linear(6, 6)

    def forward(self, x):
        x = torch.relu_(self.first(x))
        self.unused(x)
        return self.other(self.first(x) + torch.tanh_(self.twin(x)))


def regression(model, batch):
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs), targets)


def test_reused_and_tied_layers():
    model = Shared()
    weights = find_weights(model, "re:.*")
    assert set(weights) == {"first.weight", "other.weight", "unused.weight"}
    data = [(torch.randn(6, 3, 6), torch.randn(6, 3, 2)) for _ in range(2)]
    expected = by_autograd(model, data, weights, 4, 3, regression)
    found = {name: [] for name in weights}
    groups = GroupGradients(model, weights, 3, regression)
    groups.check(data[0])
    for _ in groups.run(data, 4, lambda name, rows: found[name].append(rows.clone())):
        pass
    for name in ("first.weight", "other.weight"):
        torch.testing.assert_close(torch.cat(found[name]), expected[name])
    assert torch.equal(torch.cat(found["unused.weight"]), expected["unused.weight"])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing(reentrant, frozen):
    class Checkpointed(TinyEncoder):
        def forward(self, tokens, labels=None):
            x = self.embedding(tokens)
            for layer in self.layer:
                x = checkpoint(self.run, layer, x, use_reentrant=reentrant)
            logits = self.head(x.mean(dim=1))
            return {"loss": nn.functional.cross_entropy(logits, labels)}

        @staticmethod
        def run(layer, x):
            return x + layer["narrow"](torch.relu(layer["wide"](x)))

    model = Checkpointed()
    data, weights = batches(2, size=6), find_weights(model)
    plain = TinyEncoder()
    plain.load_state_dict(model.state_dict())
    expected = by_autograd(plain, data, find_weights(plain), 4, 3)
    model.requires_grad_(not frozen)
    found = by_hooks(model, data, weights, 4, 3)
    pieces = [piece for batch in data for piece in split_batch(batch, 3)]
    alone = list(batch_gradients(model, pieces, weights, 4))
    for name in weights:
        torch.testing.assert_close(found[name], expected[name])
        rows = torch.stack([gradients[name] for gradients in alone]).flatten(1)
        torch.testing.assert_close(rows, expected[name])


@pytest.mark.parametrize("loss_fn", [model_loss, prediction_loss])
def test_samples_left_out_of_the_loss(loss_fn):
    """The mean of a batch is over those that count, that of a group over its own."""
    data = batches(3, size=6)
    data[1]["labels"][[0, 5]] = -100
    model = TinyEncoder()
    assert_same(model, data, find_weights(model), 9, 2, loss_fn)


class Flattened(TinyEncoder):
    """Texts without padding, one after the other, as fused attention takes them."""

    def forward(self, tokens, lengths, labels):
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        x = self.embedding(tokens[real])
        for layer in self.layer:
            x = x + layer["narrow"](torch.relu(layer["wide"](x)))
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        logits = self.head(x.new_zeros(len(lengths), x.shape[1]).index_add(0, owner, x))
        return {"loss": nn.functional.cross_entropy(logits, labels)}


def test_texts_one_after_the_other_take_a_pass_for_every_group():
    model, data = Flattened(), batches(2, size=4)
    for batch, lengths in zip(data, ([6, 6, 6, 6], [6, 6, 2, 2]), strict=True):
        batch["lengths"] = torch.tensor(lengths)
    with pytest.raises(NotServed, match="for 4 samples"):
        GroupGradients(model, find_weights(model), 2).check(data[0])
    options = {"num_grads": 4, "block_size": 8, "loss_fn": model_loss}
    pieces = [piece for batch in data for piece in split_batch(batch, 2)]
    expected = estimate_fisher(model, pieces, **options)
    found = estimate_fisher(model, data, samples_per_grad=2, **options)
    for name, fisher in expected.fishers.items():
        torch.testing.assert_close(found.fishers[name].gram, fisher.gram)


class SometimesShort(TinyEncoder):
    """The second layer serves only batches whose first token says so."""

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        for layer in self.layer[: 1 + int(tokens[0, 0] % 2)]:
            x = x + layer["narrow"](torch.relu(layer["wide"](x)))
        return {"loss": nn.functional.cross_entropy(self.head(x.mean(dim=1)), labels)}


def test_a_matrix_that_some_batches_do_not_reach_has_gradients_of_zero():
    model, data = SometimesShort(), batches(4, size=4)
    assert len({int(batch["tokens"][0, 0] % 2) for batch in data}) == 2
    weights = find_weights(model)
    for batch in data:  # the groups of a batch take one path
        batch["tokens"][:, 0] = batch["tokens"][0, 0]
    assert_same(model, data, weights, 8, 2)
    options = {"num_grads": 8, "samples_per_grad": 2, "loss_fn": model_loss}
    for fisher in estimate_fisher(model, data, **options).fishers.values():
        assert fisher.num_gradients == 8


def test_a_layer_called_by_keyword():
    class Named(TinyEncoder):
        def forward(self, tokens, labels):
            x = self.embedding(tokens)
            for layer in self.layer:
                x = x + layer["narrow"](input=torch.relu(layer["wide"](input=x)))
            return {"loss": nn.functional.cross_entropy(self.head(x.mean(dim=1)), labels)}

    model = Named()
    assert_same(model, batches(1), find_weights(model), 2, 2)


@pytest.mark.parametrize("samples_per_grad", [None, 2])
def test_a_loss_without_the_weights_is_refused(samples_per_grad):
    model, other = TinyEncoder(), TinyEncoder()
    options = {"samples_per_grad": samples_per_grad, "num_grads": 2}
    with pytest.raises(ValueError, match="batch 0: the loss depends on none of the matrices"):
        estimate_fisher(
            model, batches(), loss_fn=lambda m, b: model.head.bias.sum() + other(**b)["loss"],
            **options,
        )  # fmt: skip


def test_a_later_batch_that_cannot_be_served_is_named():
    model = TinyEncoder()
    data = batches(2)

    def loss_fn(model, batch):
        tokens = batch["tokens"]
        if bool((tokens == data[1]["tokens"][0]).all(dim=1).any()):
            tokens = tokens.T[:5]  # samples along the second dimension
        return model(tokens)["logits"].square().mean()

    with pytest.raises(ValueError, match="for 4 samples; leave samples_per_grad out"):
        estimate_fisher(model, data, samples_per_grad=2, num_grads=4, loss_fn=loss_fn)
