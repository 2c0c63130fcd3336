"""Architectures followed by their tensors alone: who shares inputs, who ends in a residual sum."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional

from obert_kernels.reconstruction.structure import find_structure, owners
from obert_kernels.sparsity.layers import find_weights
from obert_kernels.sparsity.matrices import find_matrices

BERT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "vocab_size": 50, "max_position_embeddings": 40,
}  # fmt: skip
T5 = {"d_model": 16, "num_layers": 2, "num_heads": 2, "d_ff": 32, "d_kv": 8, "vocab_size": 50}
# Class and settings; layers of a block that share inputs, in order; how many end in a sum.
ARCHITECTURES = {
    "Bert": (BERT, [3, 1, 1, 1], 2),
    "Roberta": (BERT, [3, 1, 1, 1], 2),
    "MPNet": (BERT, [3, 1, 1, 1], 2),
    "Electra": ({**BERT, "embedding_size": 16}, [3, 1, 1, 1], 2),
    "DistilBert": (
        {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50},
        [3, 1, 1, 1],
        2,
    ),
    "DebertaV2": (
        {**BERT, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        [3, 2, 1, 1, 1],
        2,
    ),
    "ModernBert": (
        {**BERT, "global_attn_every_n_layers": 2, "local_attention": 4, "pad_token_id": 0},
        [1, 1, 1, 1],
        2,
    ),
    "Longformer": ({**BERT, "attention_window": 4}, [5, 1, 1, 1, 1], 2),
    "OPT": (
        {**BERT, "ffn_dim": 32, "word_embed_proj_dim": 16, "pad_token_id": 0},
        [3, 1, 1, 1],
        2,
    ),
    "GPT2": (
        {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 50, "pad_token_id": 0},
        [1, 1, 1, 1],
        2,
    ),
}


def made(name, settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config)
    return model.eval()


def text():
    ids = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def followed(model, run=None, params=None):
    weights = find_weights(model, params)
    found = owners(model, weights, find_matrices(model).transposed)
    with torch.no_grad():
        return find_structure(model, found, list(weights), run or (lambda: model(**text())))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_block_is_followed(name):
    settings, groups, totals = ARCHITECTURES[name]
    params = [r"re:.*\.h\..*weight"] if name == "GPT2" else None
    structure = followed(made(name, settings), params=params)
    assert not structure.left_out
    assert [[len(group) for group in unit.groups] for unit in structure.units] == [groups] * 2
    for index, unit in enumerate(structure.units):
        assert unit.chain is structure.units[0].chain is not None
        assert unit.index == index
        layers = [layer for group in unit.groups for layer in group]
        assert sum(layer.total is not None for layer in layers) == totals


def test_arguments_that_differ_between_blocks_are_seen():
    """ModernBERT's blocks take turns with two attention masks; BERT's all have one."""
    first = followed(made("ModernBert", ARCHITECTURES["ModernBert"][0])).units[0].chain
    assert not first.shares_arguments
    assert followed(made("Bert", BERT)).units[0].chain.shares_arguments


def test_encoder_and_decoder_are_two_chains():
    config = transformers.T5Config(**T5)
    torch.manual_seed(0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    batch = {**text(), "decoder_input_ids": text()["input_ids"][:, :5]}
    structure = followed(model, lambda: model(**batch), ["re:.*(SelfAttention.[qkvo]|DenseRelu).*"])
    chains = list(dict.fromkeys(id(unit.chain) for unit in structure.units))
    assert len(structure.units) == 4 and len(chains) == 2 and not structure.left_out


class Odd(nn.Module):
    """Layers that cannot be fitted, each for a reason of its own, and one that can."""

    def __init__(self):
        super().__init__()
        self.twice, self.never, self.weight_alone, self.fine, self.scaled = (
            nn.Linear(8, 8) for _ in range(5)
        )
        self.own = nn.Parameter(torch.randn(8, 8))
        self.scaled.register_forward_hook(lambda module, args, output: 3 * output)

    def forward(self, x):
        x = self.twice(torch.relu(self.twice(x)))
        x = functional.linear(x, self.weight_alone.weight) @ self.own
        return self.fine(self.scaled(x))


def test_reasons_are_given_by_name():
    model = Odd()
    x = torch.randn(4, 8)
    structure = followed(model, lambda: model(x), ["re:.*"])
    assert structure.left_out == {
        "twice.weight": "its layer is called several times in a forward pass",
        "never.weight": "its layer is not called",
        "weight_alone.weight": "its layer is not called",
        "own": "no linear layer owns it",
        "scaled.weight": "its layer computes more than its matrix and bias",
    }
    assert [layer.name for layer in structure.layers] == ["fine.weight"]


def test_a_sum_is_found_only_where_there_is_one():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.last = (nn.Linear(8, 8) for _ in range(3))
            self.norm = nn.LayerNorm(8)

        def forward(self, x):
            y = self.norm(self.first(x) + x)
            return self.last(self.norm(2 * self.second(y)))

    model = Doubled()
    structure = followed(model, lambda: model(torch.randn(4, 8)), ["re:(first|second|last).*"])
    assert [layer.total for layer in structure.layers] == [None] * 3  # the norm is called twice
    model.other = nn.LayerNorm(8)
    model.forward = lambda x: model.last(
        model.other(2 * model.second(model.norm(model.first(x) + x)))
    )
    structure = followed(model, lambda: model(torch.randn(4, 8)), ["re:(first|second|last).*"])
    totals = {layer.name: layer.total for layer in structure.layers}
    assert totals["first.weight"] == (model.norm, False)
    assert totals["second.weight"] is None and totals["last.weight"] is None
