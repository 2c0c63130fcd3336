"""Labels that a model draws from its own predictions: what their gradients are, and when not."""

from types import SimpleNamespace

import pytest
import torch
from tiny import TinyEncoder, batches
from torch import nn

from obert_kernels import estimate_fisher, find_weights, prune, sampled_loss
from obert_kernels.gradients import batch_gradients
from obert_kernels.group_gradients import SplitBatches


def exact_fisher(model, tokens, weight):
    """Over all classes of one sample, by their probabilities."""
    log_p = model(tokens)["logits"].log_softmax(dim=1)[0]
    total = torch.zeros(weight.numel(), weight.numel(), dtype=weight.dtype)
    for value in log_p:
        (gradient,) = torch.autograd.grad(value, weight, retain_graph=True)
        total += value.detach().exp() * gradient.flatten().outer(gradient.flatten())
    return total


@pytest.mark.parametrize("group", [1, 5])
def test_the_fisher_is_that_of_the_model(group):
    """The mean over many draws, for one sample; g samples in a gradient divide it by g."""
    model = TinyEncoder().double().eval()
    weight = model.layer[1]["narrow"].weight
    tokens = batches(1, size=1)[0]["tokens"]
    expected = exact_fisher(model, tokens, weight)
    with torch.no_grad():
        p = model(tokens)["logits"].softmax(dim=1)
    assert p.max() < 0.8, "else a class is hardly ever drawn"
    many = 6000 * group
    # Labels that tell the pieces apart, so that each draws its own.
    batch = {"tokens": tokens.expand(many, -1), "labels": torch.arange(many)}
    found = torch.zeros_like(expected)
    name = "layer.1.narrow.weight"
    for part in SplitBatches([batch], group):
        (gradient,) = torch.autograd.grad(sampled_loss(model, part), weight)
        found += gradient.flatten().outer(gradient.flatten()) * group / 6000
    assert name in find_weights(model)
    assert (found - expected).norm() < 0.06 * expected.norm()


def test_the_same_batch_gets_the_same_labels():
    model, (batch, other) = TinyEncoder().eval(), batches(2, size=64)
    state = torch.random.get_rng_state()
    first = sampled_loss(model, batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(sampled_loss(model, batch), first)
    assert not torch.equal(sampled_loss(model, other), first)


@torch.no_grad()
def test_classes_come_as_often_as_they_are_probable():
    logits = torch.tensor([0.0, 1.0, -2.0])

    class Constant(nn.Module):
        def forward(self, x):
            self.seen = logits.expand(len(x), -1)
            return SimpleNamespace(logits=self.seen)

    loss = sampled_loss(Constant(), {"x": torch.arange(40000)})
    p = logits.softmax(dim=0)
    assert float(loss) == pytest.approx(-float((p * p.log()).sum()), rel=0.02)


class Tagger(nn.Module):
    """A class for each token."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 4)

    def forward(self, tokens, labels=None):
        return {"logits": self.embedding(tokens)}


def test_what_is_marked_is_left_out():
    model, tokens = Tagger(), torch.randint(0, 20, (3, 7))
    labels = torch.full_like(tokens, -100)
    labels[1, 2:5] = 1
    sampled_loss(model, {"tokens": tokens, "labels": labels}).backward()
    touched = model.embedding.weight.grad.abs().sum(dim=1) > 0
    assert set(touched.nonzero().flatten().tolist()) == set(tokens[1, 2:5].tolist())


def test_pruning_with_it_whole_in_passes_and_in_groups():
    data = batches(32, size=8)
    results = []
    for max_memory in (None, 120_000):
        torch.manual_seed(5)
        model = TinyEncoder()
        prune(
            model, data, 0.5, num_grads=32, damping=1e-4, loss_fn=sampled_loss,
            max_memory=max_memory,
        )  # fmt: skip
        results.append(model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), "the labels of a pass are those of all"
    model = TinyEncoder()
    fisher = estimate_fisher(
        model, data, num_grads=64, samples_per_grad=4, loss_fn=sampled_loss, block_size=12
    )
    given = estimate_fisher(model, data, num_grads=64, samples_per_grad=4, block_size=12)
    for name, found in fisher.fishers.items():
        assert found.mean_squares() > 0
        assert found.mean_squares() != given.fishers[name].mean_squares()


def test_damping_auto_with_it():
    model, data = TinyEncoder(), batches(40, size=8)
    trials = prune(model, data, 0.5, num_grads=24, loss_fn=sampled_loss).report.damping_trials
    assert all(trial.divergence is not None for trial in trials)


def test_errors_name_the_remedy():
    with pytest.raises(TypeError, match="mappings of model arguments, got a Tensor"):
        sampled_loss(TinyEncoder(), torch.ones(2))
    model = TinyEncoder()
    model.config = SimpleNamespace(problem_type="regression")
    with pytest.raises(TypeError, match="TinyEncoder gives no logits of classes"):
        sampled_loss(model, batches(1)[0])


def test_a_model_gone_wrong_is_named():
    model = TinyEncoder()
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    weights = find_weights(model)
    with pytest.raises(ValueError, match="batch 0"):
        next(iter(batch_gradients(model, batches(), weights, 1, sampled_loss)))
