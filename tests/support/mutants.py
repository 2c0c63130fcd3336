"""Faults to plant in the CUDA kernels: where they are listed, and how one build holds them all.

``tests/cuda/mutants/*.txt`` list them, a file of csrc each.  A line is

    kind: source text around it {{right => wrong}} source text around it

Blanks and line breaks of the source count as one blank.  The text occurs exactly once in its file.
What ends with a semicolon is a statement, all else an expression.  A kind with a star is part of a
constant expression: it needs a build of its own.  A line below may say ``same:`` why no test can
notice a fault, or ``seen by:`` which test notices what execution on the host cannot show.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import host_cuda_build

ROOT = Path(__file__).parents[2]
LISTS = ROOT / "tests" / "cuda" / "mutants"

# In front of every source: which fault is switched on, and which have been passed.
SWITCH = """\
#pragma once
extern "C" {{
inline __attribute__((visibility("default"))) int obert_mutant = -1;
inline __attribute__((visibility("default"))) unsigned char obert_reached[{count}] = {{}};
}}
#define MUTANT(number) (obert_reached[number] = 1, obert_mutant == (number))
"""


class RefusedByCompiler(Exception):
    """A static assertion of the kernels does not hold with a fault."""


@dataclass(frozen=True)
class Mutant:
    file: str  # below csrc
    line: str  # as listed
    kind: str
    before: str  # source text, right and wrong, blanks as listed
    right: str
    wrong: str
    after: str
    constant: bool  # has to be compiled on its own
    same: str = ""
    seen_by: str = ""

    @property
    def is_statement(self) -> bool:
        return self.right.endswith(";")

    def __str__(self) -> str:
        return f"{self.file}: {self.line}"


def parse(path: Path, file: str) -> list[Mutant]:
    """The faults of one list."""
    found: list[Mutant] = []
    for line in path.read_text().splitlines():
        note = re.fullmatch(r"    (same|seen by): (.+)", line)
        if note:
            found[-1] = Mutant(**{**vars(found[-1]), note[1].replace(" ", "_"): note[2]})
            continue
        parts = re.fullmatch(r"(\w+)(\*?): (.*)\{\{(.+) => (.*?)\}\}(.*)", line)
        if parts is None:
            raise ValueError(f"{path}: not a fault: {line}")
        kind, star, *text = parts.groups()
        found.append(Mutant(file, line, kind, *text, constant=bool(star)))
    return found


def all_mutants() -> list[Mutant]:
    """Those of all lists, in a fixed order."""
    sources = {path.name: path for path in (ROOT / "csrc" / "pruning").rglob("*")}
    return [
        mutant
        for path in sorted(LISTS.glob("*.txt"))
        for mutant in parse(path, str(sources[path.stem].relative_to(ROOT / "csrc")))
    ]


@functools.cache
def normalised(source: str) -> tuple[str, list[int]]:
    """With single blanks, and where each of its characters stands in the source."""
    places = [m.start() for m in re.finditer(r"\S|\s+", source)] + [len(source)]
    return re.sub(r"\s+", " ", source), places


def span(mutant: Mutant, source: str) -> tuple[int, int]:
    """Where the right text stands in the source of the file."""
    normal, places = normalised(source)
    wanted = mutant.before + mutant.right + mutant.after
    count = normal.count(wanted)
    if count != 1:
        raise ValueError(f"{count} times in the source, not once: {mutant}")
    begin = normal.index(wanted) + len(mutant.before)
    return places[begin], places[begin + len(mutant.right)]


def planted(mutant: Mutant, source: str) -> str:
    """The source with one fault."""
    begin, end = span(mutant, source)
    return source[:begin] + mutant.wrong + source[end:]


def switched(mutants: Sequence[tuple[int, Mutant]], source: str) -> str:
    """The source with several faults, each behind the switch of its number."""
    spans: dict[tuple[int, int], list[tuple[int, Mutant]]] = {}
    for number, mutant in mutants:
        spans.setdefault(span(mutant, source), []).append((number, mutant))

    def render(begin: int, end: int, inner: list[tuple[int, int]]) -> str:
        """The text from begin to end, with what lies inside of it, the longest first."""
        text, at = "", begin
        while inner:
            first, rest = inner[0], inner[1:]
            inside = [other for other in rest if other[0] < first[1]]
            if any(other[1] > first[1] for other in inside):
                raise ValueError(f"faults that overlap: {spans[first][0][1]}")
            text += source[at : first[0]] + alternatives(first, render(*first, inside))
            at, inner = first[1], rest[len(inside) :]
        return text + source[at:end]

    def alternatives(place: tuple[int, int], right: str) -> str:
        for number, mutant in spans[place]:
            if mutant.is_statement:
                right = f"{{ if (MUTANT({number})) {{ {mutant.wrong} }} else {{ {right} }} }}"
            else:
                right = f"(MUTANT({number}) ? ({mutant.wrong}) : ({right}))"
        return right

    return render(0, len(source), sorted(spans, key=lambda place: (place[0], -place[1])))


def build(folder: Path, change: Callable[[str, str], str], extra: Sequence[str] = ()) -> Path:
    """Compile the kernels with every file as ``change(name below csrc, text)`` returns it.

    Args:
        folder: cache; the changed sources stay there until the next build.
    """
    copy = folder / "mutants"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    for file in sorted({mutant.file for mutant in all_mutants()}):
        path = copy / "csrc" / file
        path.write_text(change(file, path.read_text()))
    try:
        return host_cuda_build.build(folder, copy / "csrc", ["-w", *extra])
    except RuntimeError as error:
        if "static assertion failed" in str(error):
            raise RefusedByCompiler(str(error)) from error
        raise


class Switched:
    """A build that holds all faults but those of constant expressions."""

    def __init__(self, mutants: Sequence[Mutant], folder: Path) -> None:
        of_file: dict[str, list[tuple[int, Mutant]]] = {}
        for number, mutant in enumerate(mutants):
            if not mutant.constant:
                of_file.setdefault(mutant.file, []).append((number, mutant))
        header = folder / "mutant_switch.h"
        folder.mkdir(parents=True, exist_ok=True)
        header.write_text(SWITCH.format(count=len(mutants)))
        library = build(
            folder,
            lambda file, text: switched(of_file.get(file, []), text),
            ["-include", str(header), f"-DOBERT_MUTANTS={len(mutants)}"],
        )
        self.module: ModuleType = host_cuda_build.load(library)
        symbols = ctypes.CDLL(str(library))
        self._on = ctypes.c_int.in_dll(symbols, "obert_mutant")
        self._reached = (ctypes.c_ubyte * len(mutants)).in_dll(symbols, "obert_reached")

    def switch_on(self, number: int) -> None:
        """Plant one fault, and take out the one before; -1: none."""
        self._on.value = number

    def take_reached(self) -> set[int]:
        """The faults whose place has been passed since the last call."""
        found = {number for number, passed in enumerate(self._reached) if passed}
        ctypes.memset(self._reached, 0, len(self._reached))
        return found
