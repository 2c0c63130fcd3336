"""The runner of accuracy experiments, without models: points, interrupted runs, partial tables."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks.accuracy import experiment, prune_once, run, tables
from obert_kernels import PruneReport, ReconstructionConfig


def test_points_of_an_entry():
    entry = {
        "seed": [0, 1],
        "way": [{"selection": "magnitude"}, {"selection": "greedy", "damping": [1e-8, "auto"]}],
        "sparsity": 0.5,
    }
    found = list(experiment.expand(entry))
    assert len(found) == 6
    assert found[:3] == [
        {"seed": 0, "sparsity": 0.5, "selection": "magnitude"},
        {"seed": 0, "sparsity": 0.5, "selection": "greedy", "damping": 1e-8},
        {"seed": 0, "sparsity": 0.5, "selection": "greedy", "damping": "auto"},
    ]
    with pytest.raises(SystemExit, match="no experiment nothing: give a file, or one of dampings"):
        experiment.load("nothing")


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """Runs the command; ``stop_after`` outcomes it is interrupted."""
    monkeypatch.setattr(run, "load_plugin", lambda path: None)

    def command(*arguments, stop_after=None):
        seen = []

        def measure(wanted, known, work, record):
            for point in wanted:
                if len(seen) == stop_after:
                    raise KeyboardInterrupt
                seen.append(point)
                record(point, {"dense": 0.9, "test_accuracy": 0.8, "dev_accuracy": 0.8})

        monkeypatch.setattr(run, "measure", measure)
        options = ["--results", str(tmp_path), "--work", str(tmp_path / "work")]
        monkeypatch.setattr(sys, "argv", ["run", *arguments, *options])
        if stop_after is None:
            run.main()
        else:
            with pytest.raises(KeyboardInterrupt):
                run.main()
        return seen

    return command


def test_an_interrupted_run_goes_on(measured, tmp_path):
    first = measured("one_shot", "--only", "data=trec", "seed=0", stop_after=20)
    second = measured("one_shot", "--only", "data=trec", "seed=0")
    everything = [
        {**experiment.load("one_shot")["defaults"], **point}
        for point in experiment.points(experiment.load("one_shot"))
        if (point["data"], point["seed"]) == ("trec", 0)
    ]
    assert [*first, *second] == everything and len(first) == 20
    assert measured("one_shot", "--only", "data=trec", "seed=0") == []
    (path,) = (tmp_path / "one_shot").glob("*.json")
    document = json.loads(path.read_text())
    assert len(document["outcomes"]) == len(everything) and len(document["made_by"]) == 1
    assert "| magnitude | 80.0 | 80.0 | 80.0 | 80.0 | 80.0 |" in path.with_suffix(".md").read_text()
    assert len(measured("one_shot", "--only", "data=trec", "seed=0", "--anew")) == len(everything)


def test_a_repeated_point_is_measured_as_often(measured, monkeypatch):
    """Whole runs have ours before and after the reference."""
    monkeypatch.setattr(
        run, "measure_in_processes",
        lambda wanted, arguments, record: run.measure(wanted, [], None, lambda point, row: record(
            point, {"test_accuracy": 0.8, "seconds": 2.0, "peak_gib": 1.0})),
    )  # fmt: skip
    ways = [point["selection"] for point in measured("whole_runs", "--only", "seed=1")]
    assert ways[:3] == ["greedy", "reference", "greedy"]
    assert measured("whole_runs", "--only", "seed=1") == []


def test_another_dense_model_is_refused():
    where = {"model": "m", "data": "mr", "seed": 0}
    run.check_same([{**where, "dense": 0.87654}], where, 0.87651)
    with pytest.raises(SystemExit, match=r"has 0\.8600, that of the outcomes there are 0\.8765"):
        run.check_same([{**where, "dense": 0.8765}], where, 0.86)


def test_changed_experiments_go_elsewhere(measured, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run", "one_shot", "--set", "texts=64"])
    with pytest.raises(SystemExit):
        run.main()
    assert "give --results, another folder" in capsys.readouterr().err
    seen = measured("one_shot", "--set", "texts=64", "--only", "data=trec", "seed=1")
    assert {point["texts"] for point in seen} == {64}
    with pytest.raises(SystemExit, match="another config or --set"):
        measured("one_shot", "--only", "data=trec", "seed=1")


POINT = {
    "selection": "greedy", "pattern": "unstructured", "texts": 64, "texts_per_grad": 16,
    "sparsity": 0.5,
}  # fmt: skip


def test_points_are_fitted_as_they_say():
    assert run.configuration(POINT).fit is None, "as all results from before"
    ways = {"none": None, "auto": "auto"}
    for said, expected in ways.items():
        assert run.configuration({**POINT, "reconstruction": said}).reconstruction == expected
    entry = {**POINT, "way": [{"reconstruction": {"ridge": 0.1}}, {"reconstruction": "auto"}]}
    first, second = map(run.configuration, experiment.expand(entry))
    assert (first.reconstruction, second.reconstruction) == (
        ReconstructionConfig(ridge=0.1), "auto",
    )  # fmt: skip
    sparsegpt = {"reconstruction": "auto", "selection": "sparsegpt"}
    for wrong, message in (
        ({"reconstruction": "yes"}, '"none", "auto" or a dictionary'),
        (sparsegpt, "sparsegpt is measured without"),
    ):
        with pytest.raises(SystemExit, match=message):
            experiment.reconstruction({**POINT, **wrong})


@pytest.mark.parametrize(
    ("point", "texts", "calibration"),
    [
        ({"selection": "magnitude"}, None, False),
        ({"selection": "magnitude", "reconstruction": "auto"}, [4, 16, 1], True),
        ({"selection": "diagonal", "damping": 1e-7}, [4, 16, 1], False),
        ({"selection": "diagonal", "damping": 1e-7, "reconstruction": {"ridge": 0.1}}, [4, 16, 1],
         True),
        ({"selection": "greedy", "damping": "auto"}, [4, 16, 1], True),
    ],
)  # fmt: skip
def test_what_one_pruning_is_given(monkeypatch, point, texts, calibration):
    given = {}

    def pruned(model, batches, sparsity, **options):
        given.update(options, batches=batches)
        return SimpleNamespace(report=PruneReport([], {}, {"reconstruction": 2.0}, {}))

    monkeypatch.setattr(prune_once, "prune", pruned)
    monkeypatch.setattr(prune_once, "loss_and_batches", lambda *_: (None, lambda *m: list(m)))
    model = torch.nn.Linear(2, 2)
    task = SimpleNamespace(model=model, damping_batches=lambda: ["held back"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with prune_once.prune_once(task, {**POINT, **point}) as row:
        torch.nn.init.ones_(model.bias)
    assert given["batches"] == texts and ("calibration" in given) == calibration
    assert given["reconstruction"] == experiment.reconstruction({**POINT, **point})
    assert row["reconstruction_seconds"] == 2.0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_runs_with_and_without_a_fit_are_told_apart():
    common = {"model": "m", "data": "mr", "test_accuracy": 0.8, "seconds": 2.0, "peak_gib": 1.0}
    rows = [
        {**POINT, **common, "seed": seed, **fit}
        for seed in (0, 1)
        for fit in ({}, {"reconstruction": "auto", "reconstruction_seconds": 0.5})
    ]
    lines = tables.whole_runs(rows, {})
    assert [line.split(" |")[0] for line in lines if line.startswith("| ours")] == [
        "| ours", "| ours + fit",
    ]  # fmt: skip
    (header,) = [line for line in lines if line.startswith("| method")]
    assert "selection s | fit s | whole s" in header
    without = tables.whole_runs([row for row in rows if "reconstruction" not in row], {})
    assert not any("fit" in line for line in without)
