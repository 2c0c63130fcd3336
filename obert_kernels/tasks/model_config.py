"""What a model says of itself: whether it can be served, and settings that would be in the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .model_files import ModelSource

# Characters that are shown of another library's message.
_SUMMARY = 200
# Settings that change what a model returns or how it is run, not what it computes.
_PLAIN = {
    "return_dict": True,
    "torchscript": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "chunk_size_feed_forward": 0,
}


def load_config(source: ModelSource) -> tuple[Any, dict[str, Any], list[str]]:
    """Return a model's configuration, the same as it is written, and notes on what was changed.

    Raises:
        FileNotFoundError: it cannot be loaded.
        ValueError: the model brings code of its own that is not trusted, or is of a kind that
            cannot be pruned as a classifier.
    """
    import transformers

    with _loading(source):
        written, _ = transformers.PretrainedConfig.get_config_dict(
            source.place, local_files_only=source.in_cache
        )
    _refuse_code(source, written, "config.json")
    _check_kind(source, written)
    with _loading(source):
        config = transformers.AutoConfig.from_pretrained(source.place, **source.options)
    return config, written, _run_plainly(config, written)


@contextmanager
def _loading(source: ModelSource) -> Iterator[None]:
    """Bring the many errors of a configuration that does not fit into one."""
    try:
        yield
    except loading_errors() as error:
        raise FileNotFoundError(
            f"{source.name} could not be loaded as a model ({summary(error)}): give a folder "
            "with config.json, weights and tokenizer, or a name on the hub (needs the network)"
        ) from error


def loading_errors() -> tuple[type[Exception], ...]:
    """Return what transformers raises for files and settings that do not fit."""
    from huggingface_hub import errors

    # Of a field with a value of a wrong type; older versions do not look.
    of_field = getattr(errors, "StrictDataclassError", ValueError)
    return OSError, ImportError, ValueError, TypeError, AttributeError, KeyError, of_field


def summary(error: BaseException) -> str:
    """Return the beginning of a message as one line, with the error's name where it needs it."""
    text = " ".join(str(error).split())
    text = "".join(character for character in text if character.isprintable())
    text = text if len(text) <= _SUMMARY else f"{text[:_SUMMARY]}…"
    return f"{type(error).__name__}: {text}" if isinstance(error, KeyError) or not text else text


def refuse_untrusted_tokenizer(source: ModelSource) -> None:
    """Raise ValueError if the tokenizer is code of its own that is not trusted."""
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    with _loading(source):
        written = get_tokenizer_config(source.place, local_files_only=source.in_cache)
    _refuse_code(source, written, "tokenizer_config.json")


def _refuse_code(source: ModelSource, written: dict[str, Any], file: str) -> None:
    """Code of a model runs when it is trusted; a class of transformers of the same name in its
    place would compute something else."""
    attention = str(written.get("attn_implementation") or written.get("_attn_implementation") or "")
    named = "auto_map" if written.get("auto_map") else ""
    if "/" in attention:  # a kernel on the hub
        named = "attn_implementation"
    if named and not source.trusted:
        raise ValueError(
            f"{source.name} brings code of its own ({named} in {file}), which may do anything: "
            "read it, and give --trust-remote-code to run it"
        )


def _check_kind(source: ModelSource, written: dict[str, Any]) -> None:
    """Raise ValueError for a model that is no classifier of one of several classes."""
    if written.get("quantization_config"):
        raise ValueError(
            f"{source.name} is quantised (quantization_config in config.json): give the model as "
            "it was before quantisation"
        )
    kind = written.get("problem_type")
    only = "only models that give one of several classes are served"
    if kind not in (None, "single_label_classification"):
        raise ValueError(f"{source.name} is for {str(kind).replace('_', ' ')}: {only}")
    if has_trained_head(written) and output_count(written) == 1:
        raise ValueError(f"{source.name} has one output, as for regression: {only}")


def has_trained_head(written: dict[str, Any]) -> bool:
    """Return whether the model was saved with a head that classifies texts."""
    architectures = written.get("architectures") or []
    names = [architectures] if isinstance(architectures, str) else list(architectures)
    return any(str(name).endswith("ForSequenceClassification") for name in names)


def output_count(written: dict[str, Any]) -> int | None:
    """Return how many outputs the head is said to have, None if it is not said."""
    names = written.get("id2label")
    count = len(names) if isinstance(names, dict) else written.get("num_labels")
    return count if isinstance(count, int) else None


def check_architecture(source: ModelSource, config: Any) -> None:
    """Raise ValueError if transformers has no text classifier of this kind."""
    import transformers

    known = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    own_code = source.trusted and "AutoModelForSequenceClassification" in (
        getattr(config, "auto_map", None) or {}
    )
    if type(config) not in known and not own_code:
        raise ValueError(
            f"{source.name} is a model of type {config.model_type}, of which transformers has no "
            "text classifier"
        )


def _run_plainly(config: Any, written: dict[str, Any]) -> list[str]:
    """Set what changes the form of a model's outputs to the usual, and say so."""
    changed = []
    for name, usual in _PLAIN.items():
        if written.get(name, usual) in (usual, None):
            continue
        changed.append(name)
        setattr(config, name, usual)
    if not changed:
        return []
    return [f"{', '.join(changed)} of config.json: left out, in what is saved as well"]
