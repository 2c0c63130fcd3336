"""The whole stage, also against the same written out plainly."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import TinyEncoder
from tiny import batches as token_batches
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from benchmarks.support.plain_reconstruction import reconstruct_plainly
from obert_kernels import ReconstructionConfig, find_weights
from obert_kernels.gradients.losses import default_loss
from obert_kernels.reconstruction import stage
from obert_kernels.reconstruction.stage import biases_of, reconstruct

RIDGE = 0.05


def tiny_bert(dtype=torch.float64):
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        vocab_size=50, max_position_embeddings=16,
    )  # fmt: skip
    model = BertForSequenceClassification(config).to(dtype)
    for parameter in model.bert.encoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def texts(count=6, size=8, seed=0):
    """Batches, the last third of every second text is padding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids = torch.randint(1, 50, (size, 9), generator=generator)
        mask = torch.ones_like(ids)
        mask[::2, 6:] = 0
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def pruned(model, share=0.5, seed=0, params=None):
    """Masks at random, and the weights and biases before."""
    weights = find_weights(model, params)
    parameters = {**weights, **biases_of(model, weights)}
    dense = {name: value.detach().clone() for name, value in parameters.items()}
    generator = torch.Generator().manual_seed(seed)
    masks = {n: torch.rand(w.shape, generator=generator) >= share for n, w in weights.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            weight *= masks[name]
    return weights, masks, dense


def fitted(model, batches, held=None, loss_fn=default_loss, params=None, **config):
    weights, masks, dense = pruned(model, params=params)
    settings = ReconstructionConfig(**{"ridge": RIDGE, **config})
    found = reconstruct(
        model, weights, masks, dense, batches, held or texts(seed=7), loss_fn, settings,
        lambda *told: None,
    )  # fmt: skip
    return found, masks


def test_bert_is_fitted_as_described():
    model = tiny_bert()
    dense, plain = copy.deepcopy(model), copy.deepcopy(model)
    found, masks = fitted(model, texts())
    assert [fit.is_kept for fit in found.layers] == [True] * 12 and not found.notes
    pruned(plain)
    reconstruct_plainly(dense.eval(), plain.eval(), masks, texts(), RIDGE)
    expected = plain.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-7, atol=1e-9, msg=name)


def test_the_model_moves_towards_the_dense_one():
    model = tiny_bert()
    dense, only_pruned = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    pruned(only_pruned)
    fitted(model, texts(24))
    fresh = texts(seed=3)
    with torch.no_grad():
        wanted = [dense(**batch).logits for batch in fresh]
        errors = [
            sum(
                float((other.eval()(**b).logits - w).square().sum())
                for b, w in zip(fresh, wanted, strict=True)
            )
            for other in (only_pruned, model)
        ]
    assert errors[1] < errors[0]


def test_pruned_weights_stay_zero_and_others_do_not_become_so():
    model = tiny_bert()
    _, masks = fitted(model, texts())
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name) != 0, mask), name


@pytest.mark.parametrize("how", [{"inputs": "dense"}, {"residual": False}])
def test_variants_differ(how):
    one, other = tiny_bert(), tiny_bert()
    fitted(one, texts())
    fitted(other, texts(), **how)
    weights = find_weights(one)
    same = [torch.equal(w, other.get_parameter(name)) for name, w in weights.items()]
    assert any(same) and not all(same)  # the first layers see the same inputs either way


def test_what_is_padding_does_not_count():
    one, other = tiny_bert(), tiny_bert()
    changed = [
        {**batch, "input_ids": torch.where(batch["attention_mask"] > 0, batch["input_ids"], 3)}
        for batch in texts()
    ]
    fitted(one, texts())
    fitted(other, changed)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(value, other.state_dict()[name], msg=name)


def test_dropout_is_off_and_modes_come_back():
    model = tiny_bert().train()
    model.bert.encoder.eval()
    modes = [module.training for module in model.modules()]
    other = tiny_bert().eval()
    fitted(model, texts())
    fitted(other, texts())
    assert [module.training for module in model.modules()] == modes
    torch.testing.assert_close(model.state_dict(), other.state_dict())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_fitted_in_float64_and_stored_in_its_type(dtype):
    model = tiny_bert(dtype)
    found, _ = fitted(model, texts())
    assert all(parameter.dtype == dtype for parameter in model.parameters())
    assert sum(fit.is_kept for fit in found.layers) > 8
    before = sum(fit.before for fit in found.layers)
    assert sum(fit.after for fit in found.layers) < 0.7 * before


def test_blocks_that_are_never_called_are_followed_through_the_whole_model():
    """Layers of a ModuleDict, which has no forward."""
    torch.manual_seed(0)
    model = TinyEncoder()
    found, _ = fitted(model, token_batches(12), token_batches(8))
    expected = [f"layer.{i}.{name}.weight" for i in range(2) for name in ("wide", "narrow")]
    assert [fit.name for fit in found.layers] == expected
    assert sum(fit.after for fit in found.layers) < sum(fit.before for fit in found.layers)


def test_a_matrix_of_two_layers_is_left_out_by_name():
    model = tiny_bert()
    first, second = model.bert.encoder.layer
    second.intermediate.dense.weight = first.intermediate.dense.weight
    before = first.intermediate.dense.weight.detach().clone()
    found, masks = fitted(model, texts())
    (note,) = found.notes
    assert "encoder.layer.0.intermediate.dense.weight not fitted: other modules share it" in note
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    assert torch.equal(first.intermediate.dense.weight, before * masks[name])


def test_progress_counts_the_layers():
    told = []
    model = tiny_bert()
    weights, masks, dense = pruned(model)
    reconstruct(
        model, weights, masks, dense, texts(), texts(), default_loss,
        ReconstructionConfig(ridge=RIDGE), lambda *now: told.append(now),
    )  # fmt: skip
    assert told == [("reconstruction", done, 12) for done in range(1, 13)]


def test_a_cache_of_keys_and_values_changes_nothing():
    """A block that is run several times must not find what an earlier run left in it."""
    fitted_weights = []
    for use_cache in (False, True):
        torch.manual_seed(0)
        config = GPT2Config(
            n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=50, pad_token_id=0,
            use_cache=use_cache,
        )  # fmt: skip
        model = GPT2ForSequenceClassification(config)
        found, _ = fitted(model, texts(), params=[r"re:.*\.h\..*weight"])
        assert [fit.is_kept for fit in found.layers] == [True] * 8
        fitted_weights.append(model.state_dict())
    without, with_cache = fitted_weights
    assert all(torch.equal(value, with_cache[name]) for name, value in without.items())


def test_a_fit_that_leaves_the_range_of_the_type_is_not_kept(monkeypatch):
    model = tiny_bert(torch.float16)
    real = stage.fit_layer

    def too_large(name, *arguments):
        fit = real(name, *arguments)
        return fit._replace(weight=fit.weight * 1e6) if "intermediate" in name else fit

    monkeypatch.setattr(stage, "fit_layer", too_large)
    found, _ = fitted(model, texts())
    kept = {fit.name for fit in found.layers if fit.is_kept}
    assert kept and not any("intermediate" in name for name in kept)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
