"""The runner of accuracy experiments, without models: points, interrupted runs, partial tables."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks.accuracy import experiment, run


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
