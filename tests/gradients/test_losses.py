"""Gradients of predictions: what their squares are, and what they are refused for."""

from types import SimpleNamespace

import pytest
import torch
from tiny import TinyEncoder, batches
from torch import nn

from obert_kernels import estimate_fisher, find_weights, model_loss, prediction_loss, prune
from obert_kernels.gradients.batches import split_batch
from obert_kernels.gradients.losses import default_loss, random_logit_directions
from obert_kernels.gradients.per_batch import batch_gradients

WEIGHT = "layer.1.narrow.weight"


class Given(nn.Module):
    """These logits, whatever the batch."""

    def __init__(self, logits):
        super().__init__()
        self.logits = logits

    def forward(self, x):
        return SimpleNamespace(logits=self.logits)


def second_derivative(model, tokens):
    """Of half the variance of the logits' change, mean over the samples, by autograd."""
    weight = find_weights(model)[WEIGHT]
    with torch.no_grad():
        before = model(tokens)["logits"]

    def distance(flat):
        changed = torch.func.functional_call(model, {WEIGHT: flat.view_as(weight)}, (tokens,))
        return (changed["logits"] - before).var(dim=1, correction=0).mean() / 2

    return torch.autograd.functional.hessian(distance, weight.detach().flatten())


@pytest.mark.parametrize("group", [1, 5])
def test_the_fisher_is_that_of_the_predictions(group):
    """The mean over many draws, for five samples; g of them in a gradient divide it by g."""
    model = TinyEncoder().double().eval()
    weight = find_weights(model)[WEIGHT]
    tokens = batches(1, size=5)[0]["tokens"]
    expected = second_derivative(model, tokens)
    draws = 1000
    # A column that no sample shares, so that each has pushes of its own; the model ignores it.
    model.forward = lambda tokens, other: TinyEncoder.forward(model, tokens)
    batch = {"tokens": tokens.repeat(draws, 1), "other": torch.arange(5 * draws)}
    found = torch.zeros_like(expected)
    for part in split_batch(batch, group):
        loss = prediction_loss(model, part)
        (gradient,) = torch.autograd.grad(loss, weight)
        found += gradient.flatten().outer(gradient.flatten()) * group**2 / (5 * draws)
    assert (found - expected).norm() < 0.08 * expected.norm()


@pytest.mark.parametrize("classes", [2, 3, 6, 17])
def test_the_mean_square_of_a_push(classes):
    """(I - 1 1^T / C) / C; with two classes for every sample, whatever is drawn."""
    samples = 64 if classes == 2 else 40000
    logits = torch.randn(samples, classes).requires_grad_()
    prediction_loss(Given(logits), {"x": torch.arange(samples)}).backward()
    pushes = samples * logits.grad
    expected = (torch.eye(classes) - 1 / classes) / classes
    tolerance = 1e-6 if classes == 2 else 0.02 / classes
    torch.testing.assert_close(pushes.T @ pushes / samples, expected, rtol=0, atol=tolerance)
    sizes = pushes.abs().sort(dim=1).values[:, classes % 2 :]
    torch.testing.assert_close(sizes, sizes[0, 0].expand_as(sizes))


@pytest.mark.parametrize("classes", [2, 3, 17])
def test_logits_are_pushed_both_ways_and_never_all(classes):
    """Mean 0 over draws, sum 0 over classes: as of any loss of a softmax."""
    logits = torch.randn(classes).expand(20000, -1).clone().requires_grad_()
    prediction_loss(Given(logits), {"x": torch.arange(20000)}).backward()
    pushes = logits.grad * 20000
    assert pushes.sum(dim=1).abs().max() < 1e-5
    assert pushes.mean(dim=0).abs().max() < 0.02


def test_a_model_that_is_sure_still_has_gradients():
    logits = torch.tensor([[60.0, 0.0, -60.0], [0.0, 200.0, 0.0]], requires_grad=True)
    prediction_loss(Given(logits), {"x": torch.arange(2)}).backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad != 0).any(dim=1).all()


def test_the_same_batch_gives_the_same_gradient():
    model, (batch, other) = TinyEncoder().eval(), batches(2, size=64)
    weight = find_weights(model)[WEIGHT]

    def gradient(batch):
        return torch.autograd.grad(prediction_loss(model, batch), weight)[0]

    state = torch.random.get_rng_state()
    first = gradient(batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.rand(5)
    assert torch.equal(gradient(batch), first)
    assert not torch.equal(gradient({**batch, "labels": other["labels"]}), first)


@pytest.mark.parametrize("labels", [True, False])
def test_a_sample_says_the_same_alone_and_in_company(labels):
    """What gradients of groups of a batch rest on."""
    model, (batch,) = TinyEncoder().double().eval(), batches(1, size=6)
    batch = batch if labels else {"tokens": batch["tokens"]}
    weight = find_weights(model)[WEIGHT]
    (whole,) = torch.autograd.grad(prediction_loss(model, batch), weight)
    parts = [
        torch.autograd.grad(prediction_loss(model, part), weight)[0]
        for part in split_batch(batch, 2)
    ]
    torch.testing.assert_close(sum(parts) / 3, whole, rtol=1e-6, atol=1e-9)


def test_samples_that_no_row_tells_apart_have_pushes_of_their_own():
    logits = torch.zeros(64, 3, requires_grad=True)
    prediction_loss(Given(logits), {"x": "sixty-four texts in words"}).backward()
    assert len(logits.grad.unique(dim=0)) > 2


def test_a_batch_of_nothing_is_named():
    model, empty = TinyEncoder(), {"tokens": torch.zeros(0, 6, dtype=torch.long)}
    with pytest.raises(ValueError, match="a batch holds no samples: leave it out"):
        next(iter(batch_gradients(model, [empty], find_weights(model), 1, prediction_loss)))


def test_the_value_is_the_models_loss():
    model, (batch,) = TinyEncoder().eval(), batches(1)
    assert torch.equal(prediction_loss(model, batch), model(**batch)["loss"])
    assert prediction_loss(model, {"tokens": batch["tokens"]}) == 0


class Tagger(nn.Module):
    """A class for each token."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 4)

    def forward(self, tokens, labels=None):
        return {"logits": self.embedding(tokens)}


def test_what_is_marked_is_left_out():
    model, tokens = Tagger(), torch.arange(20).view(4, 5)
    labels = torch.full_like(tokens, -100)
    labels[1, 2:5] = 1
    prediction_loss(model, {"tokens": tokens, "labels": labels}).backward()
    touched = model.embedding.weight.grad.abs().sum(dim=1) > 0
    assert set(touched.nonzero().flatten().tolist()) == set(tokens[1, 2:5].tolist())


@pytest.mark.usefixtures("limits_are_of_the_fisher")
def test_pruning_with_it_whole_in_passes_and_in_groups():
    data = batches(32, size=8)
    results = []
    for max_memory in (None, 120_000):
        torch.manual_seed(5)
        model = TinyEncoder()
        report = prune(
            model, data, 0.5, num_grads=32, damping=1e-4, loss_fn=prediction_loss,
            max_memory=max_memory,
        ).report  # fmt: skip
        assert (report.memory["passes"] > 1) == (max_memory is not None)
        results.append(model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), "the pushes of a pass are those of all"
    model = TinyEncoder()
    fisher = estimate_fisher(
        model, data, num_grads=64, samples_per_grad=4, loss_fn=prediction_loss, block_size=12
    )
    assert not fisher.notes, "one backward pass serves many groups"
    given = estimate_fisher(
        model, data, num_grads=64, samples_per_grad=4, block_size=12, loss_fn=model_loss
    )
    for name, found in fisher.fishers.items():
        assert found.mean_squares() > 0
        assert found.mean_squares() != given.fishers[name].mean_squares()


def test_texts_without_labels_will_do():
    data = [{"tokens": batch["tokens"]} for batch in batches(40, size=8)]
    report = prune(TinyEncoder(), data, 0.5, num_grads=24, loss_fn=prediction_loss).report
    assert report.sparsity == pytest.approx(0.5, abs=1e-3)
    assert all(trial.divergence is not None for trial in report.damping_trials)


def test_classifiers_are_pruned_by_their_predictions_others_by_their_loss():
    data = batches(8)

    class Scorer(TinyEncoder):
        """One number for each sample, and no classes."""

        def forward(self, tokens, labels):
            loss = super().forward(tokens, labels)["loss"]
            return {"loss": loss, "logits": torch.zeros(len(tokens), 1)}

    for kind, same in ((TinyEncoder, prediction_loss), (Scorer, model_loss), (Tagger, None)):
        torch.manual_seed(3)
        model = kind().eval()
        if kind is Tagger:
            with pytest.raises(TypeError, match="Tagger returned no loss"):
                default_loss(model, data[0])
            continue
        default, named = (
            estimate_fisher(model, data, num_grads=8, **options).fishers[WEIGHT].diagonal(1e-3)
            for options in ({}, {"loss_fn": same})
        )
        assert torch.equal(default, named)


def test_errors_name_the_remedy():
    with pytest.raises(TypeError, match="mappings of model arguments, got a Tensor"):
        prediction_loss(TinyEncoder(), torch.ones(2))
    model = TinyEncoder()
    arrays = {name: tensor.numpy() for name, tensor in batches(1)[0].items()}
    with pytest.raises(TypeError, match=r"numpy arrays \(tokens, labels\): make them tensors"):
        prediction_loss(model, arrays)
    model.config = SimpleNamespace(problem_type="regression")
    with pytest.raises(TypeError, match="TinyEncoder gives no logits of classes"):
        prediction_loss(model, batches(1)[0])


def test_a_model_gone_wrong_is_named():
    model = TinyEncoder()
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    weights = find_weights(model)
    for batch in (batches(1)[0], {"tokens": batches(1)[0]["tokens"]}):
        with pytest.raises(ValueError, match="batch 0"):
            next(iter(batch_gradients(model, [batch], weights, 1, prediction_loss)))


class Unnamed(TinyEncoder):
    """Returns a tuple, as Hugging Face models do where their configuration says so."""

    config = SimpleNamespace(return_dict=False)

    def forward(self, tokens, labels=None):
        output = super().forward(tokens, labels)
        found = (output["logits"],) if labels is None else (output["loss"], output["logits"])
        return (*found, ((tokens, tokens),))  # of every layer


@pytest.mark.parametrize("flag", [{"return_dict": False}, {"torchscript": True}])
def test_outputs_without_names_have_a_loss_and_logits(flag):
    torch.manual_seed(0)
    named = TinyEncoder()
    unnamed = Unnamed()
    unnamed.load_state_dict(named.state_dict())
    unnamed.config = SimpleNamespace(**flag)
    (batch,) = batches(1)
    without = {"tokens": batch["tokens"]}
    for model in (named.eval(), unnamed.eval()):
        model.found = [
            model_loss(model, batch), default_loss(model, batch), prediction_loss(model, without),
        ]  # fmt: skip
        model.masks = prune(model, batches(4), 0.5, num_grads=4, damping=1e-3).masks
    assert all(map(torch.equal, named.found, unnamed.found))
    assert all(torch.equal(mask, unnamed.masks[name]) for name, mask in named.masks.items())
    with pytest.raises(TypeError, match=r"returned no loss .* add labels"):
        model_loss(unnamed, without)
    unnamed.config = SimpleNamespace(return_dict=True)
    with pytest.raises(TypeError, match="returned no loss"):  # whatever stands first
        model_loss(unnamed, batch)


def test_a_single_sample_cut_out_of_many_has_the_same_directions():
    """Its rows may keep the stride of those it stood among."""
    labels = torch.arange(8)[::4][:1]
    assert labels.stride() == (4,)
    logits = torch.zeros(1, 6)
    found = random_logit_directions({"labels": labels}, logits)
    assert torch.equal(found, random_logit_directions({"labels": torch.tensor([0])}, logits))
