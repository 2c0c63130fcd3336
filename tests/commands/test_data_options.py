"""Data as the command line gets it: fewer test texts, notes, and files that are refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from tiny_text import save_model

from obert_kernels.commands import run, sweep
from obert_kernels.tasks.classification import ClassificationTask

pytestmark = pytest.mark.usefixtures("one_thread", "quick_plots")

Command = Callable[..., tuple[int, str, str]]
QUICK = ("-s", 0.5, "--selection", "magnitude", "--max-length", 16)


@pytest.fixture
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "plot_accuracy", lambda *arguments: None)
    monkeypatch.setattr(sweep, "plot_sweep", lambda *arguments: None)


def test_fewer_test_texts_are_said_and_recorded(
    tmp_path: Path, data_file: str, command: Command
) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    with Path(data_file).open("a") as stream:
        stream.write("\nthe film,0\nThe  film,0\nof no class,")
    code, stdout, stderr = command(
        "run", model, data_file, "-o", out, *QUICK, "--max-test-texts", 5
    )
    assert code == 0, stderr
    assert re.search(r"held back, 5 to test\n", stdout)
    report = json.loads((out / "report.json").read_text())
    assert report["texts"]["test"] == 5 and report["settings"]["max_test_texts"] == 5
    notes = (
        "1 row without a text or a class left out",
        "1 duplicate dropped: every text is used once",
        "accuracies are on 5 of the ",
    )
    for note in notes:
        assert f"note: {note}" in stdout and note in "\n".join(report["notes"])


def test_a_sweep_goes_on_with_the_same_test_texts_alone(
    tmp_path: Path, data_file: str, command: Command
) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    given: tuple[Any, ...] = ("sweep", model, data_file, "-o", out, *QUICK)
    assert command(*given)[0] == 0
    code, _, stderr = command(*given, "--max-test-texts", 5)
    assert code == 1 and "max-test-texts was None, now 5" in stderr
    other = (*given[:4], tmp_path / "other", *QUICK, "--max-test-texts", 5)
    assert command(*other)[0] == command(*other)[0] == 0


@pytest.mark.parametrize("written", [["1.0", "0.0"], ["two", "one"], ["2", "1"]])
def test_recovery_does_not_train_a_model_to_other_classes(
    tmp_path: Path, data_file: str, command: Command, written: list[str]
) -> None:
    """Its classes are called LABEL_0 and LABEL_1, its predictions say which they are."""
    folder = save_model(tmp_path / "model", head=True)
    task = ClassificationTask.load(str(folder), data_file, max_length=16)
    task.fine_tune(12, learning_rate=5e-3)
    task.model.save_pretrained(folder)
    lines = Path(data_file).read_text().splitlines()
    for names in (written, written[::-1]):
        rows = (line.rpartition(",") for line in lines[1:])
        content = "".join(f"{text},{names[int(label)]}\n" for text, _, label in rows)
        (tmp_path / "a.csv").write_text(f"text,label\n{content}")
        given = (folder, tmp_path / "a.csv", *QUICK, "--recovery-epochs", 0.1)
        code, stdout, stderr = command("run", *given, "-o", tmp_path / "out")
        if names is written:
            assert code == 1 and "seem to be in another order" in stderr
        else:
            assert code == 0, stderr
            assert float(re.search(r"dense accuracy ([0-9.]+)%", stdout)[1]) > 90


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["DATA", "MODEL"], "MODEL comes before DATA|the model comes first"),
        (["MODEL", ""], "the name of the data is empty"),
        (["MODEL", "EMPTY"], "is a folder without data"),
        (["MODEL", "/dev/zero"], "/dev/zero is a device, not a file"),
        (["MODEL", "COMMAS"], "line 2 of .* has 3 fields, its first line 2"),
        (["MODEL", "LATIN"], "line 2 of .* is not in UTF-8"),
        (["MODEL", "DATA", "--plugin", "PIPE"], "plugin .*pipe.py could not be loaded.*no file"),
    ],
)
def test_data_that_cannot_be_used_is_one_line(
    tmp_path: Path, data_file: str, command: Command, arguments: list[str], message: str
) -> None:
    files = {name: tmp_path / f"{name.lower()}.csv" for name in ("COMMAS", "LATIN")}
    files["COMMAS"].write_text("text,label\n" + "a, b,1\nc, d,0\n" * 30)
    files["LATIN"].write_bytes(b"text,label\ncaf\xe9,1\n")
    files |= {"EMPTY": tmp_path / "empty", "PIPE": tmp_path / "pipe.py", "DATA": Path(data_file)}
    files["EMPTY"].mkdir()
    os.mkfifo(files["PIPE"])
    files["MODEL"] = save_model(tmp_path / "model", head=True)
    given = [files.get(argument, argument) for argument in arguments]
    code, stdout, stderr = command("run", *given, *QUICK, "-o", tmp_path / "out")
    assert code == 1 and stdout == ""
    assert re.fullmatch(rf"error: .*({message}).*\n", stderr)
