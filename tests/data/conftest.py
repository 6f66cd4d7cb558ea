"""A dataset that many tests read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from dataset_folder import write_folder

from pi0.data import Recording


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Recording]]:
    """A folder with three episodes in two shards, and what was recorded. Read only."""
    root = tmp_path_factory.mktemp("written") / "set"
    return root, write_folder(root)


@pytest.fixture
def folder(written: tuple[Path, list[Recording]], tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return Path(shutil.copytree(written[0], tmp_path / "set"))
