"""Matrices that cannot be pruned as they are: named, with the remedy, never left out in silence."""

from __future__ import annotations

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from tiny import TinyEncoder, batches, snapshot, unchanged
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from obert_kernels import find_weights, prune

NAME = r"layer\.0\.wide\.weight"
PARAMETRIZED = (parametrize.remove_parametrizations, r"remove_parametrizations\(layer, 'weight'\)")


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    ("hold", "undo", "remedy"),
    [
        (lambda layer: torch_prune.l1_unstructured(layer, "weight", 0.3), torch_prune.remove,
         r"call torch\.nn\.utils\.prune\.remove\(layer, 'weight'\)"),
        (parametrizations.weight_norm, *PARAMETRIZED),
        (parametrizations.spectral_norm, *PARAMETRIZED),
        (parametrizations.orthogonal, *PARAMETRIZED),
        (nn.utils.weight_norm, nn.utils.remove_weight_norm, r"remove_weight_norm\(layer, 'weight"),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm, "remove_spectral_norm"),
    ],
    ids=["prune", "weight_norm", "spectral_norm", "orthogonal", "old weight_norm", "old spectral"],
)  # fmt: skip
def test_weights_that_are_computed_from_others(hold, undo, remedy):
    model = TinyEncoder()
    hold(model.layer[0]["wide"])
    before = snapshot(model)
    for params in (None, "re:.*weight", "layer.0.wide", r"re:layer\.0\.wide\..*(orig|weight_g)"):
        with pytest.raises(ValueError, match=f"{remedy}"):
            prune(model, batches(), 0.5, params=params)
    with pytest.raises(ValueError, match=f"^{NAME} cannot be pruned: .* computes it"):
        prune(model, batches(), 0.5)
    assert unchanged(model, before)
    assert list(find_weights(model, "re:.*narrow.weight")), "others can be pruned"
    undo(model.layer[0]["wide"], "weight")
    assert len(find_weights(model)) == 4


def test_all_layers_at_once_are_named():
    model = TinyEncoder()
    for layer in model.layer:
        for linear in layer.values():
            torch_prune.l1_unstructured(linear, "weight", 0.3)
    with pytest.raises(ValueError, match=r"wide\.weight, .*, .*\.weight and 1 more can"):
        find_weights(model)


def test_what_is_no_matrix_may_be_held():
    model = TinyEncoder()
    torch_prune.l1_unstructured(model.layer[0]["wide"], "bias", 0.3)
    torch_prune.l1_unstructured(model.head, "weight", 0.3)
    assert len(find_weights(model)) == 4
    assert len(find_weights(model, "re:layer.*")) == 4


class WithBuffer(nn.Linear):
    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        weight = self.weight.detach()
        del self.weight
        self.register_buffer("weight", weight)


class QuantLinear(nn.Module):
    """As the libraries for quantised models have them."""

    def __init__(self, columns: int, rows: int) -> None:
        super().__init__()
        self.in_features, self.out_features = columns, rows
        self.register_buffer("qweight", torch.zeros(rows, columns // 4, dtype=torch.int32))


class Packed(nn.Linear):
    def __init__(self, columns: int, rows: int) -> None:
        super().__init__(columns, rows)
        self.weight = nn.Parameter(torch.zeros(rows * columns // 2, 1))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (WithBuffer, r"its layer \(WithBuffer\) has no parameter of this name; make it one"),
        (QuantLinear, "QuantLinear holds it in a form of its own; prune before it is quantised"),
        (Packed, r"of shape \[24, 12\], but the parameter is \[144, 1\]"),
        (lambda columns, rows: nn.LazyLinear(rows), "no shape yet; run a batch through the model"),
        (lambda columns, rows: nn.Linear(columns, rows, device="meta"), "it is on the meta device"),
    ],
)
def test_layers_without_a_weight_of_their_own(kind, reason):
    model = TinyEncoder()
    model.layer[0]["wide"] = kind(12, 24)
    for params in (None, "layer.0.wide"):
        with pytest.raises(ValueError, match=f"^{NAME} cannot be pruned: .*{reason}"):
            find_weights(model, params)


def test_layers_made_smaller_by_hand_are_pruned():
    """Their ``out_features`` may still be those from before."""
    model = TinyEncoder()
    wide, narrow = model.layer[0]["wide"], model.layer[0]["narrow"]
    wide.weight, wide.bias = nn.Parameter(wide.weight[:20]), nn.Parameter(wide.bias[:20])
    narrow.weight = nn.Parameter(narrow.weight[:, :20])
    result = prune(model, batches(), 0.5, num_grads=8, samples_per_grad=2, damping=1e-3)
    assert [layer.shape for layer in result.report.layers[:2]] == [[20, 12], [12, 20]]


def test_linear_layers_of_other_classes_are_not_left_out():
    class LinearOfOurs(nn.Module):
        def __init__(self, columns: int, rows: int) -> None:
            super().__init__()
            self.in_features, self.out_features = columns, rows
            self.weight = nn.Parameter(torch.randn(rows, columns))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight.mT

    model = TinyEncoder()
    names = list(find_weights(model))
    model.layer[0]["wide"] = LinearOfOurs(12, 24)
    result = prune(model, batches(), 0.5, num_grads=8, samples_per_grad=2, damping=1e-3)
    assert list(result.masks) == names
    assert "layer.0.wide.weight is not used in batch 0, or not by its module" in str(result.report)


def test_shared_matrices_have_one_name():
    model = TinyEncoder()
    model.layer[1]["wide"].weight = model.layer[0]["wide"].weight
    assert list(find_weights(model)) == [
        "layer.0.wide.weight", "layer.0.narrow.weight", "layer.1.narrow.weight",
    ]  # fmt: skip
    assert list(find_weights(model, "re:.*wide.weight")) == ["layer.0.wide.weight"]
    with pytest.raises(
        ValueError, match=r"layer\.1\.wide\.weight is the same matrix as layer\.0\.wide\.weight"
    ):
        find_weights(model, "layer.1.wide")
    mask = prune(model, batches(), 0.5, num_grads=8, damping=1e-3).masks["layer.0.wide.weight"]
    assert torch.equal(model.layer[1]["wide"].weight != 0, mask)


def test_frozen_weights_are_pruned_and_stay_frozen():
    model = TinyEncoder().requires_grad_(False)
    result = prune(model, batches(), 0.5, num_grads=8, damping=1e-3)
    assert len(result.masks) == 4 and result.report.sparsity == 0.5
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("samples_per_grad", [None, 2])
def test_projections_of_torch_attention_are_linear_layers(samples_per_grad):
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 8)
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, tokens, labels):
            return {"logits": self.head(self.encoder(self.embedding(tokens)).mean(1))}

    model = Encoder()
    names = ["self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight",
             "linear2.weight"]  # fmt: skip
    expected = [f"encoder.layers.{layer}.{name}" for layer in range(2) for name in names]
    assert list(find_weights(model)) == expected
    result = prune(
        model, batches(), pattern="2:4", num_grads=8, samples_per_grad=samples_per_grad,
        damping=1e-3,
    )  # fmt: skip
    weight = model.encoder.layers[0].self_attn.in_proj_weight
    assert ((weight.view(-1, 4) != 0).sum(1) == 2).all()
    assert torch.equal(weight != 0, result.masks[expected[0]])


def gpt() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    return transformers.GPT2ForSequenceClassification(
        transformers.GPT2Config(
            vocab_size=20, n_embd=16, n_layer=1, n_head=2, n_positions=16, pad_token_id=0
        )
    )


def test_no_pattern_runs_along_the_outputs_of_a_conv1d():
    """That layer of transformers holds its weight as [inputs, outputs]."""
    model, params = gpt(), ["re:.*(c_attn|c_fc).weight"]
    data = [{"input_ids": batch["tokens"], "labels": batch["labels"] % 2} for batch in batches()]
    before = snapshot(model)
    for pattern in ("2:4", "block4", "block4x1"):
        with pytest.raises(ValueError, match=r"c_attn\.weight is \[inputs, outputs\], a Conv1D"):
            prune(model, data, pattern=pattern, params=params)
    assert unchanged(model, before)
    result = prune(model, data, 0.5, params=params, num_grads=8, damping=1e-3)
    assert result.report.sparsity == 0.5 and result.report.layers[0].shape == [16, 48]
