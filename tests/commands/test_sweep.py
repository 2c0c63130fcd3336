"""``obert-prune sweep`` and what it writes: table, plot, and going on where it was stopped."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("typer")

from tiny import FakeClock
from tiny_text import save_model

from obert_kernels import Pruner
from obert_kernels.commands import sweep
from obert_kernels.tasks import batches, precision
from obert_kernels.tasks.classification import ClassificationTask
from obert_kernels.tasks.evaluate import evaluate
from obert_kernels.tasks.loaders import make_loader
from obert_kernels.tasks.text_data import TextData, Texts
from obert_kernels.trials.budget import Budget
from obert_kernels.trials.table import COLUMNS

pytestmark = pytest.mark.usefixtures("one_thread")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def quick_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than all the rest, and one test has them."""
    monkeypatch.setattr(sweep, "plot_sweep", lambda *arguments: None)


QUICK = ("--texts", 32, "--texts-per-grad", 4, "--block-size", 8, "--max-length", 16)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "sweep.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def steady(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in rows]


def test_sweep_writes_table_and_plot_and_goes_on(
    tmp_path: Path, data_file: str, command: Command, estimates: list, monkeypatch: Any
) -> None:  # fmt: skip
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    arguments = (
        "sweep", model, data_file, "-s", 0.5, "-s", 0.75, *QUICK, "--damping", "auto",
        "--damping", "1e-3", "--selection", "greedy", "--selection", "diagonal", "--selection",
        "magnitude", "-o", out,
    )  # fmt: skip
    code, stdout, stderr = command(*arguments)
    assert code == 0, stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "sweep.csv", "sweep.json", "sweep.md", "sweep.png",
    ]  # fmt: skip
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert estimates == [(8, 4, 8)]
    rows = rows_of(out)
    assert len(rows) == 2 * 5 and tuple(rows[0]) == COLUMNS
    assert rows[0]["selection"] == "magnitude" and rows[0]["texts"] == rows[0]["damping"] == ""
    assert {row["texts"] for row in rows[2:]} == {"32"}
    assert (out / "sweep.md").read_text() in stdout
    marked = [line for line in stdout.splitlines() if re.match(r"\| +(50|75)\.0% \| +\* \|", line)]
    assert len(marked) == 2
    assert stdout.count("[") == 10 and "[10/10] 75.0% diagonal, damping 0.001: " in stdout
    whole = (out / "sweep.csv").read_bytes()

    monkeypatch.setattr(sweep, "plot_sweep", lambda *arguments: None)
    # Nothing is left to do: the same table, no estimate.
    code, again, _ = command(*arguments)
    assert code == 0 and len(estimates) == 1
    assert "10 of 10 trials are in" in again
    assert again.partition("\n| sparsity")[2] == stdout.partition("\n| sparsity")[2]
    assert (out / "sweep.csv").read_bytes() == whole

    # A crash tore the last line and lost two more.
    lines = whole.splitlines(keepends=True)
    (out / "sweep.csv").write_bytes(b"".join(lines[:-3]) + lines[-3][:20])
    code, third, stderr = command(*arguments)
    assert code == 0, stderr
    assert "7 of 10 trials are in" in third and third.count("[") == 3
    assert steady(rows_of(out)) == steady(rows) and len(estimates) == 2

    # More of the grid in the same folder.
    code, fourth, stderr = command(*arguments, "--damping", 1e-2)
    assert code == 0, stderr
    assert "10 of 14 trials are in" in fourth and len(rows_of(out)) == 14


@pytest.mark.usefixtures("quick_plot")
def test_the_grid_is_that_of_the_options(
    tmp_path: Path, data_file: str, command: Command, estimates: list
) -> None:  # fmt: skip
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    (tmp_path / "mine.py").write_text(
        "import obert_kernels\n\n"
        "@obert_kernels.register_saliency('least', uses_fisher=False)\n"
        "def least(problem):\n"
        "    weights = problem.weights\n"
        "    return {n: problem.grouped(weights[n].detach().abs()) for n in problem.names()}\n"
    )
    code, _, stderr = command(
        "sweep", model, data_file, "-s", 0.5, "--max-length", 16, "--texts", 16, "--texts", 32,
        "--texts-per-grad", 2, "--texts-per-grad", 4, "--block-size", 8, "--block-size", 4,
        "--damping", 1e-3, "--plugin", tmp_path / "mine.py", "--selection", "greedy",
        "--selection", "least", "-o", out,
    )  # fmt: skip
    assert code == 0, stderr
    assert len(estimates) == len(set(estimates)) == 8
    rows = rows_of(out)
    assert {(int(r["texts"]), int(r["texts_per_grad"]), r["block_size"]) for r in rows} == {
        (n, g, b) for n in (16, 32) for g in (2, 4) for b in ("", "4", "8")
    }


@pytest.mark.usefixtures("quick_plot")
@pytest.mark.parametrize("gradients_of", ["predictions", "labels"])
def test_sweep_figures_are_those_of_single_runs(
    tmp_path: Path, data_file: str, command: Command, gradients_of: str
) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    asked = ("-s", 0.75, "--gradients-of", gradients_of)
    assert command("sweep", model, data_file, *asked, *QUICK, "-o", out)[0] == 0
    single = ("--num-grads", 8, "--grad-batch-size", 4, "--block-size", 8, "--max-length", 16)
    assert command("run", model, data_file, *asked, *single, "-o", tmp_path / "run")[0] == 0
    (row,) = rows_of(out)
    report = json.loads((tmp_path / "run" / "report.json").read_text())["results"][1]
    assert float(row["test_accuracy"]) == report["accuracy"]
    assert float(row["damping_used"]) == pytest.approx(report["damping"])
    assert float(row["predicted_increase"]) == pytest.approx(report["predicted_increase"])


@pytest.mark.usefixtures("quick_plot")
def test_a_resumed_sweep_never_mixes_precisions(
    tmp_path: Path, data_file: str, command: Command, monkeypatch: Any
) -> None:
    """Say on another machine, where auto means another type."""
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    arguments = ("sweep", model, data_file, "-s", 0.5, "--damping", 1e-3, *QUICK, "-o", out)
    monkeypatch.setattr(precision, "_bfloat16_is_faster", lambda device: False)
    assert command(*arguments)[0] == 0
    assert json.loads((out / "sweep.json").read_text())["basis"]["precision"] == "float32"
    monkeypatch.setattr(precision, "_bfloat16_is_faster", lambda device: True)
    code, _, stderr = command(*arguments)
    assert code == 1 and "precision was float32, now bfloat16" in stderr
    assert command(*arguments, "--precision", "float32")[0] == 0


@pytest.mark.usefixtures("quick_plot")
def test_what_is_done_needs_no_memory(tmp_path: Path, data_file: str, command: Command) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    arguments = ("sweep", model, data_file, "-s", 0.5, "--damping", 1e-3, *QUICK, "-o", out)
    assert command(*arguments)[0] == 0
    code, stdout, stderr = command(*arguments, "--max-memory", "1KB")
    assert code == 0, stderr
    assert "1 of 1 trials are in" in stdout
    code, _, stderr = command(*arguments, "-s", 0.6, "--max-memory", "1KB")
    assert code == 1 and "max_memory" in stderr


@pytest.mark.usefixtures("quick_plot")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (["--max-length", 12], "max-length was 16, now 12"),
        (["--seed", 3], "seed was 0, now 3"),
        (["--pattern", "block4"], "pattern was unstructured, now block4"),
        (["--params", "re:.*output.*"], "params was None, now"),
        (["--gradients-of", "labels"], "gradients-of was predictions, now labels"),
        ("model", "the model's weights is not the same"),
        ("configuration", "the model's configuration is not the same"),
        ("tokenizer", "the tokenizer is not the same"),
        ("data", "the data is not the same"),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, data_file: str, command: Command, changed: Any, message: str
) -> None:  # fmt: skip
    folder, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    arguments = ("sweep", folder, data_file, "-s", 0.5, "--selection", "magnitude", *QUICK)
    arguments += ("-o", out)
    assert command(*arguments)[0] == 0
    before = (out / "sweep.csv").read_bytes()
    if changed == "model":
        save_model(folder, head=True)
        model = ClassificationTask.load(str(folder), data_file).model
        with torch.no_grad():
            model.classifier.weight[0, 0] += 1e-6
        model.save_pretrained(folder)
    elif changed == "configuration":
        path = folder / "config.json"
        path.write_text(path.read_text().replace('"gelu"', '"relu"'))
    elif changed == "tokenizer":
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"good"', '"grand"'))
    elif changed == "data":
        with Path(data_file).open("a") as stream:
            stream.write("\na fine film indeed,0")
    more = changed if isinstance(changed, list) else []
    code, _, stderr = command(*arguments, *more)
    assert code == 1
    assert re.fullmatch(rf"error: .*\({message}.*\): choose another --output.*\n", stderr)
    assert (out / "sweep.csv").read_bytes() == before


def test_a_folder_without_trials_takes_other_settings(
    tmp_path: Path, data_file: str, command: Command
) -> None:  # fmt: skip
    """After an error on the way to the first one."""
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    arguments = ("sweep", model, data_file, "-s", 0.5, "--damping", 1e-3, *QUICK, "-o", out)
    code, _, stderr = command(*arguments, "--max-memory", "1KB")
    assert code == 1 and "fisher_dtype float32" in stderr
    assert command(*arguments, "--fisher-dtype", "float32")[0] == 0
    code, _, stderr = command(*arguments)
    assert code == 1 and "fisher-dtype was float32, now float64" in stderr


def test_a_table_of_unknown_origin_is_refused(
    tmp_path: Path, data_file: str, command: Command
) -> None:  # fmt: skip
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    out.mkdir()
    arguments = ("sweep", model, data_file, "-s", 0.5, *QUICK, "-o", out)
    (out / "sweep.csv").write_text("x\n")
    code, _, stderr = command(*arguments)
    assert code == 1 and "without sweep.json" in stderr
    (out / "sweep.json").write_text("[]")
    code, _, stderr = command(*arguments)
    assert code == 1 and "is not of a sweep" in stderr


@pytest.mark.usefixtures("quick_plot")
def test_n_of_m_needs_no_sparsity(
    tmp_path: Path, data_file: str, command: Command
) -> None:  # fmt: skip
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    code, _, stderr = command(
        "sweep", model, data_file, "--pattern", "2:4", *QUICK, "--selection", "greedy",
        "--selection", "magnitude", "--damping", 1e-3, "-o", out,
    )  # fmt: skip
    assert code == 0, stderr
    assert [(row["target"], row["sparsity"]) for row in rows_of(out)] == [("0.5", "0.5")] * 2


@pytest.mark.usefixtures("quick_plot")
def test_a_budget_says_what_it_left_out(
    tmp_path: Path, data_file: str, command: Command, monkeypatch: Any
) -> None:  # fmt: skip
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    arguments = ("sweep", model, data_file, "-s", 0.5, "-s", 0.75, *QUICK, "-o", out)
    arguments += ("--selection", "greedy", "--selection", "magnitude", "--damping", 1e-3)
    code, stdout, _ = command(*arguments, "--budget", 0)
    assert code == 0 and "too short for a single trial" in stdout
    assert not (out / "sweep.csv").exists()
    clock = FakeClock()
    real = Pruner.step

    def slow(*arguments: Any, **options: Any) -> Any:
        clock.now += 61
        return real(*arguments, **options)

    monkeypatch.setattr(Pruner, "step", slow)
    monkeypatch.setattr(sweep, "Budget", lambda minutes, _: Budget(minutes, clock))
    code, stdout, _ = command(*arguments, "--budget", 2.5)
    assert code == 0
    assert "Trials that the budget of 2.5 minutes left out: 1 (75.0% greedy)" in stdout
    assert "same command goes on" in stdout and "| sparsity" in stdout
    assert len(rows_of(out)) == 3 and (out / "sweep.md").exists()
    assert command(*arguments)[0] == 0 and len(rows_of(out)) == 4


@pytest.mark.usefixtures("quick_plot")
def test_interrupted_sweep_keeps_its_trials(
    tmp_path: Path, data_file: str, command: Command, monkeypatch: Any
) -> None:  # fmt: skip
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    arguments = ("sweep", model, data_file, "-s", 0.5, "-s", 0.75, *QUICK, "-o", out)
    arguments += ("--selection", "magnitude")
    real = Pruner.step

    def interrupted(self: Pruner, target: float, *more: Any, **options: Any) -> Any:
        if target == 0.75:
            raise KeyboardInterrupt
        return real(self, target, *more, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Pruner, "step", interrupted)
        code, _, stderr = command(*arguments)
    assert code != 0 and "keeps the trials that were finished" in stderr
    assert len(rows_of(out)) == 1
    assert command(*arguments)[0] == 0 and len(rows_of(out)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing-folder", "DATA"], "missing-folder could not be loaded as a model"),
        (["MODEL", "DATA", "--selection", "random"], "selection must be"),
        (["MODEL", "DATA", "--estimator", "kfac"], "estimator must be"),
        (["MODEL", "DATA", "--update", "mean"], "update must be"),
        (["MODEL", "DATA", "--damping", "much"], "damping must be"),
        (["MODEL", "DATA", "--texts", "8", "--texts-per-grad", "9"], "8 texts give no gradient"),
        (["MODEL", "DATA", "--texts-per-grad", "1000"], "--texts-per-grad"),
        (["MODEL", "DATA", "--pattern", "1:4"], "prunes to a sparsity of 0.75"),
        (["MODEL", "DATA", "--max-memory", "1KB"], "max_memory"),
        (["BARE", "DATA"], "no trained classification head: fine-tune it first"),
    ],
)
def test_user_errors_are_one_line(
    tmp_path: Path, data_file: str, command: Command, monkeypatch: Any,
    arguments: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {"DATA": data_file, "MODEL": str(save_model(tmp_path / "model", head=True))}
    names |= {"BARE": str(save_model(tmp_path / "bare", head=False))}
    given = [names.get(argument, argument) for argument in arguments]
    out = tmp_path / "out"
    code, _, stderr = command("sweep", *given, "-s", 0.5, "-o", out)
    assert code == 1
    assert re.fullmatch(rf"error: .*{message}.*\n", stderr)
    assert not (out / "sweep.csv").exists()


def test_texts_are_held_back_where_the_data_holds_none_back():
    train = Texts([f"text {i}" for i in range(50)], [i % 2 for i in range(50)], None)
    data = TextData(["a", "b"], train, Texts([], []), train)
    made = batches.with_held_back(data, 0)
    assert len(made.dev) == 5 and len(made.train) == 45
    assert not set(made.dev.texts) & set(made.train.texts)
    assert all(
        int(t.split()[1]) % 2 == y for t, y in zip(made.dev.texts, made.dev.labels, strict=True)
    )
    assert batches.with_held_back(made, 1) is made


def test_loss_is_a_mean_over_texts(tmp_path: Path, data_file: str) -> None:
    task = ClassificationTask.load(str(save_model(tmp_path / "model", head=True)), data_file)
    found = [
        evaluate(task.model, make_loader(task.tokenizer, task.data.train, size))
        for size in (7, 500)
    ]
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)
    assert found[0].accuracy == found[1].accuracy
