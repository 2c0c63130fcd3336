"""How results are written: a folder for each benchmark, JSON and Markdown for each machine.

A result is ``{"schema", "benchmark", "made_by": [{"command", "machine"}], "config", "outcomes"}``,
an outcome a flat row; the Markdown is made of it.
"""

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
    script = ["benchmarks/gpu.py"] if spec is None else ["-m", spec.name.removesuffix(".__main__")]
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


def made_by(document: Mapping[str, Any]) -> list[str]:
    """Command and machine, without a full stop; several where each did what was left to do."""
    found = []
    for run in document["made_by"]:
        about = run["machine"]
        used = [f"{about['threads']} threads"] if "threads" in about else []
        used += [f"{about['kernels']} kernels", f"torch {about['torch']}", about["date"]]
        found.append(", ".join([f"`{run['command']}` on {about['cpu']}", *used]))
    return found


def table(columns: Sequence[str], rows: Iterable[Iterable[object]]) -> list[str]:
    """Lines of a Markdown table."""
    return [line(columns), f"|{'---|' * len(columns)}", *map(line, rows)]


def line(cells: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def new_document(benchmark: str, config: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A result of this command on this machine, without outcomes.

    Args:
        config: what is measured, JSON-ready.
        more: further entries.
    """
    run = {"command": command(), "machine": machine()}
    return {
        "schema": SCHEMA, "benchmark": benchmark, "made_by": [run], "config": dict(config), **more,
        "outcomes": [],
    }  # fmt: skip


def write(
    document: Mapping[str, Any],
    markdown: Callable[[Mapping[str, Any]], str],
    name: str | None = None,
    results: Path = RESULTS,
) -> Path:
    """Write <benchmark>/<machine>.json and the .md that ``markdown`` makes of it; return the last.

    Args:
        name: in place of the machine's.
    """
    name = name or machine_name(document["made_by"][-1]["machine"])
    path = results / document["benchmark"] / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {path: to_json(document), path.with_suffix(".md"): markdown(document)}
    for file, text in texts.items():
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    return path.with_suffix(".md")


def to_json(document: Mapping[str, Any]) -> str:
    """JSON with a line for each outcome."""
    head = {name: value for name, value in document.items() if name != "outcomes"}
    rows = ",\n".join(f"  {json.dumps(outcome)}" for outcome in document["outcomes"])
    return f'{json.dumps(head, indent=1)[:-2]},\n "outcomes": [\n{rows}\n ]\n}}\n'
