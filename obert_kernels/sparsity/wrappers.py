"""The model inside wrappers, and the names that modules and parameters have there.

``DataParallel``, ``DistributedDataParallel``, ``torch.compile``, ``AveragedModel`` and torch's
checkpoint wrapper hold a model as a submodule, which puts ``module.`` or ``_orig_mod.`` into all
names.  A checkpoint is to have the names of the model itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

_WITH_MODULE = (nn.DataParallel, DistributedDataParallel, AveragedModel)
# torch.compile, and torch.distributed's checkpoint_wrapper: these are slow to import.
_INNER = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers around it; itself, if there are none.

    Raises:
        TypeError: it is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, got a {type(model).__name__}: load the model first"
        )
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    if isinstance(module, _WITH_MODULE):
        return module.module
    return next((module._modules[name] for name in _INNER if name in module._modules), None)


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what ``model.named_modules()`` would if nothing in the model were wrapped."""
    seen: set[nn.Module] = set()

    def below(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if module in seen:
            return
        seen.add(module)
        yield name, module
        for own, child in module.named_children():
            yield from below(child, joined(name, own))

    yield from below(model, "")


def is_compiled(model: nn.Module) -> bool:
    """Has torch.compile, or ``.compile()``, been called on a model or anything in it?"""
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


@contextmanager
def wrappers_at_rest(model: nn.Module) -> Iterator[None]:
    """For forward and backward passes that are no training step, also if a wrapper is called.

    Nothing is compiled: compiled code may not see hooks, and is made anew for every set of frozen
    parameters.  ``DistributedDataParallel`` does not wait for gradients.
    """
    with ExitStack() as stack:
        # torch 2.5 has no stances.
        if hasattr(torch.compiler, "set_stance") and is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                stack.enter_context(module.no_sync())
        yield


def joined(prefix: str, name: str) -> str:
    """Return the name of what is called ``name`` in the module called ``prefix``."""
    return f"{prefix}.{name}" if prefix else name


def listed(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return what ``dict(model.named_parameters())`` would be if nothing were wrapped."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for prefix, module in named_modules(model):
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[joined(prefix, name)] = parameter
    return found


def plain_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return ``state_dict()`` of the model inside, with no wrapper in any name."""
    parts = {"module", *_INNER}
    wrapping = {
        joined(name, part)
        for name, module in model.named_modules()
        if _inside(module) is not None
        for part in parts & module._modules.keys()
    }

    def plain(key: str) -> str:
        pieces = key.split(".")
        kept = (
            piece
            for end, piece in enumerate(pieces, start=1)
            if ".".join(pieces[:end]) not in wrapping
        )
        return ".".join(kept)

    return {plain(key): value for key, value in model.state_dict().items()}


def check_one_process(model: nn.Module) -> None:
    """Raise ValueError for a model that several processes train, each of which would prune it."""
    for module in model.modules():
        if isinstance(module, DistributedDataParallel) and module.process_group.size() > 1:
            raise ValueError(
                f"the model is trained by {module.process_group.size()} processes "
                "(DistributedDataParallel), each of which would prune it in a way of its own: "
                "prune the model inside, wrapper.module, with the same batches in all of them"
            )


def check_no_adapters(model: nn.Module) -> None:
    """Raise ValueError for a model with adapters of PEFT.

    A base weight that is pruned is not zero in the model that its adapter makes of it, and saving
    such a model writes its adapters alone.
    """
    peft: Any = sys.modules.get("peft")
    if peft is None:  # then nothing in the model can be of it
        return
    kinds = (
        peft.PeftModel,
        peft.tuners.tuners_utils.BaseTuner,
        peft.tuners.tuners_utils.BaseTunerLayer,
        peft.utils.ModulesToSaveWrapper,
    )
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    if not found:
        return
    top = next((module for _, module in found if isinstance(module, peft.PeftModel)), None)
    if top is not None and top.active_peft_config.is_prompt_learning:
        remedy = "prune the base model, loaded without them, and train them afterwards"
    elif any(hasattr(module, "merge_and_unload") for _, module in found):
        remedy = "merge them first, model = model.merge_and_unload()"
    else:
        remedy = "merge them first, merge_and_unload() of the peft.PeftModel that holds them"
    where = "the model" if found[0][0] == "" else found[0][0]
    raise ValueError(
        f"{where} has adapters of PEFT, through which pruned weights would not be zero: {remedy}"
    )
