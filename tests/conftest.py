"""Fixtures shared by the tests."""

from __future__ import annotations

import gc
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import CUDA, CUDA_ON_HOST, INSTRUCTION_SETS, host_cuda
from tiny_text import WORDS

from obert_kernels import Pruner
from obert_kernels.ops import native


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cuda_on_host():
    """Operators on CPU tensors run the host-executed CUDA kernels."""
    module = host_cuda()
    module.set_seed(1)
    with native.using(module):
        yield module


@pytest.fixture(params=[*INSTRUCTION_SETS, CUDA_ON_HOST, pytest.param(CUDA, marks=pytest.mark.gpu)])
def isa(request):
    """Run the test once per instruction set this processor has, and prove it is in use; once
    with the CUDA kernels executed on the host; and once on a device, where there is one."""
    if request.param == CUDA:
        assert native.run_on(torch.zeros(1, device=CUDA))[0] is native.core().cuda
        with torch.device(CUDA):
            yield request.param
        return
    if request.param == CUDA_ON_HOST:
        module = request.getfixturevalue("cuda_on_host")
        assert native.run_on(torch.zeros(1))[0] is module
        yield request.param
        return
    core = native.core()
    before = core.current_instruction_set()
    assert core.select_instruction_set(request.param)
    assert core.current_instruction_set() == request.param
    yield request.param
    core.select_instruction_set(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """A model this small only loses by threads, most of all where tests run side by side."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def data_file(tmp_path: Path) -> str:
    """Texts of two moods."""
    generator = torch.Generator().manual_seed(0)
    lines = ["text,label"]
    for index in range(160):
        mood = WORDS[3 * (index % 2) + int(torch.randint(3, (1,), generator=generator))]
        filler = torch.randint(6, 12, (int(torch.randint(3, 9, (1,), generator=generator)),),
                               generator=generator)  # fmt: skip
        lines.append(f"{' '.join(WORDS[word] for word in filler)} {mood} {index},{index % 2}")
    path = tmp_path / "moods.csv"
    path.write_text("\n".join(lines))
    return str(path)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where models go that cannot be saved."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run ``obert-prune`` with arguments; return exit code, stdout and stderr."""
    from obert_kernels.commands import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["obert-prune", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()  # what the test itself has caused, say progress bars of transformers
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        captured = capsys.readouterr()
        return end.value.code or 0, captured.out, captured.err

    return run


@pytest.fixture
def estimates(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """m, g and B of the estimates a grid made; no two exist at the same time."""
    made: list[tuple[int, int, int]] = []
    alive: list[weakref.ref] = []
    real = Pruner.fisher

    def counted(pruner: Pruner, batches: Any) -> Any:
        gc.collect()
        assert all(reference() is None for reference in alive), "the one before was not freed"
        config = pruner.config.fisher
        made.append((config.num_grads, config.samples_per_grad, config.block_size))
        result = real(pruner, batches)
        alive.append(weakref.ref(result))
        return result

    monkeypatch.setattr(Pruner, "fisher", counted)
    return made


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


@pytest.fixture
def limits_are_of_the_fisher(monkeypatch):
    """Whatever the limit of memory is, all samples are fitted."""
    monkeypatch.setattr("obert_kernels.pruning.pruner.planned_bytes", lambda weights: 0)
    monkeypatch.setattr(
        "obert_kernels.reconstruction.stage.that_fit", lambda samples, *others: samples
    )
