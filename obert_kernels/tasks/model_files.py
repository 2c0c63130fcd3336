"""Where a model is, and whether its files are whole: looked at before anything is loaded."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import check_input_file, expanded
from .demo_sets import DEMO_PREFIX
from .downloads import demo_model_folder
from .hub import hub_problem

DEMO_MODEL = DEMO_PREFIX + "minilm"

# In the order in which transformers looks for them.
_WEIGHTS = (
    "model.safetensors", "model.safetensors.index.json",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
_TOKENIZERS = ("tokeniz*", "vocab*", "*.model", "merges*", "*.codes")
_OTHER_FORMATS = {
    ".gguf": "GGUF", ".onnx": "ONNX", ".h5": "TensorFlow", ".msgpack": "Flax", ".ot": "Rust",
    ".tflite": "TensorFlow Lite",
}  # fmt: skip
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from.

    Attributes:
        name: as it was given.
        place: its folder, or its name on the hub.
        in_cache: nothing is downloaded, what an earlier download left is used.
        trusted: code that comes with the model may run.
    """

    name: str
    place: str
    in_cache: bool = False
    trusted: bool = False

    @property
    def folder(self) -> Path | None:
        """The folder, None for a name on the hub."""
        return Path(self.place) if Path(self.place).is_dir() else None

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every ``from_pretrained``."""
        return {"trust_remote_code": self.trusted, "local_files_only": self.in_cache}


def find_model(model: str, trust_remote_code: bool = False) -> ModelSource:
    """Return where ``model`` is; the files of a folder are checked.

    Args:
        model: a folder, a name on the hub, or :data:`DEMO_MODEL`.
        trust_remote_code: code that comes with the model may run.

    Raises:
        FileNotFoundError: there is no such folder, and no hub that can be asked for the name; or
            the folder lacks a file.
        ValueError: a file is damaged, or holds something else than a model for transformers.
        DownloadError: the demo's model cannot be downloaded.
    """
    if model == DEMO_MODEL:
        return ModelSource(model, str(demo_model_folder()))
    if not model.strip():
        raise ValueError("the name of the model is empty: give a folder, or a name on the hub")
    path = expanded(model)
    if path.is_dir():
        _check_folder(path)
        return ModelSource(model, str(path), trusted=trust_remote_code)
    if path.exists():
        raise ValueError(
            f"{model} is a file: give the folder of the model, with config.json, weights and "
            "tokenizer (MODEL comes before DATA)"
        )
    if path.is_symlink() or not _HUB_NAME.fullmatch(model) or _parent_exists(path):
        raise FileNotFoundError(f"there is no folder {model}: check the path")
    return _on_the_hub(model, trust_remote_code)


def _parent_exists(path: Path) -> bool:
    return len(path.parts) > 1 and path.parent.is_dir()


def _on_the_hub(model: str, trusted: bool) -> ModelSource:
    from huggingface_hub import try_to_load_from_cache

    problem = hub_problem()
    if problem and not isinstance(try_to_load_from_cache(model, "config.json"), str):
        raise FileNotFoundError(
            f"{model} could not be loaded as a model: it is no folder, and {problem}: check the "
            "path or the network"
        )
    return ModelSource(model, model, in_cache=bool(problem), trusted=trusted)


def _check_folder(folder: Path) -> None:
    """Raise if a folder is no whole checkpoint of a whole model."""
    config = folder / "config.json"
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter (adapter_config.json): merge it into its model "
            "(merge_and_unload of peft) and give the folder that is saved to"
        )
    if config.is_symlink():
        check_input_file(config)
    if not config.is_file():
        below = sorted(path.parent for path in folder.glob("*/config.json"))
        hint = f"; perhaps {below[0]} is meant" if below else ": is it the folder of a model?"
        raise FileNotFoundError(f"{folder} holds no config.json{hint}")
    _read_settings(config)
    for path in _weight_files(folder):
        _check_weights(path)
    tokenizer = [
        path
        for pattern in _TOKENIZERS
        for path in sorted(folder.glob(pattern))
        if not path.is_dir()
    ]
    if not tokenizer:
        raise FileNotFoundError(
            f"{folder} holds no tokenizer (tokenizer.json, vocab.txt or the like): copy its files "
            "from the model it was fine-tuned from"
        )
    if (folder / "tokenizer_config.json").is_file():
        _read_settings(folder / "tokenizer_config.json")
    for path in tokenizer:
        check_input_file(path)
        with path.open("rb") as stream:
            _refuse_pointer(path, stream.read(64))


def _read_settings(path: Path) -> dict[str, Any]:
    """Return what a file of a model holds.

    Raises:
        ValueError: it is damaged.
    """
    content = path.read_bytes()
    _refuse_pointer(path, content)
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds no names and values")
    return found


def _refuse_pointer(path: Path, content: bytes) -> None:
    if content.startswith(_LFS):
        raise ValueError(
            f"{path} is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`"
        )
    if not content:
        raise ValueError(f"{path} is empty: copy or download it again")


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers will read weights from."""
    name = next((name for name in _WEIGHTS if os.path.lexists(folder / name)), None)
    if name is None:
        raise FileNotFoundError(f"{folder} holds no weights that can be loaded{_others(folder)}")
    check_input_file(folder / name)
    if not name.endswith(".json"):
        return [folder / name]
    parts = _read_settings(folder / name).get("weight_map")
    if not isinstance(parts, dict) or not parts:
        raise ValueError(f"{folder / name} is damaged: it names no weights")
    files = [folder / part for part in sorted(set(map(str, parts.values())))]
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / name} names {len(files)} files of weights, but {', '.join(missing[:3])} "
            f"{'is' if len(missing) == 1 else 'are'} missing: copy or download the model again"
        )
    return files


def _others(folder: Path) -> str:
    """Return what is there in place of the weights."""
    for path in sorted(folder.iterdir()):
        kind = _OTHER_FORMATS.get(path.suffix.lower())
        if kind:
            return f": {path.name} is of {kind}, save the model with transformers and PyTorch"
        if path.suffix in (".safetensors", ".bin") and path.name.startswith(
            ("model.", "pytorch_model.", "model-", "pytorch_model-", "diffusion_")
        ):
            return f": {path.name} has another name than {_WEIGHTS[0]}"
    return f" ({_WEIGHTS[0]} or {_WEIGHTS[2]})"


def _check_weights(path: Path) -> None:
    """Raise ValueError if a file of weights is damaged or quantised; they are not read."""
    with path.open("rb") as stream:
        _refuse_pointer(path, stream.read(64))
    if path.suffix != ".safetensors":
        return  # what a .bin holds is known when it is read
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            types = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path} is damaged or no safetensors file ({error}): copy or download it again"
        ) from error
    small = [
        name
        for name, kind in types.items()
        if name.endswith("weight") and (kind in ("I8", "U8") or kind.startswith("F8"))
    ]
    if small:
        raise ValueError(
            f"{path} holds quantised weights ({small[0]}: {types[small[0]]}): give the model as it "
            "was before quantisation"
        )
