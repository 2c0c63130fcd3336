"""Loads the native core and keeps the reason when it cannot be loaded."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

_core: ModuleType | None = None
_failure: str | None = None


def _load() -> None:
    global _core, _failure
    try:
        module = importlib.import_module("obert_kernels._C")
    except ImportError as error:
        _failure = (
            "the native core of obert_kernels (obert_kernels/_C) could not be loaded.\n"
            f"  found:  {error}\n"
            "  wanted: the extension module compiled for this Python and machine\n"
            "  do:     `pip install --force-reinstall --no-deps .` in the folder of the source "
            "(needs a C++17 compiler)"
        )
        return
    wish = os.environ.get("OBERT_CPU_ISA")
    if wish and not module.select_instruction_set(wish):
        _failure = (
            f"OBERT_CPU_ISA={wish!r} cannot be used.\n"
            f"  found:  this build on this processor runs {', '.join(module.instruction_sets())}\n"
            "  do:     set OBERT_CPU_ISA to one of these or unset it"
        )
        return
    _core = module


def core() -> ModuleType:
    """Return the native module.

    Raises:
        ImportError: it could not be loaded; the message says what was found, what was
            wanted and what to do.
    """
    if _core is None:
        raise ImportError(_failure)
    return _core


def failure() -> str | None:
    """Return why the core is missing, or None if it is loaded."""
    return _failure


_load()
