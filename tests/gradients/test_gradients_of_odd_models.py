"""Gradients of groups where layers are shared, recomputed, skipped, or fed in unusual ways."""

import pytest
import torch
from gradients_by_hand import assert_same, by_autograd, by_hooks
from tiny import TinyEncoder, batches
from torch import nn
from torch.utils.checkpoint import checkpoint

from obert_kernels import batch_gradients, estimate_fisher, find_weights, prediction_loss, prune
from obert_kernels.gradients.batches import split_batch
from obert_kernels.gradients.losses import model_loss
from obert_kernels.gradients.per_samples import GroupGradients, NotServed


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


class Patches(nn.Module):
    """Starts with a convolution, or with parameters of its own; most of it is checkpointed."""

    def __init__(self, start):
        super().__init__()
        if start == "convolution":
            self.patch = nn.Conv1d(1, 8, 2, stride=2)
        else:
            self.patch = lambda pixels: pixels.unflatten(2, (4, 2)).mean(dim=3).expand(-1, 8, -1)
        self.position = nn.Parameter(torch.randn(4, 8))
        self.layer = nn.ModuleList(nn.ModuleDict({"wide": nn.Linear(8, 8)}) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, pixels, labels):
        x = self.patch(pixels[:, None]).mT + self.position
        for layer in self.layer[:2]:
            x = checkpoint(
                lambda x, layer=layer: x + layer["wide"](x).tanh(), x, use_reentrant=True
            )
        logits = self.head((x + self.layer[2]["wide"](x).tanh()).mean(dim=1))
        return {"loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("start", ["convolution", "parameter"])
def test_checkpoints_behind_something_else_than_an_embedding(start):
    model = Patches(start)
    data = [{"pixels": torch.randn(6, 8), "labels": torch.arange(6) % 2} for _ in range(2)]
    weights = find_weights(model)
    pieces = [piece for batch in data for piece in split_batch(batch, 3)]
    expected = {name: [] for name in weights}
    for piece in pieces:  # as in training
        model.zero_grad()
        model(**piece)["loss"].backward()
        for name, weight in weights.items():
            expected[name].append(weight.grad.flatten().clone())
    model.zero_grad()
    found = by_hooks(model, data, weights, 4, 3)
    assert all(parameter.grad is None for parameter in model.parameters())
    alone = list(batch_gradients(model, pieces, weights, 4))
    for name in weights:
        rows = torch.stack(expected[name])
        assert rows.norm() > 0
        torch.testing.assert_close(found[name], rows)
        torch.testing.assert_close(torch.stack([g[name].flatten() for g in alone]), rows)


@pytest.mark.parametrize("loss_fn", [model_loss, prediction_loss])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("at", [0, 1])
def test_samples_left_out_of_the_loss(loss_fn, group, at):
    """The mean of a batch is over those that count, that of a group over its own."""
    data = batches(3, size=6)
    model = TinyEncoder()
    data[at]["labels"][[0, 5]] = -100
    weights = find_weights(model)
    found = by_hooks(model, data, weights, 18 // group, group, loss_fn)
    pieces = [piece for batch in data for piece in split_batch(batch, group)]
    counted = [bool((piece["labels"] >= 0).any()) for piece in pieces]
    assert all(counted) == (group == 2)
    some = [piece for piece, counts in zip(pieces, counted, strict=True) if counts]
    expected = by_autograd(model, some, weights, len(some), group, loss_fn)
    for name, rows in found.items():
        torch.testing.assert_close(rows[counted], expected[name])
        assert not rows[[not counts for counts in counted]].any()
    options = {"num_grads": 18 // group, "loss_fn": loss_fn}
    estimate = estimate_fisher(model, data, samples_per_grad=group, **options)
    assert "some batches took a backward pass for every gradient" in estimate.notes[0]
    for name, fisher in estimate_fisher(model, pieces, **options).fishers.items():
        torch.testing.assert_close(estimate.fishers[name].gram, fisher.gram)


@pytest.mark.parametrize("group", [None, 2])
def test_labels_that_a_loss_does_not_look_at_leave_nothing_out(group):
    def distil(model, batch):
        return model(batch["tokens"])["logits"].square().mean()

    model, data = TinyEncoder(), batches(3, size=6)
    marked = [{**batch, "labels": torch.full((6,), -100)} for batch in data]
    options = {"num_grads": 3, "samples_per_grad": group, "loss_fn": distil}
    expected = estimate_fisher(model, data, **options).fishers
    for name, fisher in estimate_fisher(model, marked, **options).fishers.items():
        assert fisher.gram.any()
        torch.testing.assert_close(fisher.gram, expected[name].gram)


@pytest.mark.parametrize("loss_fn", [model_loss, prediction_loss])
@pytest.mark.parametrize("group", [None, 2, 6])
def test_a_fisher_of_nothing_is_refused(loss_fn, group):
    data = [{**batch, "labels": torch.full((6,), -100)} for batch in batches(3, size=6)]
    options = {"num_grads": 3, "samples_per_grad": group, "loss_fn": loss_fn}
    with pytest.raises(ValueError, match=r"all labels of all batches are -100.*without labels"):
        estimate_fisher(TinyEncoder(), data, **options)
    data[2]["labels"][5] = 0
    options["num_grads"] = 3 if group is None else 18 // group
    assert estimate_fisher(TinyEncoder(), data, **options).fishers


def test_a_sum_over_samples_is_no_mean_wherever_some_are_left_out():
    def loss_fn(model, batch):
        logits = model(batch["tokens"])["logits"]
        return nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")

    model, data = TinyEncoder(), batches(1, size=6)
    data[0]["labels"][0] = -100
    with pytest.raises(NotServed, match="when they are alone"):
        GroupGradients(model, find_weights(model), 1, loss_fn).check(data[0])


def test_numbers_that_are_no_labels_leave_nothing_out():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ModuleList([nn.Linear(6, 6)])

        def forward(self, pixels, labels):
            return {"loss": (self.layer[0](pixels.float()).mean(dim=1) - labels).square().mean()}

    data = [{"pixels": torch.full((4, 6), 156, dtype=torch.uint8), "labels": torch.randn(4)}]
    assert not estimate_fisher(Pixels(), data, samples_per_grad=2, num_grads=2).notes


def test_samples_left_out_of_a_loss_of_tuples():
    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0])["logits"], batch[1])

    data = [(batch["tokens"], batch["labels"]) for batch in batches(2)]
    data[1][1][1] = -100
    model = TinyEncoder()
    assert_same(model, data, find_weights(model), 4, 2, loss_fn)


class Flattened(TinyEncoder):
    """Texts without padding, one after the other, as fused attention takes them."""

    def forward(self, tokens, lengths, labels, hot=None):
        real = torch.arange(tokens.shape[1]) < lengths[:, None]
        x = self.embedding(tokens[real])
        for layer in self.layer:
            x = x + layer["narrow"](torch.relu(layer["wide"](x)))
        owner = torch.arange(len(lengths)).repeat_interleave(lengths)
        logits = self.head(x.new_zeros(len(lengths), x.shape[1]).index_add(0, owner, x))
        return {"loss": nn.functional.cross_entropy(logits, labels)}


@pytest.mark.parametrize("first", [[6, 6, 6, 6], [6, 6, 2, 2]])
@pytest.mark.parametrize("hot", [False, True])
def test_texts_one_after_the_other_take_a_pass_for_every_group(first, hot):
    """Where they are of different lengths; the samples of a whole batch can be told apart."""
    model, data = Flattened(), batches(3, size=4)
    for batch, lengths in zip(data, (first, [6, 6, 2, 2], [6, 6, 6, 6]), strict=True):
        batch["lengths"] = torch.tensor(lengths)
        if hot:  # as many numbers as the second batch has tokens
            batch["hot"] = torch.zeros(4, 4)
    if not hot:
        GroupGradients(model, find_weights(model), 2).check(data[2])
    with pytest.raises(NotServed, match="for 4 samples"):
        GroupGradients(model, find_weights(model), 2).check(data[1])
    options = {"num_grads": 6, "block_size": 8, "loss_fn": model_loss}
    pieces = [piece for batch in data for piece in split_batch(batch, 2)]
    expected = estimate_fisher(model, pieces, **options)
    found = estimate_fisher(model, data, samples_per_grad=2, **options)
    of_all = "every gradient took" in found.notes[0]
    assert of_all == (hot or first != [6, 6, 6, 6])
    assert of_all or "some batches took a backward pass for every gradient" in found.notes[0]
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
    for index, batch in enumerate(data):  # the groups of a batch take one path
        batch["tokens"][:, 0] = 1 - index % 2
    weights = find_weights(model)
    assert_same(model, data, weights, 8, 2)
    options = {"num_grads": 8, "samples_per_grad": 2, "loss_fn": model_loss}
    for first in (0, 1):
        estimate = estimate_fisher(model, data[first:] + data[:first], **options)
        assert all(fisher.num_gradients == 8 for fisher in estimate.fishers.values())
        # What the first batch does not reach cannot be compared.
        assert bool(estimate.notes) == bool(first)
    assert "layer.1.wide.weight is not used in batch 0" in estimate.notes[0]


@pytest.mark.parametrize("samples_per_grad", [None, 2])
@pytest.mark.parametrize("max_memory", [None, 80_000])
def test_so_it_has_in_every_pass(samples_per_grad, max_memory):
    model, data = SometimesShort(), batches(8, size=4)
    for index, batch in enumerate(data):
        batch["tokens"][:, 0] = 1 - index % 2
    report = prune(
        model, data, 0.5, num_grads=8, samples_per_grad=samples_per_grad, damping=1e-3,
        loss_fn=model_loss, max_memory=max_memory,
    ).report  # fmt: skip
    assert (report.memory["passes"] > 1) == (max_memory is not None)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)


class Heads(nn.Linear):
    """Splits its output."""

    def forward(self, x):
        return super().forward(x).unflatten(-1, (2, -1))


def test_a_layer_with_another_output_takes_a_pass_for_every_group():
    model, data = TinyEncoder(), batches(2)
    model.layer[0]["wide"] = Heads(12, 24)
    forward = model.layer[0]["narrow"].forward
    model.layer[0]["narrow"].forward = lambda x: forward(x.flatten(-2))
    with pytest.raises(NotServed, match=r"the output of layer.0.wide.weight has shape"):
        GroupGradients(model, find_weights(model), 2, model_loss).check(data[0])
    estimate = estimate_fisher(model, data, samples_per_grad=2, num_grads=4)
    assert "every gradient took a backward pass of its own" in estimate.notes[0]


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
def test_nothing_beside_the_weights_is_touched(samples_per_grad):
    """Not a module beside the model that the loss depends on, and no hook of a training step."""
    model, head = TinyEncoder(), nn.Linear(3, 2)
    head.weight.grad = torch.ones(2, 3)
    called = []
    for parameter in (*model.parameters(), *head.parameters()):
        parameter.register_post_accumulate_grad_hook(called.append)
        parameter.register_hook(called.append)

    def loss_fn(model, batch):
        return head(model(batch["tokens"])["logits"]).square().mean()

    options = {"samples_per_grad": samples_per_grad, "num_grads": 4, "loss_fn": loss_fn}
    estimate = estimate_fisher(model, batches(), **options)
    assert not called and not estimate.notes
    assert torch.equal(head.weight.grad, torch.ones(2, 3)) and head.bias.grad is None
    assert all(parameter.grad is None for parameter in model.parameters())
    loss_fn(model, batches()[0]).backward()
    assert len(called) == 2 * (len(list(model.parameters())) + 2), "they are there again"


@pytest.mark.parametrize("samples_per_grad", [None, 2])
def test_a_loss_without_the_weights_is_refused(samples_per_grad):
    model, other = TinyEncoder(), TinyEncoder()
    options = {"samples_per_grad": samples_per_grad, "num_grads": 2}
    with pytest.raises(ValueError, match=r"\w+ 0: the loss depends on none of the matrices"):
        estimate_fisher(
            model, batches(), loss_fn=lambda m, b: model.head.bias.sum() + other(**b)["loss"],
            **options,
        )  # fmt: skip


def contrast(model, batch):
    """Every sample's loss depends on the others."""
    x = model(batch["tokens"])["logits"]
    return nn.functional.cross_entropy(x @ x.T, torch.arange(len(x)))


def test_a_first_batch_of_one_group_is_looked_at_in_parts():
    """Alone in its batch a group has the gradient it has alone, whatever the loss."""
    model, data = TinyEncoder(), [batches(1, size=3)[0], *batches(1, size=6)]
    options = {"num_grads": 3, "block_size": 8, "loss_fn": contrast}
    found = estimate_fisher(model, data, samples_per_grad=3, **options)
    assert "when they are alone" in found.notes[0]
    pieces = [piece for batch in data for piece in split_batch(batch, 3)]
    expected = estimate_fisher(model, pieces, **options)
    for name, fisher in expected.fishers.items():
        torch.testing.assert_close(found.fishers[name].gram, fisher.gram)


def test_a_part_that_the_loss_does_not_depend_on_has_gradients_of_zero():
    """Also where the first batch is smaller than two groups, and is looked at in parts."""
    model = Shared()
    weights = {"unused.weight": model.unused.weight}
    data = [(torch.randn(3, 2, 6), torch.randn(3, 2, 2))]
    groups = GroupGradients(model, weights, 2, regression, is_part=True)
    groups.check(data[0])
    found = []
    for _ in groups.run(data, 2, lambda name, rows: found.append(rows.clone())):
        pass
    assert sum(map(len, found)) == 2 and not torch.cat(found).any()
