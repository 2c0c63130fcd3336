"""The output folder: found unusable before the work, held, tidied up; nothing of it is lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from tiny_text import save_model

from obert_kernels.commands import cli, cli_sweep, run, sweep
from obert_kernels.deploy import checkpoints
from obert_kernels.files import locked
from obert_kernels.pruning.report import NOTHING_TO_PRUNE

pytestmark = pytest.mark.usefixtures("one_thread")

Command = Callable[..., tuple[int, str, str]]
QUICK = ("--num-grads", 8, "--grad-batch-size", 4, "--block-size", 8, "--max-length", 16,
         "--damping", 1e-3)  # fmt: skip


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is loaded, far less computed."""
    for command in (run, sweep):
        monkeypatch.setattr(command, "load_task", lambda *_, **__: pytest.fail("it has begun"))


def link_to_nothing(out: Path) -> str:
    out.symlink_to("/nonexistent/x")
    return f"--output {out}: {out} is a link to nothing, choose another folder"


def link_to_itself(out: Path) -> str:
    out.symlink_to(out)
    return "is a link to nothing"


def in_a_file(out: Path) -> str:
    out.parent.joinpath("file").write_text("mine")
    out.symlink_to(out.parent / "file")
    return f"{out} is a file"


def read_only(out: Path) -> str:
    out.symlink_to("/proc/self")  # even for root
    return f"--output {out} does not take files"


def another_process(out: Path) -> str:
    out.mkdir()
    held.append(locked(out, ""))
    held[-1].__enter__()
    return f"another obert-prune works on --output {out}: wait until it ends"


held: list[Any] = []


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command_name", ["run", "sweep"])
@pytest.mark.parametrize(
    "obstacle", [link_to_nothing, link_to_itself, in_a_file, read_only, another_process]
)
def test_an_output_that_cannot_be_used_is_found_before_the_work(
    tmp_path: Path, command: Command, command_name: str, obstacle: Callable[[Path], str]
) -> None:
    message = obstacle(tmp_path / "out")
    code, _, stderr = command(command_name, "model", "x.csv", "-s", 0.5, "-o", tmp_path / "out")
    while held:
        held.pop().__exit__(None, None, None)
    assert code == 1 and stderr.startswith("error: ") and message in stderr
    assert stderr.count("\n") == 1


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("name", "message"), [("\udcff", "is not UTF-8"), ("x" * 300, "File name too long")]
)
def test_names_that_no_model_can_have(
    tmp_path: Path, command: Command, name: str, message: str
) -> None:
    code, _, stderr = command("run", "model", "x.csv", "-s", 0.5, "-o", tmp_path / name)
    assert code == 1 and message in stderr and stderr.count("\n") == 1


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("command_name", ["run", "sweep"])
def test_an_empty_name_is_not_the_current_folder(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, command_name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, stderr = command(command_name, "model", "x.csv", "-s", 0.5, "--output", "")
    assert code == 2 and "the name is empty" in stderr and not list(tmp_path.iterdir())


def test_a_tilde_that_a_shell_leaves_is_the_home_folder(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, no_work: None
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    seen = []
    monkeypatch.setattr(cli, "prune_classifier", lambda settings, *_: seen.append(settings.output))
    monkeypatch.setattr(
        cli_sweep, "sweep_classifier", lambda settings, *_: seen.append(settings.output)
    )
    plugin = tmp_path / "named_by_a_tilde.py"
    plugin.write_text("")
    for name in ("run", "sweep"):
        options = ("-s", 0.5, "--output=~/out", "--plugin=~/named_by_a_tilde.py")
        assert command(name, "model", "x.csv", *options)[0] == 0
    assert seen == [tmp_path / "out"] * 2
    # The check that nothing is replaced knows it as well.
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(run, "load_task", lambda *_, **__: pytest.fail("it has begun"))
    code, _, stderr = command(
        "run", "~/out/sparsity-0.5", "x.csv", "-s", 0.5, "-o", tmp_path / "out"
    )
    assert code == 1 and "where the model is, would be replaced" in stderr


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["sparsity-0.5", "dense", "report.json", "accuracy.png"])
@pytest.mark.parametrize("kind", ["link to nothing", "file", "pipe", "folder"])
def test_what_is_in_the_way_is_found_before_the_work(
    tmp_path: Path, command: Command, name: str, kind: str
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    if kind == "link to nothing":
        (out / name).symlink_to("/nonexistent/x")
    elif kind == "file":
        (out / name).write_text("mine")
    elif kind == "pipe":
        os.mkfifo(out / name)
    else:
        (out / name / "mine").mkdir(parents=True)
    options = ("-s", 0.5, "--finetune-epochs", 1, "-o", out)
    code, _, stderr = command("run", "model", "x.csv", *options)
    assert code == 1 and stderr.startswith(f"error: {out / name}") and stderr.count("\n") == 1


@pytest.mark.usefixtures("no_work")
def test_two_sparsities_do_not_share_a_folder(tmp_path: Path, command: Command) -> None:
    options = ("-s", 0.5, "-s", 0.50000001, "-o", tmp_path / "out")
    code, _, stderr = command("run", "model", "x.csv", *options)
    assert code == 1 and "one would replace the other" in stderr


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", ["sweep.md", "sweep.png"])
def test_a_sweep_replaces_nothing_of_a_user(tmp_path: Path, command: Command, name: str) -> None:
    (tmp_path / name).write_text("mine")
    code, _, stderr = command("sweep", "model", "x.csv", "-s", 0.5, "-o", tmp_path)
    assert code == 1 and f"{name} was not written by obert-prune sweep" in stderr


def test_missing_room_is_found_before_the_fine_tuning(
    tmp_path: Path, data_file: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    size = checkpoints.checkpoint_bytes(
        transformers.AutoModelForSequenceClassification.from_pretrained(model), 4096
    )
    assert size < (model / "model.safetensors").stat().st_size + 4096
    monkeypatch.setattr(run, "_train", lambda *_: pytest.fail("it has begun"))
    options = ("-s", 0.5, "-s", 0.6, "--finetune-epochs", 1, "-o", out, *QUICK)
    usage = shutil.disk_usage(tmp_path)._replace(free=3 * size - 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        code, _, stderr = command("run", model, data_file, *options)
    assert code == 1 and f"error: {out} has room for" in stderr and "for 3 checkpoints" in stderr
    assert not out.exists()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, before[1]))
    try:
        code, _, stderr = command("run", model, data_file, *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1 and "does not take a file of" in stderr and "File too large" in stderr


def test_a_failure_while_saving_loses_nothing(
    tmp_path: Path, data_file: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full by then: the table is printed, and the checkpoint is somewhere else."""
    import safetensors.torch

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    real = safetensors.torch.save_file

    def full(tensors: Any, path: Any, *more: Any, **options: Any) -> None:
        if Path(path).is_relative_to(out):
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        real(tensors, path, *more, **options)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    code, stdout, stderr = command("run", model, data_file, "-s", 0.5, "-o", out, *QUICK)
    assert code == 1 and "50.0%" in stdout
    assert stderr.count("\n") == 1 and "sparsity-0.5 could not be saved" in stderr
    assert "No space left on device" in stderr
    (place,) = tmp_path.glob("obert-saved-*")
    assert f"whole in {place}" in stderr
    assert len(checkpoints.load_masks(place)) == 12
    assert "accuracy" in json.loads((place / "report.json").read_text())
    assert not out.exists()


def test_odd_names_do_not_stop_a_run(
    tmp_path: Path, data_file: str, command: Command
) -> None:  # fmt: skip
    """A dollar begins a formula in matplotlib, an underscore hides a legend, and so on."""
    model = save_model(tmp_path / "$x^{_\\a$ é 模型 %s {}", head=True)
    data = Path(data_file).rename(tmp_path / "cost_$_vs_$_.csv")
    out = tmp_path / "out $%"
    code, stdout, stderr = command("run", model, data, "-s", 0.5, "-o", out, *QUICK)
    assert code == 0, stderr
    assert "was not drawn" not in stdout
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_a_plot_that_fails_is_a_note(
    tmp_path: Path, data_file: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no fonts")

    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    monkeypatch.setattr(run, "plot_accuracy", broken)
    options = ("-s", 0.5, "-s", 0.75, "-o", out, *QUICK)
    code, stdout, stderr = command("run", model, data_file, *options)
    assert code == 0, stderr
    assert stdout.count("note: accuracy.png was not drawn (RuntimeError: no fonts)") == 1
    assert "accuracy.png, report" not in stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "report.json", "sparsity-0.5", "sparsity-0.75",
    ]  # fmt: skip
    monkeypatch.setattr(sweep, "plot_sweep", broken)
    options = ("-s", 0.5, "--selection", "magnitude", "--max-length", 16, "-o", tmp_path / "sweep")
    code, stdout, stderr = command("sweep", model, data_file, *options)
    assert code == 0 and "note: sweep.png was not drawn" in stdout
    assert stdout.endswith("sweep.csv, sweep.md\n")


def test_an_interrupted_run_says_what_is_kept(
    tmp_path: Path, data_file: str, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    options = ("-s", 0.5, "-s", 0.75, "-o", out, *QUICK, "--finetune-epochs", 0.2)
    save = checkpoints.save_pruned

    def interrupted(result: Any, tokenizer: Any, folder: Path, extra: Any) -> Path:
        if folder.name == "sparsity-0.75":
            raise KeyboardInterrupt
        return save(result, tokenizer, folder, extra)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_pruned", interrupted)
        code, _, stderr = command("run", model, data_file, *options)
    assert code == 130
    dense = out / "dense"
    assert stderr == (
        f"\ninterrupted: {dense}, {out / 'sparsity-0.5'} saved; what is missing is made by a run "
        f"with -s 0.75, with {dense} as the model and no fine-tuning\n"
    )
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png", "dense", "report.json", "sparsity-0.5",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "said"), [("run", "nothing was saved"), ("sweep", "no trial was finished")]
)
def test_an_early_interrupt_leaves_nothing(
    tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch, name: str, said: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for module in (run, sweep):
        monkeypatch.setattr(module, "load_task", interrupted)
    code, _, stderr = command(name, "model", "x.csv", "-s", 0.5, "-o", tmp_path / "a" / "b")
    assert code == 130 and stderr == f"\ninterrupted: {said}\n"
    assert list(tmp_path.iterdir()) == []


def test_notes_of_the_report_are_shown(
    tmp_path: Path, data_file: str, command: Command
) -> None:  # fmt: skip
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    options = ("--selection", "magnitude", "--max-length", 16)
    assert command("run", model, data_file, "-s", 0.75, "-o", out, *options)[0] == 0
    for name in ("run", "sweep"):
        code, stdout, stderr = command(
            name, out / "sparsity-0.75", data_file, "-s", 0.5, "-o", tmp_path / name, *options
        )
        assert code == 0, stderr
        assert stdout.count(f"\nnote: {NOTHING_TO_PRUNE}\n") == 1


def test_leftovers_of_killed_runs_are_named(
    tmp_path: Path, data_file: str, command: Command
) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    options = ("-s", 0.5, "-o", out, *QUICK)
    assert command("run", model, data_file, *options)[0] == 0
    (out / ".sparsity-0.9-abcd1234" / "fresh").mkdir(parents=True)
    (out / ".sparsity-0.5-abcd1234").mkdir()
    (out / "sparsity-0.5").rename(out / ".sparsity-0.5-abcd1234" / "old")
    (out / ".report.json-0123abcd").write_text("{")
    (out / ".try-0123abcd").mkdir()
    code, stdout, stderr = command("run", model, data_file, *options)
    assert code == 0, stderr
    for what in (
        f"put back {out / 'sparsity-0.5'}",
        f"removed {out / '.sparsity-0.9-abcd1234'}",
        f"removed {out / '.report.json-0123abcd'}",
    ):
        assert f"note: {what}, which a stopped process had left" in stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png", "report.json", "sparsity-0.5",
    ]  # fmt: skip
