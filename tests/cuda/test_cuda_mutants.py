"""The lists of faults in mutants/: each can still be planted; mutants/run.py runs them."""

from __future__ import annotations

import re
from pathlib import Path

import mutants
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def listed() -> list[mutants.Mutant]:
    return mutants.all_mutants()


def sources() -> dict[str, str]:
    folder = ROOT / "csrc" / "pruning"
    paths = [*(folder / "cuda").iterdir(), folder / "breakdown.h"]
    return {str(path.relative_to(ROOT / "csrc")): path.read_text() for path in paths}


def test_every_fault_has_its_place(listed):
    text = sources()
    for mutant in listed:
        assert mutants.planted(mutant, text[mutant.file]) != text[mutant.file], mutant
    assert len(listed) >= 200
    assert len({str(mutant) for mutant in listed}) == len(listed), "one is listed twice"


def test_every_kernel_and_every_barrier_is_in_the_lists(listed):
    barrier = re.compile(r"(?:\w+::sync|__syncthreads|__syncwarp)\(\w*(?:\(\))?\);")
    for file, text in sources().items():
        removed = [mutants.span(m, text) for m in listed if m.file == file and not m.wrong]
        assert any(mutant.file == file for mutant in listed), f"{file} has no faults"
        for found in barrier.finditer(text):
            gone = any(begin <= found.start() and found.end() <= end for begin, end in removed)
            assert gone, f"{file}: {text[found.start() - 60 : found.end()]!r} is in no list"


def test_a_fault_that_has_lost_its_place_is_an_error(tmp_path):
    path = tmp_path / "greedy.cu.txt"
    path.write_text("bound: for (int i = 0; {{i < n => i <= n}}; ++i)\n    same: no\n")
    (mutant,) = mutants.parse(path, "greedy.cu")
    assert mutant.same == "no" and mutant.kind == "bound" and not mutant.constant
    line = "for (int i = 0;\n     i < n; ++i)"
    assert mutants.planted(mutant, line) == "for (int i = 0;\n     i <= n; ++i)"
    switched = "for (int i = 0;\n     (MUTANT(7) ? (i <= n) : (i < n)); ++i)"
    assert mutants.switched([(7, mutant)], line) == switched
    for text, count in (("", 0), (line + line, 2)):
        with pytest.raises(ValueError, match=rf"{count} times in the source, not once: greedy.cu"):
            mutants.planted(mutant, text)
    path.write_text("bound: for (int i = 0; i < n; ++i)\n")
    with pytest.raises(ValueError, match="not a fault"):
        mutants.parse(path, "greedy.cu")


@pytest.mark.parametrize(("said", "expected"), [
    ("error: static assertion failed: too large", mutants.RefusedByCompiler),
    ("error: expected ';'", RuntimeError),
])  # fmt: skip
def test_a_static_assertion_notices_a_fault(monkeypatch, tmp_path, said, expected):
    def refuse(*arguments: object) -> Path:
        raise RuntimeError(said)

    monkeypatch.setattr(mutants.host_cuda_build, "build", refuse)
    with pytest.raises(expected, match=said[:20]):
        mutants.build(tmp_path, lambda file, text: text)
