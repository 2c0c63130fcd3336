"""Names are those of the model inside wrappers."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyEncoder
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from obert_kernels import find_weights
from obert_kernels.sparsity.wrappers import (
    is_compiled,
    named_modules,
    named_parameters,
    plain_state_dict,
    unwrapped,
)


def compiled(module: nn.Module) -> nn.Module:
    wrapper = torch.compile(module, backend="eager")
    assert isinstance(wrapper, nn.Module)
    return wrapper


WRAPPERS = [compiled, nn.DataParallel, AveragedModel, checkpoint_wrapper,
            lambda module: compiled(nn.DataParallel(compiled(module)))]  # fmt: skip
NAMES = ["torch.compile", "DataParallel", "AveragedModel", "checkpoint_wrapper", "nested"]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=NAMES)
@pytest.mark.parametrize("where", ["around", "inside"])
def test_wrappers_leave_no_trace_in_names(wrap, where):
    model = TinyEncoder()
    expected = dict(model.named_parameters()), model.state_dict(), list(find_weights(model))
    modules = [name for name, _ in model.named_modules()]
    if where == "around":
        whole = wrap(model)
        assert unwrapped(whole) is model or wrap is AveragedModel
    else:
        whole = model
        model.layer[0]["wide"] = wrap(model.layer[0]["wide"])
        model.layer[1] = wrap(model.layer[1])
        assert unwrapped(whole) is model
    found = named_parameters(whole)
    assert list(found) == list(expected[0])
    assert list(find_weights(whole)) == expected[2]
    assert [name for name, _ in named_modules(whole)] == modules
    state = plain_state_dict(unwrapped(whole))
    if wrap is not AveragedModel:  # which holds copies, and counts them
        assert all(found[name] is value for name, value in expected[0].items())
        assert state.keys() == expected[1].keys()


def test_what_is_called_like_a_wrapper_is_none():
    """A model's own submodule named ``module`` keeps its place in the names."""
    model = nn.ModuleDict({"module": TinyEncoder()})
    assert unwrapped(model) is model
    assert next(iter(find_weights(model))) == "module.layer.0.wide.weight"
    assert plain_state_dict(model).keys() == model.state_dict().keys()


def test_a_shared_module_has_one_name():
    model = TinyEncoder()
    model.layer[1] = model.layer[0]
    assert named_parameters(model).keys() == dict(model.named_parameters()).keys()
    assert not is_compiled(model)
    model.layer[0].compile(backend="eager")
    assert is_compiled(model)


@pytest.mark.parametrize("model", ["bert-base-uncased", {"weight": 1}, None])
def test_what_is_no_module_is_refused(model):
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got a"):
        find_weights(model)
