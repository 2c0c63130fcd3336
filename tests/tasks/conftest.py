"""A tiny classifier on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tiny_text import save_model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its folder, which no test changes."""
    return save_model(tmp_path_factory.mktemp("whole") / "model", head=True)


@pytest.fixture
def folder(tmp_path: Path, whole: Path) -> Path:
    """A copy whose files a test may change."""
    return shutil.copytree(whole, tmp_path / "model")
