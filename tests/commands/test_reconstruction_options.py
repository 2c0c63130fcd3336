"""``--reconstruction`` and ``--fit-texts``: what they change, and what the reports say of it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from tiny_text import save_model

from obert_kernels import ReconstructionConfig
from obert_kernels.commands import cli, demo, run, sweep
from obert_kernels.commands.config import RunConfig
from obert_kernels.deploy.checkpoints import load_masks

pytestmark = pytest.mark.usefixtures("one_thread")

Command = Callable[..., tuple[int, str, str]]
QUICK = ("--block-size", 8, "--max-length", 16, "--damping", 1e-3)
RUN = (*QUICK, "--num-grads", 8, "--grad-batch-size", 4)
BY_DEFAULT = ReconstructionConfig().num_samples
SWEEP = (*QUICK, "--texts", 32, "--texts-per-grad", 4)


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all the rest."""
    monkeypatch.setattr(run, "plot_accuracy", lambda *arguments: None)
    monkeypatch.setattr(sweep, "plot_sweep", lambda *arguments: None)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    kind = transformers.AutoModelForSequenceClassification
    return dict(kind.from_pretrained(folder).named_parameters())


def test_a_run_reports_what_the_fit_came_to(
    tmp_path: Path, data_file: str, command: Command
) -> None:
    model, saved = save_model(tmp_path / "model", head=True), {}
    for how in ((), ("--reconstruction", "none"), ("--steps", 2, "--fit-texts", 12)):
        out = tmp_path / f"out{len(saved)}"
        code, _, stderr = command("run", model, data_file, "-s", 0.5, *RUN, *how, "-o", out)
        assert code == 0, stderr
        saved[how] = out
    fitted, plain, in_steps = (
        json.loads((out / "report.json").read_text())["results"] for out in saved.values()
    )
    assert {row["reconstruction"] is None for row in plain} == {True}
    for (magnitude, ours), steps in ((fitted, [1]), (in_steps, [1, 2])):
        assert magnitude == {**plain[0], "reconstruction": None}, "plain, whatever is asked for"
        found = ours["reconstruction"]
        assert found["seconds"] > 0
        assert [fit["step"] for fit in found["divergence"]] == steps
        assert all((fit["after"] < fit["before"]) == fit["is_kept"] for fit in found["divergence"])
    assert fitted[1]["reconstruction"]["divergence"][0]["is_kept"]
    ours = [out / "sparsity-0.5" for out in saved.values()]
    settings = [json.loads((folder / "report.json").read_text())["settings"] for folder in ours]
    assert settings[1]["reconstruction"] is None
    samples = [settings[index]["reconstruction"]["num_samples"] for index in (0, 2)]
    assert samples == [BY_DEFAULT, 12]
    masks, (first, second) = load_masks(ours[0]), map(weights_in, ours[:2])
    for name, mask in masks.items():
        assert torch.equal(second[name] != 0, mask), "the same masks"
        assert not torch.equal(first[name], second[name])


def test_magnitude_is_fitted_where_it_is_the_method_and_plain_beside_it(
    tmp_path: Path, data_file: str, command: Command
) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    options = ("-s", 0.5, "--selection", "magnitude", *RUN)
    assert command("run", model, data_file, *options, "-o", out)[0] == 0
    beside, ours = json.loads((out / "report.json").read_text())["results"]
    assert beside["reconstruction"] is None and ours["reconstruction"]["seconds"] > 0


def test_the_demo_takes_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    seen: list[RunConfig] = []
    monkeypatch.setattr(cli, "prune_classifier", lambda settings, *_: seen.append(settings))
    assert command("demo", "-o", tmp_path)[0] == 0
    assert command("demo", "-o", tmp_path, "--reconstruction", "none")[0] == 0
    assert command("demo", "-o", tmp_path, "--fit-texts", 99)[0] == 0
    assert seen[0] == demo.demo_settings("trec", tmp_path)
    assert [settings.pruning_config().reconstruction for settings in seen] == [
        ReconstructionConfig(), None, ReconstructionConfig(num_samples=99),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options", [("--reconstruction", "always"), ("--fit-texts", 0)], ids=lambda o: o[0]
)
@pytest.mark.parametrize("name", ["run", "sweep", "demo"])
def test_wrong_values_are_wrong_usage(command: Command, name: str, options: tuple) -> None:
    given = () if name == "demo" else ("model", "data.csv", "-s", 0.5)
    code, _, stderr = command(name, *given, *options)
    assert code == 2 and options[0] in stderr


def test_words_are_checked_without_the_command_line_too(tmp_path: Path) -> None:
    settings = RunConfig("model", "data.csv", [0.5], tmp_path, reconstruction="always")
    with pytest.raises(ValueError, match="reconstruction must be 'auto' or 'none', got 'always'"):
        settings.pruning_config()


def test_a_sweep_fits_as_it_is_told(tmp_path: Path, data_file: str, command: Command) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    arguments = ("sweep", model, data_file, "-s", 0.5, *SWEEP)
    arguments += ("--selection", "greedy", "--selection", "magnitude")
    code, _, stderr = command(*arguments, "--fit-texts", 16, "-o", out)
    assert code == 0, stderr
    assert all(float(seconds) > 0 for seconds in fit_seconds(out))
    for changed, now in (((), f"auto with {BY_DEFAULT}"), (("--reconstruction", "none"), "None")):
        code, _, stderr = command(*arguments, *changed, "-o", out)
        assert code == 1
        assert f"reconstruction was auto with 16 fit-texts, now {now}" in stderr
    assert command(*arguments, "--reconstruction", "none", "-o", tmp_path / "plain")[0] == 0
    assert fit_seconds(tmp_path / "plain") == ["0.0", "0.0"]


def fit_seconds(folder: Path) -> list[str]:
    with (folder / "sweep.csv").open(newline="") as stream:
        return [row["reconstruction_seconds"] for row in csv.DictReader(stream)]


def test_a_folder_from_before_there_was_a_reconstruction_goes_on_without(
    tmp_path: Path, data_file: str, command: Command
) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    arguments = ("sweep", model, data_file, *SWEEP, "-o", out)
    assert command(*arguments, "-s", 0.5, "--reconstruction", "none")[0] == 0
    basis = json.loads((out / "sweep.json").read_text())
    del basis["basis"]["reconstruction"]
    (out / "sweep.json").write_text(json.dumps(basis))
    with (out / "sweep.csv").open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    del row["reconstruction_seconds"]
    (out / "sweep.csv").write_text(f"{','.join(row)}\n{','.join(row.values())}\n")
    code, _, stderr = command(*arguments, "-s", 0.5)
    assert code == 1 and f"reconstruction was None, now auto with {BY_DEFAULT}" in stderr
    code, stdout, stderr = command(*arguments, "-s", 0.5, "-s", 0.75, "--reconstruction", "none")
    assert code == 0, stderr
    assert "1 of 2 trials are in" in stdout
    assert len((out / "sweep.csv").read_text().splitlines()) == 3
