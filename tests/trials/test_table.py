"""The table of trials: what is best, and a file that survives being torn."""

from __future__ import annotations

import csv
import os
from dataclasses import replace

import pytest
from tiny import GREEDY, outcome

from obert_kernels.trials.outcome import Scores, best_by_target
from obert_kernels.trials.table import (
    COLUMNS,
    TrialTable,
    check_basis,
    format_table,
    write_basis,
)


def test_best_by_accuracy_then_by_loss():
    worse = outcome(dev_accuracy=0.8, dev_loss=0.1, test_accuracy=1.0)
    tied = outcome(replace(GREEDY, damping=1.0), dev_loss=0.31)
    best = outcome(replace(GREEDY, damping=2.0), dev_loss=0.29)
    other = outcome(target=0.9, dev_accuracy=0.1)
    failed = outcome(target=0.9, dev_accuracy=None, dev_loss=None, error="not definite")
    outcomes = [other, failed, worse, tied, best]
    assert best_by_target(outcomes) == {0.5: best, 0.9: other}
    lines = format_table(outcomes).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[:2] + row[7:9] for row in cells[2:]] == [
        ["50.0%", "*", "2", "90.0%"],
        ["50.0%", "", "1", "90.0%"],
        ["50.0%", "", "0.001", "80.0%"],
        ["90.0%", "*", "0.001", "10.0%"],
        ["90.0%", "", "0.001", "failed"],
    ]


def test_outcomes_come_back_from_the_file(tmp_path):
    table = TrialTable(tmp_path / "sweep.csv", GREEDY)
    written = [
        outcome(
            damping_used=1 / 3, predicted_increase=1e-17, reconstruction_seconds=0.1,
            trial_seconds=2.5,
        ),
        outcome(replace(GREEDY, selection="magnitude", update="none"), test_accuracy=0.1 + 0.2),
        outcome(
            replace(GREEDY, damping="auto"), sparsity=None, dev_accuracy=None, dev_loss=None,
            test_accuracy=None, error='block 3, "x", is bad',
        ),
    ]  # fmt: skip
    for one in written:
        table.append(one)
    assert TrialTable(tmp_path / "sweep.csv", GREEDY).outcomes == table.outcomes == written
    table.append(written[0])  # as if by a second command
    assert TrialTable(tmp_path / "sweep.csv", GREEDY).outcomes == written
    with (tmp_path / "sweep.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["texts"] for row in rows] == ["8", "", "8", "8"]
    assert tuple(rows[0]) == COLUMNS


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_a_torn_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "sweep.csv"
    table = TrialTable(path, GREEDY)
    for damping in (1.0, 2.0):
        table.append(outcome(replace(GREEDY, damping=damping)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    again = TrialTable(path, GREEDY)
    assert again.outcomes == table.outcomes[:1]
    again.append(table.outcomes[1])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("torn", ["", "greedy,joint,8"])
def test_a_table_from_before_a_column_was_added_goes_on(tmp_path, torn):
    path = tmp_path / "sweep.csv"
    TrialTable(path, GREEDY).append(outcome(selection_seconds=3.0, trial_seconds=2.5))
    with path.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    del row["reconstruction_seconds"]
    path.write_text("\n".join((",".join(row), ",".join(row.values()), torn)))
    table = TrialTable(path, GREEDY)
    known = [outcome(selection_seconds=3.0, trial_seconds=2.5)]
    assert table.outcomes == known
    table.append(outcome(target=0.75, reconstruction_seconds=1.5, trial_seconds=4.5))
    assert TrialTable(path, GREEDY).outcomes == [*known, outcome(target=0.75, trial_seconds=4.5)]
    lines = path.read_text().splitlines()
    assert lines[0] == ",".join(row) and {line.count(",") for line in lines} == {len(row) - 1}


def test_a_torn_header_is_dropped(tmp_path):
    path = tmp_path / "sweep.csv"
    path.write_text("selection,upd")
    table = TrialTable(path, GREEDY)
    table.append(outcome())
    assert TrialTable(path, GREEDY).outcomes == [outcome()]


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "sweep.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="other columns"):
        TrialTable(path, GREEDY)
    path.write_text("a,b\n1,2")
    with pytest.raises(ValueError, match="other columns"):
        TrialTable(path, GREEDY)
    assert path.read_text() == "a,b\n1,2", "no torn line of ours"
    path.unlink()
    TrialTable(path, GREEDY).append(outcome())
    path.write_text(path.read_text().replace("0.9", "much"))
    with pytest.raises(ValueError, match=r"line 2 of .* cannot be read"):
        TrialTable(path, GREEDY)


@pytest.mark.parametrize(
    ("before", "after"), [("0.9", "much"), ("0.9", "nan"), ("0.9", "7.5"), ("0.9", "9" * 200_000)]
)
def test_hostile_lines_are_named(tmp_path, before, after):
    path = tmp_path / "sweep.csv"
    TrialTable(path, GREEDY).append(outcome())
    path.write_text(path.read_text().replace(before, after))
    with pytest.raises(ValueError, match=r"line \d of .*sweep\.csv cannot be read"):
        TrialTable(path, GREEDY)


@pytest.mark.parametrize("content", [b"\0", b"\xff\xfe", b"x" * 200_000, b"\n\n"])
def test_hostile_tables_are_refused(tmp_path, content):
    path = tmp_path / "sweep.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="choose another --output"):
        TrialTable(path, GREEDY)
    assert path.read_bytes() == content


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "sweep.csv")
    os.mkfifo(tmp_path / "sweep.json")
    with pytest.raises(ValueError, match="is no file"):
        TrialTable(tmp_path / "sweep.csv", GREEDY)
    with pytest.raises(ValueError, match="is not of a sweep"):
        check_basis(tmp_path, {})


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"basis": 1}', '{"basis": {}}', '{"basis": {}, "dense": {}}', "[" * 99999,
     '{"basis": {}, "dense": {"dev_accuracy": NaN, "dev_loss": 1, "test_accuracy": 1}}',
     '{"basis": {}, "dense": {"dev_accuracy": null, "dev_loss": null, "test_accuracy": 1}}'],
)  # fmt: skip
def test_hostile_bases_are_refused(tmp_path, content):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(ValueError, match=r"sweep\.json is not of a sweep: choose another"):
        check_basis(tmp_path, {})


def test_a_basis_comes_back(tmp_path):
    dense = {"dev_accuracy": 0.5, "dev_loss": float("nan"), "test_accuracy": 0.25}
    write_basis(tmp_path, {"seed": 1}, dense=dense)
    known = check_basis(tmp_path, {"seed": 1})
    assert known["dense"] == Scores(0.5, None, 0.25)
