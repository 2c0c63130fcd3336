"""Pruned weights stay at zero in any training loop inside ``pruned_weights_kept``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from tiny import TinyEncoder, batches
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from obert_kernels import prune, pruned_weights_kept

Masks = Mapping[str, Tensor]


@pytest.fixture(autouse=True)
def no_hook_is_left() -> Iterator[None]:
    before = dict(torch_optimizer._global_optimizer_post_hooks)
    yield
    assert dict(torch_optimizer._global_optimizer_post_hooks) == before


def pruned() -> tuple[TinyEncoder, Masks]:
    model, masks, _ = prune(TinyEncoder(), sparsity=0.5, selection="magnitude")
    return model, masks


def is_pruned(model: nn.Module, masks: Masks) -> bool:
    return not any(bool(model.get_parameter(n)[~mask].any()) for n, mask in masks.items())


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, after: Callable[[], object] = lambda: 0
) -> None:
    for batch in batches(3):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
        after()


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "NAdam", "Adagrad", "Adafactor"])
def test_any_optimizer(kind):
    model, masks = pruned()
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=0.05, weight_decay=0.1)
    before = model.layer[0]["wide"].weight.detach().clone()
    with pruned_weights_kept(model, masks):
        train(model, optimizer, lambda: is_pruned(model, masks) or pytest.fail("after a step"))
    kept = masks["layer.0.wide.weight"]
    assert (model.layer[0]["wide"].weight[kept] != before[kept]).any(), "the others are trained"
    train(model, optimizer)
    assert not is_pruned(model, masks), "as they would have been without"


def test_without_masks_what_is_zero_at_the_start_is_kept():
    model, masks = pruned()
    with pruned_weights_kept(model) as weights:
        assert weights.masks.keys() == masks.keys()
        assert all(torch.equal(weights.masks[name], mask) for name, mask in masks.items())
        train(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    assert is_pruned(model, masks)
    with torch.no_grad():
        model.head.weight[0] = 0
    with pruned_weights_kept(model, params="head") as weights:
        assert list(weights.masks) == ["head.weight"]
        train(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    assert not model.head.weight[0].any() and model.head.weight[1:].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no weight of the 4 matrices looked at is zero: prune the model first"),
        ({"masks": {"head.bias": torch.ones(5)}}, r"head\.bias has shape \[5\]"),
        ({"masks": {"kernel": torch.ones(5)}}, "the model does not have: kernel"),
        ({"masks": {}, "params": "head"}, "masks or params, not both"),
        ({"masks": {}}, "masks are empty, so nothing would be kept"),
        (
            {"masks": {"m.head.bias": torch.ones(3)}},
            r"for example, embedding\.weight: load",
        ),
        (
            {"masks": {"head.bias": torch.full((3,), 0.5)}},
            r"head\.bias holds something else",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message), pruned_weights_kept(TinyEncoder(), **arguments):
        pytest.fail("the block is not entered")


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (("model", {}, "report"), r"got a tuple: give the masks of what prune returned"),
        ("folder", r"got a str: .*load_masks\(folder\)"),
        ({"head.bias": [True, False, True]}, r"got a list for head\.bias: .* torch\.as_tensor"),
    ],
)
def test_what_are_no_masks(masks, message):
    with pytest.raises(TypeError, match=message), pruned_weights_kept(TinyEncoder(), masks):
        pytest.fail("the block is not entered")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # looked at by torch.compile
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_wrapped_models(wrap):
    model, masks = pruned()
    wrapper = wrap(model)
    with pruned_weights_kept(wrapper, masks):
        train(wrapper, torch.optim.AdamW(wrapper.parameters(), lr=0.05))
    assert is_pruned(model, masks)


def test_several_optimizers_and_gradients_that_are_added_up():
    model, masks = pruned()
    optimizers = [
        torch.optim.SGD(model.layer.parameters(), lr=0.1, momentum=0.9),
        torch.optim.AdamW(model.head.parameters()),
    ]
    with pruned_weights_kept(model, masks):
        for index, batch in enumerate(batches(4)):
            model(**batch)["loss"].backward()
            if index % 2:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
                assert is_pruned(model, masks)


def test_an_optimizer_for_each_parameter_that_steps_during_the_backward_pass():
    """Weights that the pass still needs are left alone by the steps of others."""
    model, masks = pruned()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step(parameter: Tensor) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    with pruned_weights_kept(model, masks):
        for batch in batches(3):
            model(**batch)["loss"].backward()
            assert is_pruned(model, masks)
    assert model.layer[0]["wide"].weight.any()


def test_steps_that_a_scaler_leaves_out():
    model, masks = pruned()
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    with pruned_weights_kept(model, masks):
        for index, batch in enumerate(batches(3)):
            optimizer.zero_grad()
            scaler.scale(model(**batch)["loss"] * (torch.inf if index == 1 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert is_pruned(model, masks)


def test_parameters_that_are_replaced_or_converted():
    model, masks = pruned()
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    with pruned_weights_kept(model, masks):
        model.load_state_dict(state, assign=True)
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert is_pruned(model, masks)
        model.double()
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
        assert is_pruned(model, masks)
        model.load_state_dict(state)
    assert is_pruned(model, masks), "at the end, too"


def test_an_exception_ends_it():
    model, masks = pruned()

    def interrupted() -> None:
        with torch.no_grad():
            model.layer[0]["wide"].weight.add_(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), pruned_weights_kept(model, masks):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), interrupted)
    assert is_pruned(model, masks)


def test_blocks_inside_each_other_and_masks_that_grow():
    model, masks = pruned()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    first = dict(list(masks.items())[:1])
    with pruned_weights_kept(model, masks) as weights:
        with pruned_weights_kept(model, first):
            train(model, optimizer)
        assert is_pruned(model, masks)
        more = prune(model, sparsity=0.8, selection="magnitude").masks
        weights.masks = more
        train(model, optimizer)
    assert is_pruned(model, more)


def test_masks_that_are_not_bool():
    model, masks = pruned()
    numbers = {name: mask.float() if "0" in name else mask.to(torch.uint8)
               for name, mask in masks.items()}  # fmt: skip
    with pruned_weights_kept(model, numbers):
        train(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert is_pruned(model, masks) and model.layer[0]["wide"].weight.any()


def test_an_average_of_the_weights_stays_sparse():
    model, masks = pruned()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    with pruned_weights_kept(model, masks):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        train(model, optimizer, lambda: average.update_parameters(model))
    assert is_pruned(average.module, masks)
