"""Optional packages."""

from __future__ import annotations

import importlib
from types import ModuleType


def import_extra(module: str) -> ModuleType:
    """Import a package of the ``cli`` extra.

    Args:
        module: name of the module, for example ``"transformers"``.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ImportError(
            f"{error.name} is not installed; install it with `pip install '.[cli]'` in the folder "
            "of obert_kernels' source"
        ) from error
