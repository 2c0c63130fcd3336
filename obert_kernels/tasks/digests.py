"""Short names of what trials depend on: two that differ in anything differ in their digest."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loaders import encode
from .text_data import TextData

# A tokenizer is recognised by these; to tokenise them takes a fraction of a second.
_TEXTS_FOR_DIGEST = 1000
# Of a configuration: where it came from and what wrote it.
_NOT_CONFIGURATION = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")


def digest(content: bytes) -> str:
    """Return the SHA-256 of ``content``."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def weights_digest(state: Mapping[str, Tensor]) -> str:
    """Return a digest of the names, types, shapes and values of a model's tensors."""
    found = hashlib.sha256()
    for name, value in state.items():
        found.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return f"sha256:{found.hexdigest()}"


def config_digest(config: Mapping[str, Any]) -> str:
    """Return a digest of a model's configuration."""
    kept = {key: value for key, value in config.items() if key not in _NOT_CONFIGURATION}
    return digest(json.dumps(kept, sort_keys=True, default=repr).encode())


def code_digest(kind: type) -> str:
    """Return a digest of the files beside a class that came with a model, "" for any other."""
    if not kind.__module__.startswith("transformers_modules."):
        return ""
    files = sorted(Path(inspect.getfile(kind)).parent.glob("*.py"))
    return digest(b"\0".join(file.read_bytes() for file in files))


def tokenizer_digest(tokenizer: Any, data: TextData) -> str:
    """Return a digest of what a tokenizer makes of held-back texts: its files differ between
    versions of transformers."""
    some = data.dev.subset(range(min(len(data.dev), _TEXTS_FOR_DIGEST)))
    return digest(repr(encode(tokenizer, some)).encode())


def data_digest(data: TextData) -> str:
    """Return a digest of the texts, their classes and parts."""
    return digest(repr((data.label_names, data.train, data.dev, data.test)).encode())
