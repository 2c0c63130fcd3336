"""Tokenizers that do not belong to the model or the texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from tiny_text import TINY, WORDS, save_model

from obert_kernels.tasks.classification import ClassificationTask
from obert_kernels.tasks.loaders import encode
from obert_kernels.tasks.text_data import Texts
from obert_kernels.tasks.tokenizers import check_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def task_of(folder: Path, data_file: str) -> Callable[..., ClassificationTask]:
    """Load a model with another tokenizer or configuration."""

    def load(change: Callable[[Any], object] | None = None, **options: Any) -> ClassificationTask:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        if change is not None:
            change(tokenizer)
        tokenizer.save_pretrained(folder)
        return ClassificationTask.load(str(folder), data_file, **options)

    return load


def config(folder: Path, **more: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def words(known: list[str]) -> Any:
    """A tokenizer of whole words."""
    import tokenizers

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *known])}
    whole = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    whole.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=whole, pad_token="[PAD]", unk_token="[UNK]"
    )


def test_more_tokens_than_embeddings(task_of: Callable[..., ClassificationTask]) -> None:
    with pytest.raises(ValueError, match="knows 16 tokens, the model has embeddings for 15"):
        task_of(lambda tokenizer: tokenizer.add_tokens(["film2"]))


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (["good", "film"], "knows 4 tokens, the model has embeddings for 15"),
        ([f"w{i}" for i in range(13)], r"makes \d+ unknown and 0 known tokens of 1\d\d texts"),
        ([*(f"w{i}" for i in range(9)), *WORDS[:3]], "does not know the texts"),
    ],
)
def test_tokenizers_of_other_models(
    folder: Path, data_file: str, known: list[str], message: str
) -> None:
    words(known).save_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        ClassificationTask.load(str(folder), data_file)


def test_what_is_odd_is_said(folder: Path, data_file: str) -> None:
    config(folder, cls_token_id=7, sep_token_id=9)
    notes = ClassificationTask.load(str(folder), data_file, max_length=6).notes
    assert "config.json and the tokenizer differ on cls_token_id 7 (2 in the tokenizer)" in notes
    assert any("of the tokens in training texts are unknown" in note for note in notes)
    (cut,) = (note for note in notes if "are cut" in note)
    rows = [len(line.split(",")[0].split()) for line in Path(data_file).read_text().split("\n")[1:]]
    assert 0 < int(cut.split()[0]) < len(rows)
    assert "training texts have more than 6 tokens and are cut (--max-length)" in cut
    words(WORDS[-10:]).save_pretrained(folder)
    notes = ClassificationTask.load(str(folder), data_file).notes
    assert any("knows 12 tokens, the model has embeddings for 15: do they" in n for n in notes)


def test_padding_is_the_models(
    folder: Path, data_file: str, task_of: Callable[..., ClassificationTask]
) -> None:
    with pytest.raises(ValueError, match="has no token for padding: set pad_token"):
        task_of(lambda tokenizer: setattr(tokenizer, "pad_token", None))
    with pytest.raises(ValueError, match=r"pads with token 2, config.json says pad_token_id 0"):
        task_of(lambda tokenizer: setattr(tokenizer, "pad_token", "[CLS]"))
    config(folder, pad_token_id=None)
    assert ClassificationTask.load(str(folder), data_file)


@pytest.mark.parametrize(
    ("length", "message"),
    [(513, "is more than .* takes: at most 512"), (1, "leaves no room for a text: 1 tokens stand")],
)
def test_lengths_a_model_does_not_take(
    task_of: Callable[..., ClassificationTask], length: int, message: str
) -> None:
    with pytest.raises(ValueError, match=f"--max-length {length} {message}"):
        task_of(max_length=length)


def test_positions_that_begin_behind_the_padding(whole: Path) -> None:
    """RoBERTa has two positions fewer than its configuration says."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole)
    model = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            vocab_size=15, intermediate_size=32, max_position_embeddings=20, pad_token_id=0, **TINY
        )
    )
    texts = Texts(["good film"] * 3, [0] * 3)
    assert check_tokenizer("roberta", tokenizer, model, {}, texts, 19) == []
    with pytest.raises(ValueError, match=r"--max-length 20 .* at most 19 tokens"):
        check_tokenizer("roberta", tokenizer, model, {}, texts, 20)


def test_a_tokenizer_returns_only_what_the_model_takes(tmp_path: Path, data_file: str) -> None:
    """One of BERT's names token types, which are no argument of DistilBERT."""
    folder = save_model(tmp_path / "model", head=True)
    path = folder / "tokenizer_config.json"
    names = ["input_ids", "token_type_ids", "attention_mask"]
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": names}))
    (batch,) = ClassificationTask.load(str(folder), data_file).fisher_batches(1, 2)
    assert "token_type_ids" in batch
    transformers.DistilBertForSequenceClassification(
        transformers.DistilBertConfig(vocab_size=15, dim=16, hidden_dim=32, n_layers=1, n_heads=2)
    ).save_pretrained(folder)
    task = ClassificationTask.load(str(folder), data_file)
    assert sorted(task.fisher_batches(2, 2)[0]) == ["attention_mask", "input_ids", "labels"]
    assert torch.isfinite(torch.tensor(task.evaluate(task.model, "test").loss))


def test_texts_of_no_tokens_are_refused() -> None:
    """A model cannot read them, and in company they would be padding alone."""
    texts = Texts(["good film", "\u3000", "bad"], [0, 1, 0])
    with pytest.raises(ValueError, match=r"no tokens of 1 of 3 texts, the first is '\\u3000'"):
        encode(words(WORDS), texts)
