"""Committed results, the Markdown made of them, and the tables of README and docs that show them.

A table there is preceded by ``<!-- results: results/<benchmark>/<machine>.json -->``, which may
name several files.  The numbers of a row must stand, in their order and with their rounding, in one
line or in two of what is made of those files: a row or a column of a table, a sentence, or, of a
measurement of kernels, an outcome.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
from collections.abc import Iterator
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.accuracy import tables
from benchmarks.accuracy.experiment import FOLDER, key, load, points
from benchmarks.support.report import SCHEMA, to_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = sorted(RESULTS.glob("*/*.json"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e-\d+)?")
COMMENT = re.compile(r"<!-- results: (.+?) -->")
# What a way is called on a page, and what in the results.
WAYS = {
    "dense": "dense", "magnitude": "magnitude", "Wanda": "wanda", "obert_kernels": "ours",
    "oBERT": "obert", "reference": "reference",
}  # fmt: skip


# ---- results -----------------------------------------------------------------------


def markdown(document: dict) -> str:
    benchmark = document["benchmark"]
    if (FOLDER / f"{benchmark}.json").is_file():
        return tables.markdown(document)
    module = "cpu" if benchmark.startswith("kernels_") else benchmark
    return importlib.import_module(f"benchmarks.kernels.{module}").markdown(document)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_a_result_has_the_common_shape_and_its_markdown(path):
    text = path.read_text(encoding="utf-8")
    document = json.loads(text)
    assert document["schema"] == SCHEMA
    assert document["benchmark"] == path.parent.name
    assert all({"command", "machine"} <= run.keys() for run in document["made_by"])
    assert document["config"] is not None and document["outcomes"]
    assert text == to_json(document)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == markdown(document)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_outcomes_are_points_of_their_experiment(path):
    experiment = load(path.stem)
    axes = {name for point in points(experiment) for name in point}
    asked = {key(axes, point) for point in points(experiment)}
    found = [json.loads(file.read_text()) for file in (RESULTS / path.stem).glob("*.json")]
    assert found
    for document in found:
        assert document["config"] == experiment["defaults"]
        assert {key(axes, row) for row in document["outcomes"]} <= asked


# ---- the tables of a page ----------------------------------------------------------


class Line(NamedTuple):
    """Numbers that belong together, and the words they stand under.

    Attributes:
        measured: an outcome of a kernel, ``text`` says which.
    """

    text: str
    values: list[Decimal]
    measured: bool = False


def cells_of(line: str) -> list[str]:
    return [cell.strip(" *") for cell in line.strip().strip("|").split("|")]


def numbers(text: str) -> list[Decimal]:
    return [Decimal(found.replace(",", "")) for found in NUMBER.findall(text)]


@functools.cache
def lines_of(name: str) -> list[Line]:
    """What is made of a result."""
    path = ROOT / "benchmarks" / name
    assert path.is_file(), f"no {name} under benchmarks/"
    document = json.loads(path.read_text(encoding="utf-8"))
    found = []
    for row in document["outcomes"] if document["benchmark"].startswith("kernels_") else []:
        measured = [Decimal(repr(row[name])) for name in ("reference_s", "ours_s", "ratio")]
        found.append(Line(row["what"], measured, True))
        found.append(Line(f"{row['what']} reference", measured[:1], True))
    if found:
        return found
    block: list[list[str]] = []
    for text in [*markdown(document).splitlines(), ""]:
        found.append(Line(text.lower(), numbers(text)))
        if text.startswith("|"):
            block.append(cells_of(text))
            continue
        for column in list(zip(*block, strict=False))[1:]:
            found.append(Line(column[0], numbers(" ".join(column[2:]))))
        block = []
    return found


class Figure(NamedTuple):
    """A number on a page.

    Attributes:
        scale: power of ten of its unit.
        spread: has a standard deviation beside it, or is one.
    """

    value: Decimal
    scale: int
    spread: bool

    def shows(self, exact: Decimal) -> bool:
        exact = exact.scaleb(self.scale)
        step = Decimal(1).scaleb(self.value.as_tuple().exponent)
        ways = (ROUND_HALF_EVEN, ROUND_HALF_UP)
        return any(exact.quantize(step, way) == self.value for way in ways)


def figures(cells: list[str]) -> list[list[Figure]]:
    """Those of each cell that has any; a first cell is a name, unless it is of the dense model."""
    shown = cells if cells[0].startswith("dense") else cells[1:]
    found = [
        [Figure(n, 3 if cell.endswith("ms") else 0, "±" in cell) for n in numbers(cell)]
        for cell in shown
    ]
    return [some for some in found if some]


def stands_in(cells: list[list[Figure]], line: Line) -> bool:
    """In this order, others between cells, but none between the numbers of a cell."""
    at = 0
    for figures in cells:
        while not shown_at(figures, line.values[at : at + len(figures)]):
            at += 1
            if at >= len(line.values):
                return False
        at += len(figures)
    return True


def shown_at(figures: list[Figure], values: list[Decimal]) -> bool:
    pairs = zip(figures, values, strict=False)
    return len(values) == len(figures) and all(figure.shows(value) for figure, value in pairs)


def is_named(*lines: Line) -> bool:
    """Whether what they are of stands before their numbers."""
    return any(line.measured or line.text.startswith("|") for line in lines)


def name_of(line: Line) -> str:
    return line.text if line.measured else cells_of(line.text)[0]


def is_shown(cells: list[str], lines: list[Line]) -> bool:
    """Whether one line has the numbers of a row, or one those of its first cells and another the
    rest; of kernels the same kind of outcome."""
    wanted = figures(cells)
    label = " ".join([cells[0], *(cell for cell in cells if not numbers(cell))])
    way = next((theirs for ours, theirs in WAYS.items() if ours in label), "")
    inverse = "given" not in label
    named = [
        line
        for line in lines
        if (inverse == line.text.startswith("gradients to inverse") if line.measured else True)
        and (way in line.text or (line.measured and way == "obert"))
    ]

    def is_span(some: list[list[Figure]]) -> bool:
        return len(some[0]) > 1 and not some[0][0].spread

    def found(some: list[list[Figure]]) -> list[Line]:
        enough = len(some) > 1 or is_span(some) or way in ("dense", "reference")
        return [line for line in named if stands_in(some, line)] if enough else []

    whole = [line for line in named if stands_in(wanted, line)]
    return bool(whole) or any(
        name_of(first) == name_of(second)
        or not is_named(first, second)
        or (is_span(wanted) and not (first.measured or second.measured))
        for i in range(1, len(wanted))
        for first in found(wanted[:i])
        for second in found(wanted[i:])
        if first is not second
    )


def shown_tables(text: str) -> Iterator[tuple[list[str], list[list[str]]]]:
    """Files and rows of each table with a comment."""
    names: list[str] = []
    rows: list[list[str]] = []
    for line in [*text.splitlines(), "end"]:
        if line.startswith("|"):
            rows.append(cells_of(line))
            continue
        if rows and names:
            yield names, rows[2:]
            names = []
        rows = []
        named = [name for found in COMMENT.findall(line) for name in found.split()]
        assert named or not line or not names, f"no table after {names}"
        names += named


def wrong_rows(text: str) -> list[str]:
    """Rows with a number that is not in the results they name."""
    return [
        " | ".join(row)
        for names, rows in shown_tables(text)
        for row in rows
        if not is_shown(row, [line for name in names for line in lines_of(name)])
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_figures_of_a_page_are_in_the_results(page):
    assert wrong_rows(page.read_text(encoding="utf-8")) == []


def test_the_readme_shows_accuracy_and_speed():
    shown = {name for names, _ in shown_tables(PAGES[0].read_text("utf-8")) for name in names}
    assert any("/reconstruction/" in name for name in shown)
    assert any("/kernels_" in name for name in shown)


def changed_by_one(text: str) -> Iterator[str]:
    """The page with one figure of a checked table changed in its last digit."""
    for _, rows in shown_tables(text):
        for cells in rows:
            line = next(x for x in text.splitlines() if x.startswith("|") and cells_of(x) == cells)
            start = 0 if cells[0].startswith("dense") else line.index("|", 1)
            for found in NUMBER.finditer(line, start):
                old = Decimal(found[0].replace(",", ""))
                new = old + Decimal(1).scaleb(old.as_tuple().exponent)
                yield text.replace(line, f"{line[: found.start()]}{new}{line[found.end() :]}")


def test_a_changed_figure_is_found():
    text = PAGES[0].read_text(encoding="utf-8")
    changed = list(changed_by_one(text))
    assert len(changed) > 20
    assert [page for page in changed if not wrong_rows(page)] == []


def test_a_missing_file_is_found():
    text = (
        PAGES[0].read_text(encoding="utf-8").replace("reconstruction/xeon", "reconstruction/none")
    )
    with pytest.raises(AssertionError, match="no results/reconstruction/none"):
        wrong_rows(text)
    with pytest.raises(AssertionError, match="no table after"):
        wrong_rows("<!-- results: results/one_shot/epyc.json -->\n\nwords\n")
