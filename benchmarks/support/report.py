"""How results are written: a folder for each benchmark, JSON and Markdown for each machine."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.support.machine import machine

RESULTS = Path(__file__).parents[1] / "results"
SCHEMA = 1


def command() -> str:
    """The command that runs this process, from the repository's root."""
    spec = sys.modules["__main__"].__spec__
    script = ["benchmarks/gpu.py"] if spec is None else ["-m", spec.name]
    return shlex.join(["python", *script, *sys.argv[1:]])


def machine_name(about: Mapping[str, str]) -> str:
    """A file name for a machine: "epyc", "xeon", "epyc_avx2" where AVX-512 is not used.

    Args:
        about: what :func:`benchmarks.support.machine.machine` returns.
    """
    words = about["cpu"].lower().replace("(r)", "").split()
    known = [word for word in words if word in ("epyc", "xeon", "ryzen", "core")]
    name = known[0] if known else words[0]
    return name if about["kernels"] == "avx512" else f"{name}_{about['kernels']}"


def made_by(command: str, about: Mapping[str, str], *, kernels: bool = False) -> str:
    """The sentence on command and machine, without its full stop."""
    used = [f"{about['threads']} threads"] if "threads" in about else []
    used += [f"{about['kernels']} kernels"] if kernels else []
    return ", ".join(
        [f"`{command}` on {about['cpu']}", *used, f"torch {about['torch']}", about["date"]]
    )


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a Markdown table."""
    return [line(columns), f"|{'---|' * len(columns)}", *map(line, rows)]


def line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def write(
    benchmark: str,
    config: Mapping[str, Any],
    outcomes: Sequence[Mapping[str, Any]],
    markdown: Callable[[dict[str, Any]], str],
    *,
    calculated: bool = False,
    **more: Any,
) -> None:
    """Write results/<benchmark>/<machine>.json and the .md that ``markdown`` makes of it.

    Args:
        config: what was measured, JSON-ready.
        outcomes: a flat row each.
        calculated: nothing was measured; the file is named so.
        more: further entries of the document.
    """
    about: Any = "none, calculated" if calculated else machine()
    name = "calculated" if calculated else machine_name(about)
    document = {
        "schema": SCHEMA, "benchmark": benchmark, "command": command(), "machine": about,
        "config": dict(config), **more, "outcomes": list(outcomes),
    }  # fmt: skip
    path = RESULTS / benchmark / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(document), encoding="utf-8")
    text = markdown(document)
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(f"{text}\nwrote {path} and .md")


def to_json(document: Mapping[str, Any]) -> str:
    """JSON with a line for each outcome."""
    head = {name: value for name, value in document.items() if name != "outcomes"}
    rows = ",\n".join(f"  {json.dumps(outcome)}" for outcome in document["outcomes"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "outcomes": [\n{rows}\n ]\n}}\n'
