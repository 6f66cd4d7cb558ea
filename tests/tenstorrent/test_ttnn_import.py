"""What has to be there before the library is imported, tried without it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pi0.engines.tenstorrent import ttnn_import
from pi0.engines.tenstorrent.precision import PRESETS, for_arch
from pi0.engines.tenstorrent.stub_compiler import NAME, version_line
from pi0.errors import EngineError


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library's folder that wants sfpi 7.89.0, on a machine without one."""
    folder = tmp_path / "ttnn"
    (folder / "tt_metal").mkdir(parents=True)
    (folder / "tt_metal" / "sfpi-version").write_text("sfpi_version='7.89.0'\nsfpi_build='1050'\n")
    monkeypatch.setattr(ttnn_import, "package_folder", lambda: folder)
    monkeypatch.setattr(ttnn_import, "require_ttnn", lambda: None)
    monkeypatch.setattr(ttnn_import, "SFPI", tmp_path / "opt" / "sfpi")
    for name in ("TT_METAL_RUNTIME_ROOT", ttnn_import.EMULATOR):
        monkeypatch.delenv(name, raising=False)
    return folder


def install(sfpi: Path, says: str) -> None:
    compiler = sfpi / "compiler" / "bin" / NAME
    compiler.parent.mkdir(parents=True)
    compiler.write_text(f"#!/bin/sh\necho '{says}'\n")
    compiler.chmod(0o755)


def test_no_compiler(wheel: Path) -> None:
    with pytest.raises(EngineError, match="expected .* sfpi 7.89.0 in .*, found none. Install"):
        ttnn_import.require_compiler()


def test_another_compiler(wheel: Path) -> None:
    install(ttnn_import.SFPI, "riscv-tt-elf-g++ (tenstorrent/sfpi:7.8.0[9]) 15.1.0")
    with pytest.raises(EngineError, match=r"expected .* 7.89.0, found 'riscv.*7.8.0.*' at"):
        ttnn_import.require_compiler()


def test_a_compiler_that_does_not_start(wheel: Path) -> None:
    install(ttnn_import.SFPI, "x")
    (ttnn_import.SFPI / "compiler" / "bin" / NAME).write_text("no program")
    with pytest.raises(EngineError, match="7.89.0, found "):
        ttnn_import.require_compiler()


@pytest.mark.parametrize("beside_the_library", [False, True])
def test_the_compiler(wheel: Path, beside_the_library: bool) -> None:
    sfpi = wheel / "runtime" / "sfpi" if beside_the_library else ttnn_import.SFPI
    install(sfpi, version_line(wheel))
    ttnn_import.require_compiler()


def test_the_emulator_needs_none(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ttnn_import.EMULATOR, "1")
    ttnn_import.require_compiler()
    assert ttnn_import.has_device()


def test_warnings_go_to_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At level `warn`: `warning` is none to TTNN, which then says everything."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in ("TT_METAL_LOGGER_LEVEL", "TT_METAL_LOGGER_FILE"):
        monkeypatch.setenv(name, "")  # so that it is taken back
        monkeypatch.delenv(name)
    ttnn_import.log_warnings()
    assert os.environ["TT_METAL_LOGGER_LEVEL"] == "warn"
    file = Path(os.environ["TT_METAL_LOGGER_FILE"])
    assert file.parent.is_dir()
    assert file.is_relative_to(tmp_path)


def test_a_level_that_is_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TT_METAL_LOGGER_LEVEL", "debug")
    monkeypatch.delenv("TT_METAL_LOGGER_FILE", raising=False)
    ttnn_import.log_warnings()
    assert os.environ["TT_METAL_LOGGER_LEVEL"] == "debug"
    assert "TT_METAL_LOGGER_FILE" not in os.environ


@pytest.mark.parametrize("dtype", PRESETS)
def test_no_hifi4_with_float32_sums_on_wormhole(dtype: str) -> None:
    given = PRESETS[dtype]
    wormhole = for_arch(given, "WORMHOLE_B0")
    assert "HiFi4" not in {wormhole.linear, wormhole.attention, wormhole.rest}
    assert wormhole.rest == "HiFi3"
    assert for_arch(given, "BLACKHOLE") == given


def test_a_cache_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TT_METAL_LOGGER_LEVEL", raising=False)
    with pytest.raises(EngineError, match="expected a folder that can be written, found .*file/pi"):
        ttnn_import.log_warnings()
