"""A folder has one writer at a time; whoever else asks is told so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pi0.data.lock import locked
from pi0.errors import Pi0Error

TAKEN = "expected a folder that no other process is writing into"
HOLD = "import sys, time; from pathlib import Path; from pi0.data.lock import locked\n"
HOLD += "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"


def test_one_at_a_time_and_nothing_is_left(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with locked(folder):
        with pytest.raises(Pi0Error, match=TAKEN), locked(folder):
            pass
        assert not list(folder.iterdir())
    assert not (tmp_path / "new").exists()
    with locked(folder):
        (folder / "written").touch()
    with locked(folder):
        assert (folder / "written").exists()


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(Pi0Error, match=TAKEN), locked(tmp_path):
            pass
        process.kill()
        process.wait()
        with locked(tmp_path):
            pass


def test_a_folder_that_is_removed_meanwhile_leaves_none_above(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    with locked(folder):
        folder.rmdir()
    assert not (tmp_path / "new").exists()


def test_who_comes_too_late_removes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both saw no folder; the other one made it first, and has not written into it yet."""
    folder = tmp_path / "folder"
    with locked(folder):
        exists = Path.exists
        monkeypatch.setattr(Path, "exists", lambda path: path != folder and exists(path))
        with pytest.raises(Pi0Error, match=TAKEN), locked(folder):
            pass
        assert folder.is_dir()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(Pi0Error, match="expected a folder, or a place wher"), locked(path):
            pass
