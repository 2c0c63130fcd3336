"""What decides between float32 and bfloat16, and what is computed in which."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from tiny_text import save_model

from obert_kernels.tasks import precision
from obert_kernels.tasks.classification import ClassificationTask
from obert_kernels.tasks.precision import choose_precision, for_backward, text_loss

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
