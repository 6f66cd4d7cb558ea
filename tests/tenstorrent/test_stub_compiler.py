"""The stand-in for Tenstorrent's compiler, as far as it needs neither TTNN nor a compiler."""

from __future__ import annotations

import os
from pathlib import Path

from pi0.engines.tenstorrent.stub_compiler import LINKED, NAME, make_root


def test_root_is_links_and_a_compiler(tmp_path: Path) -> None:
    root = make_root(tmp_path / "wheel", tmp_path / "root")
    for name in LINKED:
        assert (root / name).readlink() == tmp_path / "wheel" / name
    compiler = root / "runtime" / "sfpi" / "compiler" / "bin" / NAME
    assert os.access(compiler, os.X_OK)
    make_root(tmp_path / "other", root)
    assert {(root / name).readlink().parents[name.count("/")] for name in LINKED} == {
        tmp_path / "other"
    }


def test_root_in_use_is_left_alone(tmp_path: Path) -> None:
    """Another dry run may be reading through the links: none is removed and made again."""
    before, after = (
        {name: (tmp_path / "root" / name).lstat().st_ctime_ns for name in LINKED}
        for _ in (make_root(tmp_path / "wheel", tmp_path / "root") for _ in range(2))
    )
    assert before == after
