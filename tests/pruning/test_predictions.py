"""What a model predicts, and how far that moves."""

from types import SimpleNamespace

import pytest
import torch
from tiny import TinyEncoder, batches
from torch import nn

from obert_kernels.pruning.predictions import divergence, predict


def moved(model):
    """The same model with other weights."""
    other = TinyEncoder()
    other.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in model.state_dict().items()})
    return other


@torch.no_grad()
def test_divergence_is_that_of_torch():
    model, data = TinyEncoder(), [*batches(3, size=4), *batches(1, size=2)]
    other = moved(model).eval()
    model.eval()
    total, samples, losses = 0.0, 0, []
    for batch in data:
        p, q = (m(**batch)["logits"].double().log_softmax(dim=1) for m in (model, other))
        total += float(nn.functional.kl_div(q, p, reduction="sum", log_target=True))
        samples += len(p)
        losses.append(float(other(**batch)["loss"]))
    before, after = predict(model, data), predict(other, data)
    assert divergence(before, after) == pytest.approx(total / samples, rel=1e-5)
    assert divergence(before, before) == 0
    assert after.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_a_small_step_costs_what_the_fisher_of_all_classes_says():
    """The reason for the divergence: half the quadratic form of its own Fisher."""
    model, data = TinyEncoder().double().eval(), batches(4)
    weight = model.layer[0]["wide"].weight
    step = 1e-3 * torch.randn_like(weight)
    expected, samples = 0.0, 0
    for batch in data:
        for tokens in batch["tokens"].split(1):
            log_p = model(tokens)["logits"].log_softmax(dim=1)[0]
            for value in log_p:
                (gradient,) = torch.autograd.grad(value, weight, retain_graph=True)
                slope = (gradient * step).sum()
                expected += 0.5 * float((value.exp() * slope.square()).detach())
            samples += 1
    before = predict(model, data)
    with torch.no_grad():
        weight += step
    assert divergence(before, predict(model, data)) == pytest.approx(expected / samples, rel=0.02)


def test_the_model_is_left_as_it_was():
    model = TinyEncoder().train()
    predict(model, batches(2))
    assert all(module.training for module in model.modules())
    assert not model._forward_hooks

    def fails(model, batch):
        model(**batch)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(model, batches(2), fails)
    assert all(module.training for module in model.modules())
    assert not model._forward_hooks


class Other(TinyEncoder):
    """Gives something else, as the test wants it."""

    def __init__(self, change, problem_type=None):
        super().__init__()
        self.change, self.config = change, SimpleNamespace(problem_type=problem_type)

    def forward(self, tokens, labels):
        output = super().forward(tokens, labels)
        return SimpleNamespace(loss=output["loss"], logits=self.change(output["logits"]))


@pytest.mark.parametrize(
    ("change", "problem_type"),
    [
        (lambda logits: None, None),
        (lambda logits: logits[:, :1], None),  # a number
        (lambda logits: logits[:, None], None),  # a class for each token
        (lambda logits: logits[:, : 2 + len(logits) % 2], None),  # other classes each time
        (lambda logits: logits, "regression"),
        (lambda logits: logits, "multi_label_classification"),
    ],
)
def test_no_classes_no_divergence(change, problem_type):
    model = Other(change, problem_type)
    data = [*batches(2, size=3), *batches(1, size=4)]
    found = predict(model, data)
    assert found.log_probabilities is None and found.loss > 0
    assert divergence(found, found) is None


def test_classes_of_an_output_object():
    plain = TinyEncoder()
    model = Other(lambda logits: logits, "single_label_classification")
    model.load_state_dict(plain.state_dict())
    assert divergence(predict(plain, batches()), predict(model, batches())) == 0


def test_a_loss_that_never_calls_the_model():
    model, data = TinyEncoder(), batches(2)
    found = predict(model, data, lambda model, batch: model.head.weight.square().sum())
    assert found.log_probabilities is None
