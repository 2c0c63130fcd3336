"""What can be chosen by name, and how more is added: Fishers, saliencies, patterns.

A name registered here serves :func:`obert_kernels.prune`, :func:`obert_kernels.estimate_fisher`
and, with ``--plugin``, the command line.  ``docs/extending.md`` has an example of each.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Registry(Generic[T]):
    """Things of one kind by name.

    Args:
        kind: what they are, for error messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._known: dict[str, T] = {}

    def add(self, name: str, thing: T) -> T:
        """Register; the same name again replaces what was there."""
        if not isinstance(name, str) or not name:
            raise ValueError(f"{self.kind} needs a name, got {name!r}")
        self._known[name] = thing
        return thing

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def find(self, name: str) -> T:
        """Return what has a name.

        Raises:
            ValueError: nothing has.
        """
        if name not in self._known:
            raise ValueError(
                f"{self.kind} must be one of {', '.join(self._known)}, or one that a plugin has "
                f"registered, got {name!r}"
            )
        return self._known[name]


def load_plugin(source: str | Path) -> None:
    """Import a Python file or module, which registers what it defines.

    Args:
        source: path of a ``.py`` file, or the name of a module that can be imported.

    Raises:
        ValueError: there is no such file or module, or importing it failed.
    """
    path = Path(source)
    try:
        if path.suffix == ".py":
            _import_file(path)
        else:
            importlib.import_module(str(source))
    except Exception as error:
        raise ValueError(
            f"plugin {source} could not be loaded: {type(error).__name__}: {error}"
        ) from error


def _import_file(path: Path) -> Any:
    if not path.is_file():  # a pipe would be waited for
        if path.exists():
            raise OSError("it is no file")
        raise FileNotFoundError("there is no such file")
    name = f"obert_plugin_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
