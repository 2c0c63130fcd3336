"""Blocks run alone must give what they give inside of the model, however odd they are."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from test_stage import fitted, texts, tiny_bert
from test_structure import ARCHITECTURES, made
from torch import nn
from torch.nn import functional

from obert_kernels.reconstruction import stage
from obert_kernels.reconstruction.remembered import Remembered
from obert_kernels.reconstruction.replay import Replay

WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def inner(self, x):
        return self.wide(self.norm(x))

    def forward(self, x):
        return x + self.narrow(torch.relu(self.inner(x)))


class InPlace(Block):
    def forward(self, x):
        x += self.narrow(torch.relu(self.inner(x)))
        return x


class ScaledInPlace(Block):
    def forward(self, x, scale):
        x += scale * self.narrow(torch.relu(self.inner(x)))
        return x


class TwoInputs(Block):
    def forward(self, queries, values):
        return queries + self.narrow(torch.relu(self.inner(values)))


class Scores(Block):
    """Hands on what it computes inside, too."""

    def forward(self, x, scores):
        scores = self.inner(x) + scores
        return x + self.narrow(torch.relu(scores)), scores


class Noted(Block):
    """Uses what the model has noted of the batch."""

    def forward(self, x):
        return x + self.narrow(torch.relu(self.inner(x) + self.tokens[..., None] / 10))


class Cached(Block):
    def forward(self, x, cache):
        cache.append(super().forward(x))
        return sum(cache) / len(cache)


class Buffer(Block):
    """Changes another argument."""

    def forward(self, x, buffer):
        buffer *= 0.5
        return x + self.narrow(torch.relu(self.inner(x) + buffer))


class Tuple(Block):
    def forward(self, x):
        return super().forward(x), None


def plain(blocks, x, tokens):
    for block in blocks:
        x = block(x)
    return x


def scaled(blocks, x, tokens):
    for index, block in enumerate(blocks):
        x = block(x, torch.tensor(1.0 + index))
    return x


def twice(blocks, x, tokens):
    for block in blocks:
        x = block(x, x)
    return x


def scores(blocks, x, tokens):
    found = torch.zeros(())
    for block in blocks:
        x, found = block(x, scores=found)
    return x


def noted(blocks, x, tokens):
    for block in blocks:
        block.tokens = tokens
        x = block(x)
    return x


def own_caches(blocks, x, tokens):
    for block in blocks:
        x = block(x, cache=[])
    return x


def one_cache(blocks, x, tokens):
    cache = []
    for block in blocks:
        x = block(x, cache)
    return x


def buffer(blocks, x, tokens):
    shared = torch.ones(2 * WIDTH)
    for block in blocks:
        x = block(x, shared)
    return x


def by_name_later(blocks, x, tokens):
    first, *others = blocks
    x = first(x)
    for block in others:
        x = block(x=x)
    return x


def changed_between(blocks, x, tokens):
    for block in blocks:
        x = block(x)
        x *= torch.arange(WIDTH) / WIDTH
    return x


def tuples(blocks, x, tokens):
    for block in blocks:
        (x, _) = block(x)
    return x


class Model(nn.Module):
    def __init__(self, kind, run):
        super().__init__()
        self.run = run
        self.embedding = nn.Embedding(50, WIDTH)
        self.layer = nn.ModuleList(kind() for _ in range(3))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.run(self.layer, self.embedding(input_ids), input_ids)
        return {"logits": self.head(x.mean(dim=1))}


def tokens(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 50, (4, 9), generator=generator)} for _ in range(count)]


def both_ways(model, monkeypatch, batches, held):
    """Results of running blocks alone where possible, and never; was it possible?"""
    chains = []
    real = stage.find_structure

    def find(*arguments, **options):
        structure = real(*arguments, **options)
        chains.append(any(unit.chain is not None for unit in structure.units))
        return structure

    monkeypatch.setattr(stage, "find_structure", find)
    alone, whole = copy.deepcopy(model), copy.deepcopy(model)
    fitted(alone, batches, held)
    monkeypatch.setattr(Replay, "runs_alone", lambda self, chain: False)
    fitted(whole, batches, held)
    assert not chains[1]
    return alone, whole, chains[0]


@pytest.mark.parametrize(
    ("kind", "run", "is_alone"),
    [
        (Block, plain, True),
        (Tuple, tuples, True),
        (InPlace, plain, True),
        (ScaledInPlace, scaled, False),
        (TwoInputs, twice, False),
        (Scores, scores, False),
        (Noted, noted, False),
        (Cached, own_caches, False),
        (Cached, one_cache, False),
        (Buffer, buffer, False),
        (Block, by_name_later, False),
        (Block, changed_between, False),
    ],
)
def test_blocks_alone_or_the_whole_model(kind, run, is_alone, monkeypatch):
    model = Model(kind, run)
    alone, whole, was_alone = both_ways(model, monkeypatch, tokens(6, 0), tokens(6, 1))
    assert was_alone == is_alone
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(alone.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_cache_of_keys_is_not_filled_twice(monkeypatch):
    """Decoders make one for every pass and give it to their blocks."""
    model = made("OPT", ARCHITECTURES["OPT"][0])
    assert model.config.use_cache
    alone, whole, was_alone = both_ways(model, monkeypatch, tokens(4, 0), tokens(4, 1))
    assert was_alone
    torch.testing.assert_close(alone.state_dict(), whole.state_dict())


class ChangedInput(Block):
    """Two layers get one tensor, which is changed in between."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, 2 * WIDTH)

    def inner(self, x):
        x = self.norm(x)
        first = self.wide(x)
        x *= torch.arange(WIDTH)
        return first + self.other(functional.relu(x, inplace=True))


def test_layers_share_inputs_only_as_long_as_these_stay_the_same(monkeypatch):
    groups = []
    real = stage.find_structure

    def find(*arguments):
        structure = real(*arguments)
        groups.extend(len(group) for unit in structure.units for group in unit.groups)
        return structure

    monkeypatch.setattr(stage, "find_structure", find)
    fitted(Model(ChangedInput, plain), tokens(4, 0), tokens(4, 1))
    assert groups == [1] * 9


class Experts(Block):
    """Which rows come to an expert depends on what is computed before."""

    def __init__(self):
        super().__init__()
        self.other = nn.Linear(WIDTH, 2 * WIDTH)

    def inner(self, x):
        rows = self.norm(x).reshape(-1, WIDTH)
        to_other = rows[:, 0] > 0
        found = rows.new_empty(len(rows), 2 * WIDTH)
        found[to_other] = self.other(rows[to_other])
        found[~to_other] = self.wide(rows[~to_other])
        return found.view(*x.shape[:-1], 2 * WIDTH)


def test_layers_that_get_other_rows_in_the_pruned_model_are_left_out():
    model = Model(Experts, plain)
    with torch.no_grad():
        for block in model.layer:
            block.narrow.weight *= 4
    found, _ = fitted(model, tokens(8, 0), tokens(4, 1))
    (note,) = found.notes
    assert "layer.2.other.weight" in note and "other rows than the dense one" in note
    names = {fit.name for fit in found.layers}
    assert {"layer.0.wide.weight", "layer.0.other.weight", "layer.2.narrow.weight"} <= names


class OfTorch(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        padding = torch.zeros_like(input_ids, dtype=torch.bool)
        padding[1:, 5:] = True
        return {"logits": self.head(self.encoder(x, src_key_padding_mask=padding)[:, 0])}


def test_layers_of_torchs_own_encoder_are_called():
    """Its fast path computes with nested tensors, and calls no layer."""
    model = OfTorch().eval()
    found, _ = fitted(model, tokens(8, 0), tokens(4, 1))
    assert torch.backends.mha.get_fastpath_enabled()
    expected = [f"encoder.layers.{i}.linear{j}.weight" for i in (0, 1) for j in (1, 2)]
    assert [fit.name for fit in found.layers] == expected
    assert len(found.notes) == 2 and all("not fitted" in note for note in found.notes)


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_what_is_fitted_is_computed_once(inputs, monkeypatch):
    """The same to the last bit, and in the pruned model one product for each layer and batch."""
    results, products = [], []
    for remembers in (True, False):
        if not remembers:
            monkeypatch.setattr(Remembered, "handed_out", lambda self, batch: nullcontext())
        model = tiny_bert()
        wide = model.bert.encoder.layer[0].intermediate.dense
        calls = []
        own = functional.linear
        monkeypatch.setattr(
            functional, "linear", lambda x, w, b, own=own, c=calls: (c.append(w), own(x, w, b))[1]
        )
        fitted(model, texts(), inputs=inputs)
        monkeypatch.setattr(functional, "linear", own)
        results.append({name: value.clone() for name, value in model.state_dict().items()})
        products.append(sum(weight is wide.weight for weight in calls))
        assert "forward" not in vars(wide)
    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())
    assert products[0] < products[1] if inputs == "pruned" else products[0] == products[1]
