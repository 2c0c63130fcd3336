"""A tiny text classifier on disk."""

from __future__ import annotations

from pathlib import Path

from obert_kernels.tasks.seeds import seeded

WORDS = ["good", "fine", "nice", "bad", "poor", "awful", "film", "plot", "the", "a", "was", "and"]
TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def save_model(folder: Path, *, head: bool, classes: int = 2) -> Path:
    """A tiny random BERT with a tokenizer that knows WORDS."""
    import tokenizers
    import transformers

    vocabulary = {word: index for index, word in enumerate(["[PAD]", "[UNK]", "[CLS]", *WORDS])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $A [CLS] $B:1", special_tokens=[("[CLS]", 2)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    config = transformers.BertConfig(
        vocab_size=len(vocabulary), intermediate_size=32, num_labels=classes, **TINY
    )
    kind = transformers.BertForSequenceClassification if head else transformers.BertModel
    with seeded(0):
        model = kind(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
