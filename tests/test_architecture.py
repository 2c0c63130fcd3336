"""Who may import whom, and what `import obert_kernels` loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from importlinter import cli

ROOT = Path(__file__).parents[1]


def test_imports_keep_to_the_layers(monkeypatch):
    """The contracts are those of pyproject.toml."""
    monkeypatch.chdir(ROOT)
    assert cli.lint_imports(cache_dir=None) == cli.EXIT_STATUS_SUCCESS


def test_a_wrong_import_breaks_a_contract(monkeypatch, tmp_path):
    """The same contracts, on a package in which a kernel's operator imports the command line."""
    package = tmp_path / "obert_kernels"
    for source in (ROOT / "obert_kernels").rglob("*.py"):
        target = package / source.relative_to(ROOT / "obert_kernels")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(source.read_text())
    with (package / "ops" / "gram.py").open("a") as stream:
        stream.write("import transformers\nfrom ..tasks import evaluate\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    code = "from importlinter import cli; exit(cli.lint_imports(cache_dir=None))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 1, found.stdout + found.stderr
    for broken in ("Data flows one way", "Models, texts, tables and plots stay outside"):
        assert f"{broken}" in found.stdout.split("Broken contracts")[1]


def test_the_import_loads_torch_and_little_else():
    """So that it takes little more time than `import torch`."""
    code = """
import sys, torch
before = set(sys.modules)
import obert_kernels
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(*sorted(new - set(sys.stdlib_module_names)))
"""
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["obert_kernels"]
