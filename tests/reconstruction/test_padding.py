"""Rows that are padding do not count, whichever side of the model they are on."""

from __future__ import annotations

import pytest
import torch
import transformers
from test_stage import fitted
from test_structure import T5, followed

from obert_kernels.reconstruction.padding import without_padding

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])
WIDTH = 4


def values(*shape):
    return torch.arange(6.0).view(shape)[..., None].expand(*shape, WIDTH)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (values(2, 3), [0, 1, 2, 3]),
        (values(6), [0, 1, 2, 3]),
        (values(1, 6), [0, 1, 2, 3]),
        (values(3, 2), [0, 1, 2, 4]),  # tokens first
        (values(2, 3)[:, :2], [0, 1, 3, 4]),  # another length: all of them
    ],
)
def test_rows_of_an_encoder(tensor, expected):
    rows = without_padding(tensor.half(), {"attention_mask": MASK}, False)
    assert rows.dtype == torch.float32 and rows[:, 0].tolist() == expected


LABELS = torch.tensor([[5, -100, -100], [5, 6, -100]])


@pytest.mark.parametrize(
    ("batch", "expected"),
    [
        ({"decoder_attention_mask": MASK.flip(0)}, [0, 3, 4, 5]),
        ({"labels": LABELS}, [0, 3, 4]),
        ({"labels": LABELS, "decoder_attention_mask": MASK.flip(0)}, [0, 3, 4, 5]),
        ({"decoder_input_ids": LABELS}, [0, 1, 2, 3, 4, 5]),
        ({"labels": torch.tensor([0, 1])}, [0, 1, 2, 3]),  # a classifier's decoder reads the inputs
        ({"labels": torch.ones(2, 3)}, [0, 1, 2, 3]),
    ],
)
def test_rows_of_a_decoder(batch, expected):
    rows = without_padding(values(2, 3), {"attention_mask": MASK, **batch}, True)
    assert rows[:, 0].tolist() == expected


def test_batches_that_are_no_mappings_have_no_masks():
    assert len(without_padding(values(2, 3), (MASK, MASK), False)) == 6


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(**T5, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config).eval()


def both_sides(count, seed):
    """Texts and answers of the same length, with other parts that are padding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        ids, labels = (torch.randint(3, 50, (4, 6), generator=generator) for _ in range(2))
        mask, of_labels = torch.ones_like(ids), torch.ones_like(ids)
        mask[::2, 2:], of_labels[1::2, 3:] = 0, 0
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels,
            "decoder_input_ids": labels, "decoder_attention_mask": of_labels,
        })  # fmt: skip
    return found


def test_the_sides_of_an_encoder_decoder():
    model = t5()
    structure = followed(model, lambda: model(**both_sides(1, 0)[0]), ["re:.*(Attention|wi|wo).*"])
    names = {layer.name for layer in structure.layers if layer.module in structure.of_decoder}
    assert len(structure.layers) == 32 and len(names) == 2 * (4 + 2 + 2)
    assert not any(name.startswith("encoder") for name in names)
    assert not any(name.endswith(("EncDecAttention.k.weight", "Attention.v.weight")) and
                   "EncDec" in name for name in names)  # fmt: skip


@pytest.mark.parametrize("side", ["", "decoder_"])
def test_padding_of_an_encoder_decoder_does_not_count(side):
    """It is filled with other tokens."""
    data, held = both_sides(6, 0), both_sides(4, 1)
    tokens = f"{side}input_ids"
    changed = [
        {**batch, tokens: torch.where(batch[f"{side}attention_mask"] > 0, batch[tokens], 3)}
        for batch in data
    ]
    one, other = t5(), t5()
    found, _ = fitted(one, data, held)
    fitted(other, changed, held)
    assert any("decoder" in fit.name for fit in found.layers)
    torch.testing.assert_close(one.state_dict(), other.state_dict())
