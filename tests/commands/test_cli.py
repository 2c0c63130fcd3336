"""The command line from end to end on a tiny random BERT, and checkpoints."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("typer")

from tiny_text import save_model

from obert_kernels.commands import cli, demo, options, run
from obert_kernels.deploy import checkpoints
from obert_kernels.ops import native
from obert_kernels.tasks.evaluate import accuracy
from obert_kernels.tasks.loaders import make_loader
from obert_kernels.tasks.readers import load_text_data

pytestmark = pytest.mark.usefixtures("one_thread")

QUICK = ("--num-grads", 8, "--grad-batch-size", 4, "--block-size", 8, "--max-length", 16)


def test_run_writes_checkpoints_report_and_plot(
    tmp_path: Path, data_file: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    model = save_model(tmp_path / "model", head=True)
    out = tmp_path / "out"
    arguments = ("run", model, data_file, "-s", 0.5, "--sparsity", 0.75, "-o", out, *QUICK)
    code, stdout, stderr = command(*arguments)
    assert code == 0, stderr
    assert re.search(r"50\.0% +\d+\.\d% +\d+\.\d% +\d\S+\n +75\.0%", stdout)
    assert sorted(path.name for path in out.iterdir()) == [
        "accuracy.png", "report.json", "sparsity-0.5", "sparsity-0.75",
    ]  # fmt: skip
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["selection"] == "greedy", "by default"
    assert [(row["method"], row["sparsity"]) for row in report["results"]] == [
        ("magnitude", 0.5), ("obert_kernels", 0.5),
        ("magnitude", 0.75), ("obert_kernels", 0.75),
    ]  # fmt: skip
    for sparsity in (0.5, 0.75):
        folder = out / f"sparsity-{sparsity}"
        masks = checkpoints.load_masks(folder)
        pruned = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        weights = dict(pruned.named_parameters())
        assert len(masks) == 12
        for name, mask in masks.items():
            assert mask.dtype == torch.bool and mask.shape == weights[name].shape
            assert torch.equal(weights[name] != 0, mask)
        total = sum(mask.numel() for mask in masks.values())
        assert sum(int((~mask).sum()) for mask in masks.values()) == sparsity * total
        own = json.loads((folder / "report.json").read_text())
        assert own["settings"]["update"] == "joint" and len(own["damping_trials"]) >= 3
        test = make_loader(
            transformers.AutoTokenizer.from_pretrained(folder), load_text_data(data_file).test, 64
        )
        assert own["accuracy"] == accuracy(pruned, test)
    assert command(*arguments)[1].splitlines()[:-1] == stdout.splitlines()[:-1]  # and again


@pytest.mark.usefixtures("limits_are_of_the_fisher")
def test_run_fine_tunes_and_recovers(
    tmp_path: Path, data_file: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    model = save_model(tmp_path / "model", head=False)
    out = tmp_path / "out"
    code, _, stderr = command(
        "run", model, data_file, "-s", 0.5, "-o", out, *QUICK, "--finetune-epochs", 12,
        "--recovery-epochs", 1, "--learning-rate", 5e-3, "--pattern", "block4",
        "--max-memory", "80KiB",
    )  # fmt: skip
    assert code == 0, stderr
    report = json.loads((out / "report.json").read_text())
    assert report["dense_accuracy"] > 0.9
    assert report["results"][1]["accuracy"] > 0.8
    folder = out / "sparsity-0.5"
    weights = dict(
        transformers.AutoModelForSequenceClassification.from_pretrained(folder).named_parameters()
    )
    for name, mask in checkpoints.load_masks(folder).items():
        groups = mask.view(-1, 4)
        assert torch.equal(groups.any(dim=1), groups.all(dim=1))
        assert not weights[name][~mask].any()
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(out / "dense")
    assert dense.config.id2label == {0: "0", 1: "1"}


EXAMPLES = re.findall(
    r"```python\n(.*?)```",
    (Path(__file__).parents[2] / "docs" / "extending.md").read_text(),
    re.DOTALL,
)


@pytest.mark.parametrize(
    "options",
    [
        ["--steps", 2, "--schedule", "linear", "-s", 0.5],
        ["--pattern", "2:4"],
        ["--pattern", "block4x1", "-s", 0.5],
        ["--plugin", "PLUGIN", "--selection", "wanda", "-s", 0.5],
        ["--plugin", "PLUGIN", "--estimator", "diagonal", "--damping", 1e-3, "-s", 0.5],
        ["--plugin", "PLUGIN", "--pattern", "tile2x2", "-s", 0.5],
        ["--selection", "magnitude", "-s", 0.5],
    ],
)
def test_other_ways_to_prune(
    tmp_path: Path,
    data_file: str,
    command: Callable[..., tuple[int, str, str]],
    options: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    titles = []
    monkeypatch.setattr(run, "plot_accuracy", lambda *plot: titles.append(plot[-1]))
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    (tmp_path / "mine.py").write_text("\n".join(EXAMPLES))
    given = [tmp_path / "mine.py" if option == "PLUGIN" else option for option in options]
    code, _, stderr = command("run", model, data_file, "-o", out, *QUICK, *given)
    assert code == 0, stderr
    report = json.loads((out / "sparsity-0.5" / "report.json").read_text())
    assert report["sparsity"] == 0.5
    assert (report["predicted_increase"] is None) == ("--selection" in options)
    assert report["settings"]["steps"] == (2 if "--steps" in options else 1)
    how = "in 2 steps" if "--steps" in options else "in one shot"
    assert set(titles) == {f"model on moods.csv, pruned {how}"}
    for mask in checkpoints.load_masks(out / "sparsity-0.5").values():
        if "2:4" in options:
            assert (mask.view(-1, 4).sum(1) == 2).all()
        if "tile2x2" in options:
            tiles = mask.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).transpose(1, 2).flatten(2)
            assert torch.equal(tiles.any(2), tiles.all(2))
        if "block4x1" in options:
            columns = mask.mT.reshape(-1, 4)
            assert torch.equal(columns.any(1), columns.all(1))


def test_what_gradients_are_taken_of_decides_the_fisher(
    tmp_path: Path, data_file: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    model = save_model(tmp_path / "model", head=True)
    increases = []
    for of in ([], ["--gradients-of", "predictions"], ["--gradients-of", "labels"]):
        out = tmp_path / f"out{len(increases)}"
        options = [*QUICK, "-s", 0.5, "--damping", 1e-3, *of]
        code, _, stderr = command("run", model, data_file, "-o", out, *options)
        assert code == 0, stderr
        report = json.loads((out / "sparsity-0.5" / "report.json").read_text())
        increases.append(report["predicted_increase"])
    assert increases[0] == increases[1] != increases[2]


@pytest.mark.parametrize("options", [[], ["--precision", "bfloat16"], ["--precision", "float32"]])
def test_reports_say_what_precision_was_used(
    tmp_path: Path,
    data_file: str,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
) -> None:
    for name, found in (("amx_tile", True), ("avx512_bf16", True)):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda x=found: x, raising=False)
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    given = (*QUICK, "-s", 0.5, "--damping", 1e-3, *options)
    code, _, stderr = command("run", model, data_file, "-o", out, *given)
    assert code == 0, stderr
    used = "float32" if "float32" in options else "bfloat16"
    report = json.loads((out / "report.json").read_text())
    assert report["precision"] == used
    assert report["settings"]["precision"] == (options[1] if options else "auto")
    assert json.loads((out / "sparsity-0.5" / "report.json").read_text())["precision"] == used


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing-folder", "DATA"], "missing-folder could not be loaded as a model"),
        (["MODEL", "missing.csv"], "there is no file missing.csv"),
        (["MODEL", "DATA", "--pattern", "rows"], "pattern must be .*got 'rows'"),
        (["MODEL", "DATA", "--params", "re:nothing"], "'re:nothing' matches no"),
        (["MODEL", "DATA", "--label-column", "kind"], "no column 'kind' for --label-column"),
        (["MODEL", "DATA", "--max-memory", "1KB"], "max_memory"),
        (["MODEL", "DATA", "--damping", "-1"], "damping must be positive"),
        (["MODEL", "DATA", "--max-length", "513"], "at most 512 tokens"),
        (["MODEL", "DATA", "--pattern", "block3"], "not divisible by 3"),
        (["MODEL", "DATA", "--selection", "random"], "selection must be one of greedy,"),
        (["MODEL", "DATA", "--estimator", "kfac"], "estimator must be one of gram"),
        (["MODEL", "DATA", "--plugin", "nothing.py"], "plugin nothing.py could not be loaded"),
        (["MODEL", "DATA", "--pattern", "2:4"], "pattern 2:4 prunes to a sparsity of 0.5"),
        (["MODEL", "DATA", "--grad-batch-size", "1000"], "--grad-batch-size"),
        (["BARE", "DATA"], "no trained classification head: .*--finetune-epochs"),
        (["THREE", "DATA"], "knows the classes .* but .* has 0, 1: .*--finetune-epochs"),
    ],
)
def test_user_errors_are_one_line(
    tmp_path: Path,
    data_file: str,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    names = {"DATA": data_file}
    names |= {"MODEL": str(save_model(tmp_path / "model", head=True))}
    names |= {"BARE": str(save_model(tmp_path / "bare", head=False))}
    names |= {"THREE": str(save_model(tmp_path / "three", head=True, classes=3))}
    given = [names.get(argument, argument) for argument in arguments]
    out = tmp_path / "out"
    code, _, stderr = command("run", *given, "-s", 0.6, "--num-grads", 2, "-o", out)
    assert code == 1
    assert re.fullmatch(rf"error: .*{message}.*\n", stderr)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [["run"], ["run", "a", "b"], ["run", "a", "b", "-s", "2"], ["prune"],
     ["run", "a", "b", "-s", "0.5", "--max-memory", "lots"], ["sweep", "a"], ["sweep", "a", "b"],
     ["sweep", "a", "b", "-s", "0.5", "--budget", "-1"],
     ["run", "a", "b", "-s", "0.5", "--precision", "float16"],
     ["run", "a", "b", "-s", "0.5", "--seed", "-1"], ["sweep", "a", "b", "--seed", str(2**32)],
     ["demo", "--seed", str(2**32)]],
)  # fmt: skip
def test_wrong_usage_exits_with_2(
    command: Callable[..., tuple[int, str, str]], arguments: list[str]
) -> None:
    code, _, stderr = command(*arguments)
    assert code == 2 and "Traceback" not in stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["run", "--help"], ["sweep", "-h"], ["demo", "-h"]]
)
def test_help(command: Callable[..., tuple[int, str, str]], arguments: list[str]) -> None:
    code, stdout, _ = command(*arguments)
    assert code == 0 and "Usage: obert-prune" in stdout


def test_demo_is_a_run_with_its_own_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str, str]]
) -> None:
    seen = []
    monkeypatch.setattr(cli, "prune_classifier", lambda settings, *_: seen.append(settings))
    assert command("demo", "--dataset", "mr", "-o", tmp_path, "--seed", 3)[0] == 0
    assert seen == [demo.demo_settings("mr", tmp_path, 3)]
    assert seen[0].sparsity == (0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8 * 10**9), ("512 MiB", 2**29), ("1.5k", 1500), ("1000000", 10**6), ("2Gi", 2**31)],
)
def test_amounts_of_memory(text: str, expected: int) -> None:
    assert options.parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "8 parsecs", "-1GB", "1TB1", "5i"])
def test_wrong_amounts_of_memory(text: str) -> None:
    with pytest.raises(ValueError, match="no amount of memory"):
        options.parse_bytes(text)


def test_the_model_to_prune_is_not_replaced(
    tmp_path: Path, data_file: str, command: Callable[..., tuple[int, str, str]]
) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    options = ("-s", 0.5, "-o", out, *QUICK, "--damping", 1e-3, "--finetune-epochs", 0.2)
    assert command("run", model, data_file, *options)[0] == 0
    assert command("run", model, data_file, *options)[0] == 0, "what a run wrote it may replace"
    for name in ("dense", "sparsity-0.5"):
        before = (out / name / "model.safetensors").read_bytes()
        code, _, stderr = command("run", out / name, data_file, *options)
        assert code == 1 and "where the model is, would be replaced" in stderr
        assert (out / name / "model.safetensors").read_bytes() == before
    # Without fine-tuning the dense model stays where it is.
    assert command("run", out / "dense", data_file, *options[:-2])[0] == 0


def test_what_a_stopped_run_leaves_is_described(
    tmp_path: Path,
    data_file: str,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, out = save_model(tmp_path / "model", head=True), tmp_path / "out"
    options = ("-s", 0.5, "-s", 0.75, "-o", out, *QUICK, "--damping", 1e-3)
    assert command("run", model, data_file, *options)[0] == 0
    save = checkpoints.save_pruned

    def save_the_first(result, tokenizer, folder, extra):
        if folder.name == "sparsity-0.75":
            raise OSError("disk full")
        return save(result, tokenizer, folder, extra)

    monkeypatch.setattr(checkpoints, "save_pruned", save_the_first)
    (out / "accuracy.png").write_bytes(b"of the first run")
    code, _, stderr = command("run", model, data_file, *options, "--scope", "layer")
    assert code == 1 and "disk full" in stderr
    report = json.loads((out / "report.json").read_text())
    assert report["settings"]["scope"] == "layer"
    assert [row["sparsity"] for row in report["results"]] == [0.5, 0.5]
    assert (out / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    for folder, scope in (("sparsity-0.5", "layer"), ("sparsity-0.75", "global")):
        own = json.loads((out / folder / "report.json").read_text())
        assert own["settings"]["scope"] == scope
        assert (own["model"], own["data"]) == (str(model), data_file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("report.json", '{"settings": 1}', "out/report.json was not written by obert-prune run"),
        ("report.json", "[1]", "out/report.json was not written by obert-prune run"),
        ("report.json", "a report", "out/report.json was not written by obert-prune run"),
        ("accuracy.png", "a picture", "out/accuracy.png was not written by obert-prune run"),
        ("config.json", "{}", "out holds a model: choose another folder"),
    ],
)
def test_nothing_on_top_of_the_output_folder_is_replaced(
    tmp_path: Path,
    data_file: str,
    command: Callable[..., tuple[int, str, str]],
    name: str,
    content: str,
    message: str,
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text(content)
    code, _, stderr = command("run", "no-model", data_file, "-s", 0.5, "-o", out)
    assert code == 1 and message in stderr
    assert [path.read_text() for path in out.iterdir()] == [content]


@pytest.mark.parametrize("name", ["run", "sweep"])
def test_an_output_that_is_a_file_is_refused_at_once(
    tmp_path: Path, data_file: str, command: Callable[..., tuple[int, str, str]], name: str
) -> None:
    out = tmp_path / "out"
    out.write_text("mine")
    code, _, stderr = command(name, "no-model", data_file, "-s", 0.5, "-o", out)
    assert (
        code == 1 and stderr == f"error: --output {out}: {out} is a file, choose another folder\n"
    )
    assert out.read_text() == "mine"


def test_a_missing_core_is_one_line(
    tmp_path: Path,
    data_file: str,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "_core", None)
    monkeypatch.setattr(native, "_failure", "the native core could not be loaded.\n  do: build it")
    model = save_model(tmp_path / "model", head=True)
    code, _, stderr = command("run", model, data_file, "-s", 0.5, "-o", tmp_path / "out", *QUICK)
    assert code == 1
    assert stderr.splitlines()[-1] == "error: the native core could not be loaded. do: build it"


@pytest.mark.parametrize(
    "package", ["transformers", "matplotlib", "safetensors", "tqdm", "accelerate"]
)
def test_a_missing_package_is_one_line_before_any_work(
    tmp_path: Path,
    command: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    package: str,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(run, "load_task", lambda *_, **__: pytest.fail("it has begun"))
    options = ("-s", 0.5, "--recovery-epochs", 1, "-o", tmp_path / "out")
    code, _, stderr = command("run", "model", "data.csv", *options)
    assert code == 1
    assert stderr == (
        f"error: {package} is not installed; install it with `pip install '.[cli]'` in the folder "
        "of obert_kernels' source\n"
    )
