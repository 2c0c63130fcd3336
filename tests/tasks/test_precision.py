"""What decides between float32 and bfloat16, and what is computed in which."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny_text import TINY, save_model

from obert_kernels.ops.status import NumericalError
from obert_kernels.tasks import precision
from obert_kernels.tasks.classification import ClassificationTask
from obert_kernels.tasks.evaluate import evaluate
from obert_kernels.tasks.precision import (
    choose_precision,
    for_backward,
    text_loss,
    working_precision,
)

pytestmark = pytest.mark.usefixtures("one_thread")

INTEL, AMD = "GenuineIntel", "AuthenticAMD"


@pytest.mark.parametrize(
    ("machine", "amx", "avx512_bf16", "vendor", "expected"),
    [
        ("x86_64", True, True, INTEL, torch.bfloat16),
        ("AMD64", True, True, INTEL, torch.bfloat16),
        ("x86_64", False, True, AMD, torch.bfloat16),
        ("x86_64", False, True, INTEL, torch.float32),
        ("x86_64", False, True, "", torch.float32),
        ("x86_64", False, False, AMD, torch.float32),
        ("x86_64", False, False, INTEL, torch.float32),
        ("x86_64", None, None, AMD, torch.float32),
        ("aarch64", True, True, AMD, torch.float32),
    ],
)
def test_the_processor_decides(
    monkeypatch: pytest.MonkeyPatch,
    machine: str,
    amx: bool | None,
    avx512_bf16: bool | None,
    vendor: str,
    expected: torch.dtype,
) -> None:
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)
    monkeypatch.setattr(precision, "_vendor", lambda: vendor)
    for name, found in (("amx_tile", amx), ("avx512_bf16", avx512_bf16)):
        if found is None:  # torch 2.5
            monkeypatch.delattr(torch.cpu, f"_is_{name}_supported", raising=False)
        else:
            monkeypatch.setattr(
                torch.cpu, f"_is_{name}_supported", lambda found=found: found, raising=False
            )
    assert choose_precision("auto") == expected
    assert choose_precision("float32") == torch.float32
    assert choose_precision("bfloat16") == torch.bfloat16


@pytest.mark.parametrize("native", [True, False])
def test_a_device_decides_by_what_it_has_natively(
    monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: native or including_emulation
    )
    expected = torch.bfloat16 if native else torch.float32
    assert choose_precision("auto", "cuda") == expected
    assert choose_precision("auto", "meta") == torch.float32


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel\t: 1\nvendor_id\t: x", AMD),
        ("processor\t: 0\n", ""),
        (None, ""),
    ],
)
def test_the_vendor_is_read_where_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, expected: str
) -> None:
    path = tmp_path / "cpuinfo"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(precision, "Path", lambda name: {"/proc/cpuinfo": path}[name])
    assert precision._vendor() == expected


def test_other_names_are_refused() -> None:
    with pytest.raises(ValueError, match="one of auto, float32, bfloat16, got 'float16'"):
        choose_precision("float16")


def test_losses_and_evaluations_are_computed_in_it(tmp_path: Path, data_file: str) -> None:
    model = str(save_model(tmp_path / "model", head=True))
    seen = []
    for name in ("float32", "bfloat16"):
        for of in ("labels", "predictions"):
            task = ClassificationTask.load(model, data_file, precision=name, gradients_of=of)
            types: list[torch.dtype] = []
            task.model.bert.encoder.layer[0].attention.self.query.register_forward_hook(
                lambda *call, types=types: types.append(call[-1].dtype)
            )
            (batch, *_) = task.fisher_batches(2, 2)
            task.model.eval()
            assert task.loss_fn(task.model, batch).dtype == torch.float32
            task.evaluate(task.model, "test")
            assert set(types) == {getattr(torch, name)} and len(types) > 1
            task.fine_tune(0.1)
            assert set(types) == {getattr(torch, name)}
            assert task.facts()["precision"] == task.basis()["precision"] == name
            if of == "labels":
                seen.append(text_loss(task.model, batch, task.dtype).item())
    assert seen[0] != seen[1]


@pytest.mark.parametrize(
    ("tokens", "dtype", "fused"),
    [(128, torch.bfloat16, False), (129, torch.bfloat16, True), (128, torch.float32, True)],
)
def test_attention_is_written_out_for_short_texts_in_bfloat16(
    tokens: int, dtype: torch.dtype, fused: bool
) -> None:
    """There the backward pass of the fused one is slow."""
    batch = {"input_ids": torch.zeros(2, tokens), "labels": torch.zeros(2)}
    with for_backward(batch, torch.device("cpu"), dtype):
        assert torch.backends.cuda.flash_sdp_enabled() == fused
        assert torch.is_autocast_enabled("cpu") == (dtype == torch.bfloat16)
    assert torch.backends.cuda.flash_sdp_enabled()


def deberta(folder: Path) -> str:
    """The first DeBERTa fills masks with a number that bfloat16 does not have."""
    import transformers

    save_model(folder, head=True)
    transformers.DebertaForSequenceClassification(
        transformers.DebertaConfig(
            vocab_size=15, intermediate_size=32, relative_attention=True, pad_token_id=0,
            pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0, **TINY,
        )
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def test_a_model_that_overflows_in_bfloat16_is_run_in_float32(
    tmp_path: Path, data_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = deberta(tmp_path / "model")
    monkeypatch.setattr(precision, "_bfloat16_is_faster", lambda device: True)
    task = ClassificationTask.load(folder, data_file)
    assert task.dtype == torch.float32 and task.facts()["precision"] == "float32"
    (note,) = (note for note in task.facts()["notes"] if "bfloat16" in note)
    assert note.startswith("float32 is used: in bfloat16 the model does not work (")
    assert f"note: {note}" in task.describe(None).splitlines()
    with pytest.raises(ValueError, match=r"in bfloat16 .*overflow.*: use --precision float32$"):
        ClassificationTask.load(folder, data_file, precision="bfloat16")
    other = ClassificationTask.load(str(save_model(tmp_path / "bert", head=True)), data_file)
    assert other.dtype == torch.bfloat16


class Odd(torch.nn.Module):
    """Gives what is no number in some types."""

    def __init__(self, loss: dict[torch.dtype, float], gradient: float = 1.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(2))
        self.loss, self.gradient = loss, gradient

    def loss_of(self, _: object, __: object, dtype: torch.dtype) -> torch.Tensor:
        total = self.weight.sum()
        total.register_hook(lambda gradient: gradient * self.gradient)
        return total * 0 + self.loss.get(dtype, 1.0)


@pytest.mark.parametrize(
    ("model", "name", "expected"),
    [
        (Odd({}), "auto", torch.bfloat16),
        (Odd({torch.bfloat16: torch.nan}), "auto", torch.float32),
        (Odd({torch.bfloat16: torch.inf}), "auto", torch.float32),
        (Odd({torch.bfloat16: torch.inf}), "float32", torch.float32),
        (Odd({torch.bfloat16: torch.inf}), "bfloat16", "loss is inf.*--precision float32"),
        (Odd({torch.float32: torch.nan}), "float32", r"in float32 \(its loss is nan\)$"),
        (
            Odd({torch.float32: torch.nan, torch.bfloat16: torch.nan}),
            "auto",
            r"in float32 \(its loss is nan\)$",
        ),
        (Odd({}, gradient=torch.nan), "bfloat16", "its gradients are NaN or infinite"),
    ],
)
def test_a_forward_and_a_backward_pass_are_tried(
    monkeypatch: pytest.MonkeyPatch, model: Odd, name: str, expected: torch.dtype | str
) -> None:
    monkeypatch.setattr(precision, "_bfloat16_is_faster", lambda device: True)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            working_precision(name, model, {}, model.loss_of)
        return
    chosen, note = working_precision(name, model, {}, model.loss_of)
    assert chosen == expected and bool(note) == (name == "auto" and chosen == torch.float32)
    assert model.weight.grad is None and model.training


def test_predictions_that_are_no_numbers_are_an_error(tmp_path: Path, data_file: str) -> None:
    """The largest of NaN is the first class, which is right for some texts."""
    task = ClassificationTask.load(str(save_model(tmp_path / "model", head=True)), data_file)
    with torch.no_grad():
        task.model.classifier.bias[1] = torch.nan
    with pytest.raises(NumericalError, match=r"NaN or infinite logits in float32$"):
        task.evaluate(task.model, "test")
    loader = [{"input_ids": torch.tensor([[2, 3]]), "labels": torch.tensor([0])}]
    with pytest.raises(NumericalError, match="in bfloat16: use --precision float32"):
        evaluate(task.model, loader, dtype=torch.bfloat16)
