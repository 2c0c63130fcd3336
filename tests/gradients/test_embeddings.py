"""The loss of embedding models: its value, its gradients, and what it is refused for."""

import copy
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel

from obert_kernels import embedding_loss, find_weights, prune
from obert_kernels.gradients import embeddings as module
from obert_kernels.gradients.batches import split_batch
from obert_kernels.gradients.embeddings import embeddings
from obert_kernels.gradients.losses import random_logit_directions

WEIGHT = "encoder.layer.0.output.dense.weight"


def encoder(seed=0, width=16):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=50, hidden_size=width, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=2 * width,
        max_position_embeddings=16, initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    return BertModel(config).eval()


def texts(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (count, 8), generator=generator)
    counts = torch.randint(3, 9, (count, 1), generator=generator)
    return {"input_ids": ids, "attention_mask": (torch.arange(8) < counts).long()}


class Tokens(nn.Module):
    def __init__(self, values):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(values))

    def forward(self, **batch):
        return SimpleNamespace(last_hidden_state=self.values)


@pytest.mark.parametrize(("pool", "expected"), [("mean", [0.6, 0.8]), ("first", [1.0, 0.0])])
def test_pools(pool, expected):
    model = Tokens([[[3.0, 0.0], [0.0, 4.0], [9.0, 9.0]]])
    batch = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert torch.allclose(embeddings(model, batch, pool), torch.tensor([expected]))


def test_without_a_mask_every_token_counts():
    model = Tokens([[[3.0, 0.0], [0.0, 4.0]]])
    batch = {"input_ids": torch.tensor([[7, 8]])}
    assert torch.allclose(embeddings(model, batch), torch.tensor([[0.6, 0.8]]))


def test_the_value_is_the_cosine_distance_from_the_dense_model():
    dense, other, batch = encoder(0), encoder(1), texts(5)
    loss = embedding_loss(dense)
    before, after = embeddings(dense, batch), embeddings(other, batch)
    expected = 1 - nn.functional.cosine_similarity(before, after).mean()
    assert expected > 0.1
    assert torch.allclose(loss(other, batch), expected, atol=1e-6)
    assert abs(loss(copy.deepcopy(dense), batch).item()) < 1e-6


def test_the_fisher_is_that_of_the_distance(monkeypatch):
    """The mean over all directions; they have mean 0, so what all dimensions share is not seen."""
    dense = encoder(width=8).double()
    model = copy.deepcopy(dense)
    weight = find_weights(model)[WEIGHT]
    batch = texts(3)

    def moved(flat):
        changed = {WEIGHT: flat.view_as(weight)}
        tokens = torch.func.functional_call(model, changed, (), batch).last_hidden_state
        counts = batch["attention_mask"].double().unsqueeze(2)
        found = nn.functional.normalize((tokens * counts).sum(1) / counts.sum(1), dim=1)
        return (found - found.mean(dim=1, keepdim=True)).flatten() / 8**0.5

    jacobian = torch.func.jacrev(moved)(weight.detach().flatten())
    expected = jacobian.T @ jacobian / 3
    drawn = random_logit_directions({"x": torch.ones(1)}, torch.ones(1, 8))[0].abs()
    found = torch.zeros_like(expected)
    for signs in (s for s in product([-1, 1], repeat=8) if sum(s) == 0):
        direction = drawn * torch.tensor([signs])
        monkeypatch.setattr(module, "random_logit_directions", lambda *_, u=direction: u)
        for part in split_batch(batch, 1):
            (gradient,) = torch.autograd.grad(embedding_loss(dense)(model, part), weight)
            found += gradient.flatten().outer(gradient.flatten())
    assert torch.allclose(found / (3 * 70), expected, rtol=1e-4, atol=1e-8)


def test_pruning_keeps_embeddings_better_with_it_and_the_fit():
    dense = encoder()
    batches, held_back = [texts(32, seed) for seed in range(4)], [texts(32, 9)]
    distances = {}
    for fit in (None, "auto"):
        model = copy.deepcopy(dense)
        loss = embedding_loss(dense)
        prune(
            model, batches, 0.5, num_grads=16, samples_per_grad=8, block_size=16, loss_fn=loss,
            calibration=held_back, reconstruction=fit,
        )  # fmt: skip
        distances[fit] = loss(model, texts(64, 10)).item()
    by_magnitude = copy.deepcopy(dense)
    prune(by_magnitude, None, 0.5, selection="magnitude", reconstruction=None)
    assert 0 < distances["auto"] < distances[None]
    assert distances[None] < embedding_loss(dense)(by_magnitude, texts(64, 10)).item()


def test_refused():
    dense = encoder()
    with pytest.raises(ValueError, match="pool must be one of mean, first, got 'max'"):
        embedding_loss(dense, "max")
    with pytest.raises(ValueError, match=r"needs a copy of the model.*deepcopy"):
        embedding_loss(dense)(dense, texts(2))
    head = nn.Linear(2, 2)
    head.forward = lambda **batch: SimpleNamespace(logits=torch.zeros(2, 2))
    with pytest.raises(TypeError, match=r"Linear gives no last_hidden_state.*AutoModel"):
        embedding_loss(head)(dense, texts(2))
