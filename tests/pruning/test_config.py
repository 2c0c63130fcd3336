"""Configurations: values checked once, defaults settled once, as JSON and back."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, unchanged

from obert_kernels import FisherConfig, PruningConfig, prune, register_saliency


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"selection": "random"}, ValueError, "selection must be one of greedy"),
        ({"selection": "random", "update": "joint"}, ValueError, "selection must be one of greedy"),
        ({"fisher": {"num_grads": 3}}, TypeError, "fisher must be a FisherConfig"),
        ({"fisher": None}, TypeError, "fisher must be a FisherConfig"),
        ({"params": 3}, TypeError, "params must be names or re: patterns, got 3"),
        ({"update": "mean"}, ValueError, "update must be 'sum', 'joint' or 'none', got 'mean'"),
        ({"damping": "much"}, ValueError, "damping must be a positive number or 'auto'"),
        ({"damping": -1.0}, ValueError, "damping must be positive"),
        ({"damping": float("inf")}, ValueError, "damping must be finite, got inf"),
        ({"damping": True}, TypeError, "damping must be a positive number or 'auto', got True"),
        ({"damping": None}, TypeError, "damping must be a positive number or 'auto'"),
        ({"scope": "model"}, ValueError, "scope must be 'global' or 'layer'"),
        ({"schedule": "cubic"}, ValueError, "schedule must be 'linear' or 'geometric'"),
        ({"steps": 0}, ValueError, "steps must be at least 1, got 0"),
        ({"steps": 2.5}, TypeError, "steps must be a whole number, got 2.5"),
        ({"pattern": "rows"}, ValueError, "pattern must be"),
        ({"pattern": "2:4", "steps": 2}, ValueError, "2:4 takes one step, got steps=2"),
        (
            {"pattern": "2:4", "fisher": FisherConfig(block_size=50)},
            ValueError,
            "a multiple of 4, such as 48; got 50",
        ),
    ],
)
def test_wrong_values(values, error, message):
    with pytest.raises(error, match=message):
        PruningConfig(**values)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_grads": 0}, ValueError, "num_grads must be at least 1, got 0"),
        ({"num_grads": True}, TypeError, "num_grads must be a whole number, got True"),
        ({"block_size": -3}, ValueError, "block_size must be between 1 and 256, got -3"),
        ({"samples_per_grad": 0}, ValueError, "samples_per_grad must be at least 1"),
        ({"dtype": torch.float32}, TypeError, "dtype must be 'float64' or 'float32'"),
        ({"gradients_of": "texts"}, ValueError, "gradients_of must be 'predictions' or 'labels'"),
        ({"estimator": "guess"}, ValueError, "estimator must be one of gram"),
    ],
)
def test_wrong_values_of_a_fisher(values, error, message):
    with pytest.raises(error, match=message):
        FisherConfig(**values)


def test_defaults_are_settled_when_it_is_made():
    assert PruningConfig().update == PruningConfig(update="auto").update == "joint"
    assert PruningConfig(selection="diagonal").update == "sum"
    assert PruningConfig(selection="magnitude").update == "none"
    assert PruningConfig().fisher.block_size == 50
    assert PruningConfig(pattern="4:8").fisher.block_size == 48
    assert PruningConfig(params="re:layer").params == ("re:layer",)
    assert PruningConfig().uses_fisher
    assert not PruningConfig(selection="magnitude").uses_fisher
    assert PruningConfig(selection="magnitude", update="joint").uses_fisher

    @register_saliency("simple", uses_fisher=False)
    def simple(problem):
        raise NotImplementedError

    assert PruningConfig(selection="simple").update == "none"


def test_it_cannot_be_changed_and_takes_keywords_alone():
    with pytest.raises(FrozenInstanceError):
        PruningConfig().steps = 2
    with pytest.raises(TypeError):
        PruningConfig("2:4")
    assert PruningConfig() == PruningConfig() and hash(PruningConfig()) == hash(PruningConfig())


def test_to_json_and_back():
    config = PruningConfig(
        pattern="block4", selection="diagonal", damping=1e-7, params=("re:a", "b"), steps=3,
        fisher=FisherConfig(num_grads=8, samples_per_grad=2, dtype="float32"),
    )  # fmt: skip
    content = json.loads(json.dumps(config.to_dict()))
    assert content["version"] == content["fisher"]["version"] == 1
    assert PruningConfig.from_dict(content) == config
    assert PruningConfig.from_dict(PruningConfig().to_dict()) == PruningConfig()


def test_whole_numbers_of_numpy_are_written():
    config = PruningConfig(steps=np.int64(2), fisher=FisherConfig(num_grads=np.int32(8)))
    assert json.loads(json.dumps(config.to_dict()))["steps"] == 2


def test_what_it_cannot_read():
    content = PruningConfig().to_dict()
    with pytest.raises(ValueError, match="this is no PruningConfig but 'FisherConfig'"):
        PruningConfig.from_dict(content["fisher"])
    with pytest.raises(ValueError, match="a PruningConfig has no sparsity"):
        PruningConfig.from_dict({**content, "sparsity": 0.5})
    with pytest.raises(ValueError, match="version of a PruningConfig must be a whole number"):
        PruningConfig.from_dict({**content, "version": None})
    later = {**content, "version": 2, "colour": "red"}
    with pytest.warns(UserWarning, match="written by a later version .* left out: colour"):
        assert PruningConfig.from_dict(later) == PruningConfig()


def test_check_finds_what_does_not_fit_the_model():
    model = TinyEncoder()
    assert list(PruningConfig().check(model)) == list(PruningConfig(params="re:layer").check(model))
    with pytest.raises(ValueError, match=r"pattern block5: the 12 columns of .* not divisible"):
        PruningConfig(pattern="block5").check(model)
    with pytest.raises(ValueError, match="matches no prunable weight"):
        PruningConfig(params="nothing").check(model)


def test_prune_takes_one_in_place_of_keywords():
    model, other = TinyEncoder(), TinyEncoder()
    other.load_state_dict(model.state_dict())
    fisher = FisherConfig(num_grads=8, samples_per_grad=2, block_size=10)
    config = PruningConfig(selection="diagonal", damping=1e-3, fisher=fisher)
    prune(model, batches(), 0.6, config=config)
    prune(
        other, batches(), 0.6, num_grads=8, samples_per_grad=2, block_size=10,
        selection="diagonal", damping=1e-3,
    )  # fmt: skip
    assert unchanged(model, snapshot(other))
    with pytest.raises(ValueError, match="give config or keywords, not both: update, num_grads"):
        prune(model, batches(), 0.7, config=config, num_grads=4, update="sum")


def test_what_gradients_are_taken_of():
    results = {}
    model = TinyEncoder()
    before = snapshot(model)
    for of in ("predictions", "labels"):
        model.load_state_dict(before)
        fisher = FisherConfig(num_grads=8, block_size=10, gradients_of=of)
        prune(model, batches(), 0.6, config=PruningConfig(damping=1e-3, fisher=fisher))
        results[of] = snapshot(model)
    assert not unchanged(model, results["predictions"])


def test_replacing_a_value_keeps_the_others():
    config = replace(PruningConfig(selection="diagonal"), damping=1e-3)
    assert (config.selection, config.update, config.damping) == ("diagonal", "sum", 1e-3)
