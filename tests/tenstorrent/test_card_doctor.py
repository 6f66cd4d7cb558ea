"""What the doctor of cards says, of machines that are folders."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pi0.cli.ttnn import app
from pi0.engines.tenstorrent import card_doctor, device, ttnn_import
from pi0.engines.tenstorrent.backend import Grid
from pi0.engines.tenstorrent.card_doctor import HUGEPAGES, Check, examine
from pi0.errors import EngineError

SOUND = {
    "sys/module/tenstorrent/version": "2.3.0",
    "dev/tenstorrent/0": "",
    "sys/class/tenstorrent/tenstorrent!0/tt_card_type": "p150a",
    "sys/class/tenstorrent/tenstorrent!0/tt_fw_bundle_ver": "19.5.0.0",
    HUGEPAGES: "1",
    "proc/mounts": "hugetlbfs /dev/hugepages-1G hugetlbfs rw,relatime,mode=777,pagesize=1024M 0 0",
    "proc/driver/tenstorrent/0/pids": "",
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with a card, library and compiler, all as they should be."""
    for name in (ttnn_import.SIMULATOR, ttnn_import.EMULATOR):
        monkeypatch.delenv(name, raising=False)
    for name in ("require_ttnn", "require_compiler"):
        monkeypatch.setattr(ttnn_import, name, lambda: None)
    monkeypatch.setattr(ttnn_import, "sfpi_wanted", lambda: "7.89.0")
    for path, text in SOUND.items():
        write(tmp_path, path, text)
    return tmp_path


def write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(f"{text}\n")


def look(root: Path) -> dict[str, Check]:
    return {check.name: check for check in examine(root, open_device=False)}


def test_nothing_to_mend(root: Path) -> None:
    checks = look(root)
    assert set(checks) == {
        *("driver", "card 0", "firmware 0", "hugepages", "library", "compiler", "device")
    }
    assert {check.status for check in checks.values()} == {"ok", "skipped"}
    assert checks["device"].status == "skipped"
    assert not any(check.remedy for check in checks.values())


@pytest.mark.parametrize(
    ("path", "text", "name", "status", "remedy"),
    [
        ("sys/module/tenstorrent/version", "1.34.0", "driver", "error", "2.0.0 or newer"),
        ("sys/class/tenstorrent/tenstorrent!0/tt_fw_bundle_ver", "18.4.0", "firmware 0", "error",
         "18.5.0 or newer"),
        ("sys/class/tenstorrent/tenstorrent!0/tt_fw_bundle_ver", "80.18.3.0", "firmware 0", "error",
         "tt-flash"),
        ("sys/class/tenstorrent/tenstorrent!0/tt_fw_bundle_ver", "19.4.2", "firmware 0", "warning",
         "p150-13x10"),
        ("sys/class/tenstorrent/tenstorrent!0/tt_fw_bundle_ver", "", "firmware 0", "warning",
         "tt-smi"),
        (HUGEPAGES, "0", "hugepages", "error", "tenstorrent-hugepages.service"),
    ],
)  # fmt: skip
def test_each_fault_has_its_remedy(
    root: Path, path: str, text: str, name: str, status: str, remedy: str
) -> None:
    write(root, path, text)
    found = look(root)[name]
    assert found.status == status
    assert remedy in found.remedy


def test_wormhole_takes_older_firmware(root: Path) -> None:
    card = "sys/class/tenstorrent/tenstorrent!0"
    write(root, f"{card}/tt_card_type", "n150")
    write(root, f"{card}/tt_fw_bundle_ver", "18.3.0")
    assert look(root)["firmware 0"].status == "ok"


@pytest.mark.parametrize(
    ("kind", "status"), [("DMA", "ok"), ("DMA-FQ", "ok"), ("identity", "error"), ("", "error")]
)
def test_an_iommu_that_translates_replaces_hugepages(root: Path, kind: str, status: str) -> None:
    """One that lets addresses pass is there as well, and does not."""
    write(root, HUGEPAGES, "0")
    (root / "sys/class/iommu/dmar0").mkdir(parents=True)
    write(root, "sys/class/tenstorrent/tenstorrent!0/device/iommu_group/type", kind)
    assert look(root)["hugepages"].status == status


def test_hugepages_nobody_can_reach(root: Path) -> None:
    write(root, "proc/mounts", "tmpfs /tmp tmpfs rw 0 0")
    found = look(root)["hugepages"]
    assert (found.status, found.found) == ("error", "1 of 1 GB, not mounted at /dev/hugepages-1G")


def test_no_driver_and_no_card(root: Path) -> None:
    (root / "sys/module/tenstorrent/version").unlink()
    (root / "dev/tenstorrent/0").unlink()
    checks = look(root)
    assert checks["driver"].status == checks["card"].status == "error"
    assert "lspci" in checks["card"].remedy


def test_grayskull_is_no_board_of_ttnn(root: Path) -> None:
    write(root, "sys/class/tenstorrent/tenstorrent!0/tt_card_type", "e150")
    assert look(root)["card 0"].status == "error"
    assert "n150, n300" in look(root)["card 0"].remedy


def test_each_card_is_looked_at(root: Path) -> None:
    """A second one, without a hugepage and with its own firmware."""
    write(root, "dev/tenstorrent/1", "")
    write(root, "sys/class/tenstorrent/tenstorrent!1/tt_card_type", "n150")
    write(root, "sys/class/tenstorrent/tenstorrent!1/tt_fw_bundle_ver", "18.2.0")
    checks = look(root)
    assert checks["card 1"].found == "n150"
    assert (checks["firmware 0"].status, checks["firmware 1"].status) == ("ok", "error")
    assert (checks["hugepages"].status, checks["hugepages"].found) == ("error", "1 of 1 GB")


def test_a_card_that_may_not_be_opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = look(root)["card 0"]
    assert found.status == "error"
    assert f"chmod a+rw {root}/dev/tenstorrent/0" in found.remedy


def test_a_card_that_another_process_has_is_not_waited_for(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TTNN would, for ever and without a word; cards that it may not see do not matter."""
    monkeypatch.delenv(ttnn_import.VISIBLE, raising=False)
    opened = [Check("grid", "ok", "")]
    monkeypatch.setattr(card_doctor, "_device", lambda root: opened)
    write(root, "proc/driver/tenstorrent/0/pids", f"4711\n4711\n{os.getpid()}")
    found = examine(root)[-1]
    assert (found.name, found.status) == ("device", "warning")
    assert found.found.endswith("have a card open: 4711")
    assert "TT_VISIBLE_DEVICES" in found.remedy
    monkeypatch.setenv(ttnn_import.VISIBLE, "1")
    assert examine(root)[-1].name == "grid"
    write(root, "proc/driver/tenstorrent/1/pids", "12")
    assert examine(root)[-1].found.endswith("have a card open: 12")


class OpenDevice:
    """What `_device` sees of one."""

    grid, bytes_of_dram, closed = Grid(11, 10), 34_000_000_000, False

    def dram(self) -> tuple[int, int]:
        return 0, self.bytes_of_dram

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(root: Path, monkeypatch: pytest.MonkeyPatch) -> OpenDevice:
    made = OpenDevice()
    monkeypatch.setattr(ttnn_import, "log_warnings", lambda: ())
    monkeypatch.setattr(ttnn_import, "load", lambda environment: None)
    monkeypatch.setattr(device, "DeviceBackend", lambda library, number: made)
    return made


@pytest.mark.parametrize(
    ("board", "grid", "status", "remedy"),
    [
        ("p150a", (11, 10), "ok", ""),
        ("p150b", (13, 10), "warning", "Usual on p150 is 11 × 10"),
        ("n150", (8, 8), "ok", ""),
        ("n300", (8, 8), "ok", ""),  # Ethernet cores dispatch
        ("n300", (8, 7), "warning", "Usual on n300 is 8 × 8"),
        ("p100a", (10, 10), "ok", ""),  # nothing is known of it
    ],
)
def test_the_grid(
    root: Path, opened: OpenDevice, board: str, grid: tuple[int, int], status: str, remedy: str
) -> None:
    write(root, "sys/class/tenstorrent/tenstorrent!0/tt_card_type", board)
    opened.grid = Grid(*grid)
    *_, found, dram = examine(root)
    assert (found.name, found.status) == ("grid", status)
    assert found.found == f"{grid[0]} × {grid[1]} cores"
    assert remedy in found.remedy
    assert (dram.name, dram.status, dram.found) == ("DRAM", "ok", "34.0 GB")
    assert opened.closed


def test_little_dram(root: Path, opened: OpenDevice) -> None:
    opened.bytes_of_dram = 6_000_000_000
    found = examine(root)[-1]
    assert (found.status, found.found) == ("warning", "6.0 GB")
    assert "4.5 GB in fast" in found.remedy


def test_a_device_that_does_not_open(
    root: Path, opened: OpenDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(library: Any, number: int) -> None:
        raise EngineError("engine ttnn: expected a device 0 that can be opened, found: busy.")

    monkeypatch.setattr(device, "DeviceBackend", fail)
    found = examine(root)[-1]
    assert (found.name, found.status) == ("device", "error")
    assert found.found.endswith("found: busy")
    assert "tt-smi -r 0" in found.remedy


def test_library_and_compiler(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise EngineError("ttnn: expected ttnn 0.81.1, found none. pip install ttnn.")

    monkeypatch.setattr(ttnn_import, "require_ttnn", missing)
    monkeypatch.setattr(ttnn_import, "sfpi_wanted", missing)
    checks = look(root)
    assert (checks["library"].status, checks["compiler"].status) == ("error", "skipped")
    assert checks["library"].found == "ttnn: expected ttnn 0.81.1, found none"
    assert checks["library"].remedy == "pip install ttnn."


def test_a_simulator_needs_no_card(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ttnn_import.SIMULATOR, "libttsim.so")
    assert set(look(root)) == {"card", "library", "compiler", "device"}
    monkeypatch.setenv(ttnn_import.SIMULATOR, "")  # which is how a shell clears it
    assert "driver" in look(root)


def test_the_device_is_opened_last(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only where nothing stands in the way."""
    opened = []
    monkeypatch.setattr(
        card_doctor, "_device", lambda root: opened.append(root) or [Check("grid", "ok", "")]
    )
    assert examine(root)[-1].name == "grid"
    write(root, HUGEPAGES, "0")
    assert examine(root)[-1].status == "skipped"
    assert len(opened) == 1


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warning", 0), ("error", 1)])
def test_the_verb(status: Any, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [Check("driver", status, "tt-kmd 2.3.0", "Update it.")]
    monkeypatch.setattr(card_doctor, "examine", lambda open_device: checks)
    table, plain = (CliRunner().invoke(app, ["doctor", *words]) for words in ([], ["--json"]))
    assert table.exit_code == plain.exit_code == code
    assert "tt-kmd 2.3.0. Update it." in table.output
    assert json.loads(plain.output)["checks"][0]["status"] == status
