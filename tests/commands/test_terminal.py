"""How the commands meet a terminal: pipes that end, interrupts, errors that nobody expected."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from obert_kernels.commands import cli, progress_bars, terminal
from obert_kernels.commands.output import Notes, decoration
from obert_kernels.commands.progress_bars import ProgressBars

Command = Callable[..., tuple[int, str, str]]

ARGUMENTS = ("run", "model", "data.csv", "-s", 0.5)


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., object]], None]:
    """Replace what ``run`` does."""
    return lambda function: monkeypatch.setattr(cli, "prune_classifier", function)


def test_version(command: Command) -> None:
    code, stdout, _ = command("--version")
    assert code == 0
    assert re.fullmatch(r"obert-kernels \d+\.\d+\S*, torch \S+, transformers \S+\n", stdout)


@pytest.mark.parametrize("descriptor", ["reader is gone", "/dev/full", "closed"])
def test_the_work_outlives_its_readers(
    monkeypatch: pytest.MonkeyPatch, work: Any, descriptor: str
) -> None:
    """``| head``, a full disk, and a terminal that was closed; 10 kB fill every buffer."""
    if descriptor == "/dev/full":
        end = os.open(descriptor, os.O_WRONLY)
    else:
        reader, end = os.pipe()
        os.close(reader)
    stream = open(end, "w", encoding="ascii", errors="strict")  # noqa: SIM115
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, stream)
    if descriptor == "closed":
        stream.close()
    monkeypatch.setattr(sys, "argv", ["obert-prune", *map(str, ARGUMENTS)])
    finished = []

    def prune(settings: Any, bars: Any, echo: Callable[[str], object]) -> None:
        for _ in range(100):
            echo("été " * 25)
            print("said by a library", file=sys.stderr, flush=True)
        finished.append(settings)

    work(prune)
    with pytest.raises(SystemExit) as exit_:
        cli.main()
    assert not exit_.value.code and len(finished) == 1
    stream.close()


def test_letters_that_a_terminal_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, end = os.pipe()
    with open(end, "w", encoding="ascii") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        patch.setattr(sys, "stderr", None)  # pythonw, or closed by the caller
        terminal.outlive_readers()
        print("50 % … \udcff")
        print("dropped", file=sys.stderr)
        sys.stdout.flush()
    with open(reader) as stream:
        assert stream.read() == "50 % \\u2026 \\udcff\n"


def test_an_unexpected_error_asks_for_a_report(
    tmp_path: Path, command: Command, work: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def broken(*_: object) -> None:
        raise KeyError("a\nb")

    work(broken)
    code, _, stderr = command(*ARGUMENTS)
    assert code == 1
    found = re.fullmatch(
        r"error: unexpected KeyError: 'a\\nb'; please report it, with (\S+\.log)\n", stderr
    )
    assert found
    log = Path(found[1]).read_text()
    assert "model" in log and "Traceback" in log and "in broken" in log
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    assert "in broken" in command(*ARGUMENTS)[2], "what cannot be kept is shown"
    with pytest.raises(KeyError):
        command("--debug", *ARGUMENTS)


def test_torch_without_memory_is_no_bug(command: Command, work: Any) -> None:
    def too_much(*_: object) -> None:
        torch.empty(1 << 60, dtype=torch.uint8)

    work(too_much)
    code, _, stderr = command(*ARGUMENTS)
    assert code == 1 and stderr.startswith("error: out of memory (") and stderr.count("\n") == 1
    assert "--max-memory" in stderr


@pytest.mark.parametrize("option", ["--finetune-epochs", "--recovery-epochs", "--learning-rate"])
@pytest.mark.parametrize("value", ["inf", "nan", "-1"])
def test_numbers_that_are_none(command: Command, option: str, value: str) -> None:
    code, _, stderr = command(*ARGUMENTS, option, value)
    assert code in (1, 2) and option in stderr and "Traceback" not in stderr


@pytest.mark.parametrize(("said", "shown"), [("a was saved", "a was saved"), ("", "interrupted")])
def test_interrupts_say_what_is_kept(command: Command, work: Any, said: str, shown: str) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt(*filter(None, [said]))

    work(interrupted)
    for arguments in (ARGUMENTS, ("demo",)):
        code, _, stderr = command(*arguments)
        assert code == 130 and shown in stderr and "Traceback" not in stderr


def test_wrong_choices_are_named_plainly(command: Command) -> None:
    code, _, stderr = command("demo", "--dataset", "imdb")
    assert code == 2 and "'imdb' is not one of 'trec', 'mr'" in " ".join(stderr.split())
    assert "Value error" not in stderr


def test_without_a_terminal_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress_bars, "time", SimpleNamespace(monotonic=lambda: clock.now))
    with ProgressBars("seed 1") as bars:
        for done in range(100):
            clock.now += 1
            bars("gradients", done, 100)
    assert capsys.readouterr().err == "".join(
        f"seed 1 gradients: {done} of 100\n" for done in (29, 59, 89)
    )


def test_a_bar_that_cannot_be_drawn_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> None:
        raise ValueError("no such terminal")

    monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda: True))
    with ProgressBars() as bars:
        monkeypatch.setattr(bars, "_tqdm", broken)
        for done in range(3):
            bars("gradients", done, 3)
    monkeypatch.setattr(sys, "stderr", None)
    with ProgressBars() as bars:
        bars("gradients", 1, 3)


def test_bars_are_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    with ProgressBars() as bars:
        real = bars._tqdm
        monkeypatch.setattr(
            bars, "_tqdm", lambda **given: real(**{**given, "delay": 0, "file": shown})
        )
        for done in range(4):
            bars("gradients", done, 3)
    assert "gradients" in shown.getvalue()


def test_what_cannot_be_drawn_is_a_note_said_once(tmp_path: Path) -> None:
    picture = tmp_path / "accuracy.png"
    picture.write_text("of an earlier run")
    said: list[str] = []
    note = Notes(said.append)
    for _ in range(2):
        with decoration(picture, note):
            raise ValueError("odd\nname")
    assert said == ["note: accuracy.png was not drawn (ValueError: odd name)"]
    assert not picture.exists()
    with pytest.raises(KeyboardInterrupt), decoration(picture, note):
        raise KeyboardInterrupt
