"""The obert-prune commands of README.md and docs, run as they stand there on a tiny BERT."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("typer")

from tiny_text import save_model

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What makes a command quick, unless it says otherwise itself.
QUICK = {
    "run": {"--num-grads": 8, "--grad-batch-size": 4, "--block-size": 8, "--max-length": 16},
    "sweep": {"--texts": 16, "--texts-per-grad": 4, "--block-size": 8, "--max-length": 16},
}


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line]


FOUND = sorted({line for page in PAGES if "results" not in page.parts for line in commands(page)})


def test_there_are_commands() -> None:
    assert {line.split()[1] for line in FOUND} == set(QUICK)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("line", FOUND)
def test_command_runs(
    line: str,
    tmp_path: Path,
    data_file: str,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_model(tmp_path / "my-finetuned-bert", head=True)
    Path(data_file).rename(tmp_path / "train.csv")
    monkeypatch.chdir(tmp_path)
    program, name, *arguments = shlex.split(line)
    assert program == "obert-prune"
    more = {key: value for key, value in QUICK[name].items() if key not in arguments}
    code, stdout, stderr = command(name, *arguments, *(part for it in more.items() for part in it))
    assert code == 0, stderr
    assert "%" in stdout
    output = (
        arguments[arguments.index("--output") + 1] if "--output" in arguments else "obert-sweep"
    )
    assert any((tmp_path / output).iterdir())
