"""A wrapper changes nothing about what is pruned, and works afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny import TinyEncoder, batches, snapshot, unchanged
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from obert_kernels import (
    GroupGradients,
    Pruner,
    PruningConfig,
    find_weights,
    model_loss,
    prediction_loss,
    prune,
)
from obert_kernels.gradients.losses import class_logits

OPTIONS = {"num_grads": 8, "damping": 1e-3, "block_size": 8}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def tiny() -> TinyEncoder:
    torch.manual_seed(0)
    return TinyEncoder()


def compiled(model: nn.Module) -> nn.Module:
    whole = torch.compile(model, backend="eager")
    assert isinstance(whole, nn.Module)
    return whole


def compiled_in_place(model: TinyEncoder) -> nn.Module:
    model.compile(backend="eager")
    model.layer[0]["wide"].compile(backend="eager")
    return model


def compiled_inside(model: TinyEncoder) -> nn.Module:
    model.layer[0]["wide"] = compiled(model.layer[0]["wide"])
    return model


WAYS = [compiled, compiled_in_place, compiled_inside, nn.DataParallel, DistributedDataParallel,
        lambda model: compiled(DistributedDataParallel(model))]  # fmt: skip


# torch.compile looks at .grad of what is no leaf.
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("samples_per_grad", [None, 2])
@pytest.mark.parametrize("wrap", WAYS)
def test_the_model_inside_is_pruned(wrap, samples_per_grad):
    options = {**OPTIONS, "samples_per_grad": samples_per_grad}
    plain, data = tiny(), batches()
    expected = prune(plain, data, 0.5, **options)
    model = tiny()
    wrapper = wrap(model)
    wrapper.train()

    def train() -> None:
        wrapper(**data[0])["loss"].backward()

    train()  # before, so that what is compiled has been
    result = prune(wrapper, data, 0.5, **options)
    assert result.model is wrapper
    assert result.masks.keys() == expected.masks.keys()
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.masks.items())
    assert result.report.notes == expected.report.notes
    assert result.report.layers == expected.report.layers
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1)
    for _ in range(2):  # a reducer that is out of step fails in the second
        optimizer.zero_grad()
        train()
        assert model.head.weight.grad is not None and model.head.weight.grad.any()
    wrapper.eval(), plain.eval()
    torch.testing.assert_close(wrapper(**data[0])["logits"], plain(**data[0])["logits"])


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_gradients_of_groups_where_something_inside_is_compiled():
    """Compiled before there were hooks, it would not call them."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for wrap in (lambda model: model, compiled_in_place):
        model = wrap(tiny())
        model(**batches()[0])["loss"].backward()
        groups = GroupGradients(model, find_weights(model), samples_per_grad=2)
        groups.check(batches()[0])
        found[wrap.__name__] = {}
        for _ in groups.run(batches(1), 2, found[wrap.__name__].__setitem__):
            assert groups.split == 0
    plain, other = found.values()
    assert plain.keys() == other.keys() and len(plain) == 4
    for name, gradients in plain.items():
        torch.testing.assert_close(other[name], gradients)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("samples_per_grad", [None, 2])
@pytest.mark.parametrize("wrap", [compiled, DistributedDataParallel])
def test_a_loss_may_call_the_wrapper_itself(wrap, samples_per_grad):
    model, data = tiny(), batches()
    expected = prune(tiny(), data, 0.5, **OPTIONS, loss_fn=model_loss)
    wrapper = wrap(model)
    wrapper(**data[0])["loss"].backward()
    options = {**OPTIONS, "samples_per_grad": samples_per_grad}
    result = prune(wrapper, data, 0.5, **options, loss_fn=lambda _, batch: wrapper(**batch)["loss"])
    assert result.report.sparsity == 0.5
    if samples_per_grad is None:
        assert all(torch.equal(result.masks[name], mask) for name, mask in expected.masks.items())
    for _ in range(2):
        wrapper(**data[0])["loss"].backward()


def test_state_and_masks_of_a_pruner_fit_the_model_without_its_wrapper():
    model = tiny()
    config = PruningConfig(selection="magnitude")
    pruner = Pruner(nn.DataParallel(model), config)
    pruner.step(0.5)
    assert list(pruner.masks) == [layer.name for layer in pruner.report().layers]
    assert all(torch.equal(model.get_parameter(n) != 0, mask) for n, mask in pruner.masks.items())
    again = Pruner(compiled(model), config)
    again.load_state_dict(pruner.state_dict())
    with torch.no_grad():
        model.layer[0]["wide"].weight.add_(1)
    again.apply_masks()
    assert torch.equal(model.layer[0]["wide"].weight != 0, again.masks["layer.0.wide.weight"])


def test_the_configuration_behind_a_wrapper_counts():
    """Logits of a regression with two outputs are no classes."""
    model = TinyEncoder()
    model.config = type("Config", (), {"problem_type": "regression"})()  # type: ignore[assignment]
    batch = batches()[0]
    for wrapper in (model, nn.DataParallel(model), compiled(model)):
        assert class_logits(wrapper, model(**batch)) is None
        with pytest.raises(TypeError, match="gives no logits of classes"):
            prediction_loss(wrapper, batch)
        assert model_loss(wrapper, batch) > 0


@pytest.mark.usefixtures("one_process")
def test_several_processes_would_prune_in_several_ways(monkeypatch):
    wrapper = DistributedDataParallel(tiny())
    before = snapshot(wrapper)
    monkeypatch.setattr(type(wrapper.process_group), "size", lambda group: 2)
    with pytest.raises(ValueError, match=r"trained by 2 processes .*prune the model inside, wrapp"):
        prune(wrapper, batches(), 0.5, **OPTIONS)
    assert unchanged(wrapper, before)
