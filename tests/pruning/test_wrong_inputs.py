"""What is no model, no batches, no loss: one line that names the thing and the remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, unchanged
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from obert_kernels import NotFiniteError, Pruner, PruningConfig, estimate_fisher, prune

SMALL = {"num_grads": 4, "block_size": 12, "damping": 1e-3}


def refused(error: type[Exception], message: str, *arguments: Any, **options: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        prune(*arguments, **{**SMALL, **options})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("thing", "kind"),
    [
        ("bert-base-uncased", "a str"),
        (Path("model"), "a PosixPath"),
        (None, "a NoneType"),
        (TinyEncoder, "a type"),
        (TinyEncoder().state_dict(), "a OrderedDict"),
        (dict(TinyEncoder().named_parameters()), "a dict"),
    ],
)
def test_what_is_no_model(thing: Any, kind: str) -> None:
    message = f"model must be a torch.nn.Module, got {kind}: load the model first"
    refused(TypeError, message, thing, batches(), 0.5)
    refused(TypeError, message, thing, batches(), {"re:layer": 0.5})
    with pytest.raises(TypeError, match=message):
        estimate_fisher(thing, batches())
    with pytest.raises(TypeError, match=message):
        Pruner(thing)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("train.csv", TypeError, "got the text 'train.csv': read and tokenise it first"),
        (b"text", TypeError, "got the text b'text'"),
        (torch.zeros(4, 6), TypeError, r"got a tensor: pass \[tensor\]"),
        (
            TinyEncoder(),
            TypeError,
            "batches must be .* got a model: pass the model first",
        ),
        (batches, TypeError, "batches must be an iterable of batches, got a function: call it"),
        (DataLoader, TypeError, "got the class DataLoader: call it"),
        (7, TypeError, "got a int"),
        ([], ValueError, "batches is empty"),
        (DataLoader(TensorDataset(torch.zeros(3, 6)), 4, drop_last=True), ValueError, "is empty"),
        (["a text", "another"], TypeError, "a batch of type str needs loss_fn"),
        ([torch.zeros(4, 6)], TypeError, "a batch of type Tensor needs loss_fn"),
        (
            [{"tokens": [[1, 2, 3]], "labels": [0]}],
            TypeError,
            r"keys \['labels', 'tokens'\] holds no tensors: tokenise with return_tensors='pt'",
        ),
        (
            [{"tokens": torch.ones(6, dtype=torch.long), "labels": torch.tensor(1)}],
            ValueError,
            "holds a single sample .* pass batches, such as a DataLoader gives, not the data set",
        ),
    ],
)
def test_what_is_no_batches(data: Any, error: type[Exception], message: str) -> None:
    refused(error, message, TinyEncoder(), data, 0.5)
    if error is TypeError and "batch of" not in message and "keys" not in message:
        calibrated = message.replace("batches must", "calibration must")
        refused(error, calibrated, TinyEncoder(), batches(), 0.5, calibration=data, damping="auto")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": nn.CrossEntropyLoss()}, TypeError, "CrossEntropyLoss takes outputs and lab"),
        ({"loss_fn": "cross_entropy"}, TypeError, r"called as loss_fn\(model, batch\).* got 'cr"),
        ({"max_memory": "8GB"}, TypeError, r"such as 8 \* 2\*\*30; got '8GB'"),
        ({"max_memory": 0}, ValueError, "max_memory must be positive, got 0"),
        ({"max_memory": True}, TypeError, "max_memory is a number of bytes"),
        ({"progress": 5}, TypeError, r"called as progress\(stage, done, total\); got 5"),
        ({"fisher": {}}, TypeError, "what estimate_fisher or Pruner.fisher returned, got a dict"),
        ({"pattern": 4}, TypeError, "pattern must be a name such as 'block4' or '2:4', got 4"),
        ({"params": [4]}, TypeError, r"params must be names or re: patterns, got \(?\[?4"),
        ({"params": 4}, TypeError, "params must be names or re: patterns"),
        ({"sparsity": 80}, ValueError, r"between 0 and 1 \(0.8 is 80 %\), got 80"),
        ({"sparsity": "80%"}, TypeError, "sparsity must be a number from 0 to 1, got '80%'"),
        ({"sparsity": True}, TypeError, "sparsity must be a number from 0 to 1, got True"),
        ({"sparsity": float("nan")}, ValueError, "sparsity must be between 0 and 1"),
        ({"sparsity": {4: 0.5}}, TypeError, "sparsity: names and re: patterns are strings, got 4"),
        ({"sparsity": {}}, ValueError, "sparsity is empty"),
        ({"sparsity": {"layer.7": 0.5}}, ValueError, "sparsity: 'layer.7' matches no prunable"),
        ({"sparsity": {"re:(": 0.5}}, ValueError, r"sparsity: 're:\(' is not a valid expression"),
        ({"sparsity": {"layer.0.wide": True}}, TypeError, "must be a number from 0 to 1, got True"),
    ],
)
def test_other_arguments(options: dict, error: type[Exception], message: str) -> None:
    refused(error, message, TinyEncoder(), batches(), **{"sparsity": 0.5, **options})


def test_a_configuration_is_no_dictionary() -> None:
    with pytest.raises(TypeError, match="config must be a PruningConfig, got a dict"):
        prune(TinyEncoder(), batches(), 0.5, config={"damping": 1e-3})
    with pytest.raises(TypeError, match="config must be a PruningConfig, got a dict"):
        Pruner(TinyEncoder(), PruningConfig().to_dict())


@pytest.mark.parametrize("samples_per_grad", [None, 2])
@pytest.mark.parametrize("damping", [1e-3, "auto"])
def test_batches_made_inside_inference_mode_are_copied(samples_per_grad, damping) -> None:
    with torch.inference_mode():
        data = batches()
    assert data[0]["tokens"].is_inference()
    model, other = TinyEncoder(), TinyEncoder()
    other.load_state_dict(model.state_dict())
    options = SMALL | {"samples_per_grad": samples_per_grad, "damping": damping}
    prune(model, data, 0.5, **options)
    prune(other, batches(), 0.5, **options)
    assert unchanged(model, snapshot(other))
    with torch.inference_mode():  # nor does it matter where the call is made
        prune(model, data, 0.7, **options)


def test_a_model_made_inside_inference_mode() -> None:
    with torch.inference_mode():
        model = TinyEncoder()
    refused(ValueError, r"layer\.0\.wide\.weight was made inside torch\.inference_mode", model,
            batches(), 0.5)  # fmt: skip


def with_weight(value: torch.Tensor) -> nn.Module:
    model = TinyEncoder()
    model.layer[0]["wide"].weight = nn.Parameter(value, requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (torch.zeros(24, 12, dtype=torch.int8), TypeError, "type torch.int8; .* before it is quan"),
        (torch.ones(24, 12).to(torch.float8_e4m3fn), TypeError, "has type torch.float8_e4m3fn"),
        (torch.ones(24, 12, dtype=torch.complex64), TypeError, "has type torch.complex64"),
        (torch.ones(24, 12).to_sparse(), TypeError, "stored as torch.sparse_coo: make it dense"),
        (torch.ones(1, 12).expand(24, 12), ValueError, "is an expanded view"),
        (torch.full((24, 12), torch.inf), ValueError, "holds NaN or infinite weights"),
    ],
)
def test_weights_that_cannot_be_pruned(value, error, message) -> None:
    refused(error, rf"^layer\.0\.wide\.weight .*{message}", with_weight(value), batches(), 0.5)


def test_matrices_that_share_their_memory() -> None:
    model = TinyEncoder()
    model.layer[1]["wide"].weight = nn.Parameter(model.layer[0]["wide"].weight.data)
    message = r"layer\.0\.wide\.weight and layer\.1\.wide\.weight share their memory"
    refused(ValueError, message, model, batches(), 0.5)
    result = prune(model, batches(), 0.5, params=["layer.0.wide"], **SMALL)
    assert result.report.sparsity == 0.5


def test_frozen_weights_are_pruned_and_stay_frozen() -> None:
    model = TinyEncoder().requires_grad_(False)
    prune(model, batches(), 0.5, **SMALL)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("samples_per_grad", [None, 2])
@pytest.mark.parametrize(
    ("loss_fn", "message"),
    [
        (lambda model, batch: model(**batch)["loss"].detach(), "the loss has no gradient"),
        (
            lambda model, batch: model(**batch)["loss"].item(),
            "scalar tensor, got a float: return",
        ),
        (
            lambda model, batch: model(**batch)["logits"],
            r"tensor, got one of shape \[\d, 3\]",
        ),
        (lambda model, batch: model.head.weight.sum(), "or depends on none of the matrices"),
        (lambda model, batch: model(**batch)["loss"] * torch.nan, "the loss is nan"),
    ],
)
def test_losses_without_use(loss_fn, message, samples_per_grad) -> None:
    refused(ValueError, message, TinyEncoder(), batches(), 0.5, loss_fn=loss_fn,
            samples_per_grad=samples_per_grad)  # fmt: skip


@pytest.mark.parametrize("samples_per_grad", [None, 2])
def test_what_is_not_finite_says_which_batch_and_what_to_do(samples_per_grad) -> None:
    """As an error of its own, so that a caller can try again in float32."""
    half = TinyEncoder(dtype=torch.float16)
    loud = {"loss_fn": lambda model, batch: model(**batch)["loss"] * 60_000}
    remedy = r"in float32 without autocast"
    options = SMALL | {"samples_per_grad": samples_per_grad}
    with pytest.raises(NotFiniteError, match=rf"^batch 0: the loss is inf; .*{remedy}"):
        prune(half, batches(), 0.5, **loud, **options)

    def steep(model: nn.Module, batch: Any) -> torch.Tensor:
        loss = model(**batch)["loss"]
        return loss + (loss - loss.detach()) * 1e30 * 1e30

    with pytest.raises(NotFiniteError, match=rf"^batch 0: the gradient of layer.* {remedy}"):
        prune(TinyEncoder(), batches(), 0.5, loss_fn=steep, **options)
    broken = [{**batch, "tokens": batch["tokens"] % 19} for batch in batches()]
    model = TinyEncoder()
    with torch.no_grad():
        model.embedding.weight[19] = torch.inf
    broken[2]["tokens"][0, 0] = 19
    with pytest.raises(NotFiniteError, match=rf"batch 2 of those .* gives logits .*{remedy}"):
        prune(model, broken, 0.5, **options | {"damping": "auto"})
