"""Which matrices are found in which models."""

import pytest
import torch
from tiny import TinyEncoder
from torch import nn

from obert_kernels import find_weights

SMALL = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "vocab_size": 30,
}
DISTIL = {"dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "vocab_size": 30}


@pytest.mark.parametrize(
    ("config", "model", "sizes"),
    [
        ("BertConfig", "BertForSequenceClassification", SMALL),
        ("BertConfig", "BertModel", SMALL),
        ("RobertaConfig", "RobertaForTokenClassification", SMALL),
        ("ElectraConfig", "ElectraForSequenceClassification", {**SMALL, "embedding_size": 4}),
        ("MPNetConfig", "MPNetForQuestionAnswering", SMALL),
        ("DistilBertConfig", "DistilBertForSequenceClassification", DISTIL),
    ],
)
def test_six_matrices_for_each_encoder_layer(config, model, sizes):
    transformers = pytest.importorskip("transformers")
    net = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    weights = find_weights(net)
    assert len(weights) == 12
    assert sum(w.numel() for w in weights.values()) == 2 * (4 * 8 * 8 + 2 * 8 * 16)
    assert all(".0." in n or ".1." in n for n in weights)
    outside = ("embedding", "pooler", "classifier", "qa_outputs", "relative", "norm", "bias")
    assert not any(word in n.lower() for n in weights for word in outside)


def test_albert_is_refused_politely():
    transformers = pytest.importorskip("transformers")
    albert = transformers.AlbertModel(transformers.AlbertConfig(**SMALL, embedding_size=4))
    with pytest.raises(ValueError, match="ALBERT shares one set of weights"):
        find_weights(albert)
    assert len(find_weights(albert, "re:.*albert_layers")) == 6


def test_names_and_patterns():
    model = TinyEncoder()
    assert len(find_weights(model)) == 4
    assert list(find_weights(model, "head")) == ["head.weight"]
    assert list(find_weights(model, ["head.weight"])) == ["head.weight"]
    assert list(find_weights(model, [r"re:layer\.\d\.wide", "head"])) == [
        "layer.0.wide.weight", "layer.1.wide.weight", "head.weight",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"'haed' matches no prunable .* there are 6"):
        find_weights(model, "haed")
    with pytest.raises(ValueError, match="not a valid expression"):
        find_weights(model, "re:(")


def test_no_encoder_and_bad_weights():
    with pytest.raises(ValueError, match="params is empty"):
        find_weights(TinyEncoder(), [])
    with pytest.raises(ValueError, match="no encoder layers were found"):
        find_weights(nn.Sequential(nn.Linear(3, 3)))
    model = TinyEncoder()
    with torch.no_grad():
        model.layer[0]["wide"].weight[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"layer\.0\.wide\.weight holds NaN"):
        find_weights(model)
