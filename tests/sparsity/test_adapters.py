"""Models with adapters of PEFT are refused; merged, they are pruned."""

from __future__ import annotations

import pytest
import torch
from tiny import TinyEncoder, batches, snapshot, unchanged
from tiny_text import TINY

from obert_kernels import prune
from obert_kernels.sparsity.wrappers import check_no_adapters

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

LORA = {"r": 2, "target_modules": ["wide"]}
KINDS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "trained head": lambda: peft.LoraConfig(**LORA, modules_to_save=["head"]),
    "ia3": lambda: peft.IA3Config(target_modules=["wide"], feedforward_modules=[]),
    "adalora": lambda: peft.AdaLoraConfig(target_modules=["wide"], total_step=10),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("params", [None, "re:.*narrow.weight"])
@pytest.mark.parametrize("wrap", [lambda model: model, torch.nn.DataParallel], ids=["", "wrapped"])
def test_adapters_are_to_be_merged_first(kind, params, wrap):
    model = peft.get_peft_model(TinyEncoder(), KINDS[kind]())
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"adapters of PEFT, .*: merge them first, model = "):
        prune(wrap(model), batches(), 0.5, params=params)
    assert unchanged(model, before)
    merged = model.merge_and_unload()
    result = prune(merged, sparsity=0.5, selection="magnitude")
    assert list(result.masks) == list(prune(TinyEncoder(), sparsity=0, selection="magnitude").masks)


def test_adapters_put_into_the_model_itself():
    model = peft.inject_adapter_in_model(peft.LoraConfig(**LORA), TinyEncoder())
    with pytest.raises(ValueError, match=r"layer\.0\.wide has adapters.* that holds them"):
        check_no_adapters(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT itself
def test_prompts_cannot_be_merged():
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=30, intermediate_size=32, **TINY)
    )
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prune the base model, loaded without them"):
        prune(peft.get_peft_model(bert, config), batches(), 0.5)
