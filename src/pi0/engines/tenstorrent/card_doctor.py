"""What stands between a machine and its card: driver, firmware, memory, library, compiler.

Everything but the last check reads small files of the system. Versions are those that TTNN 0.81.1
itself asks for (constants of its libtt-umd).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pi0.engines.tenstorrent import ttnn_import
from pi0.errors import EngineError

Status = Literal["ok", "warning", "error", "skipped"]
Version = tuple[int, ...]

DRIVER = (2, 0, 0)  # KMD_MINIMUM_VERSION
FIRMWARE = {"wormhole": (18, 3, 0), "blackhole": (18, 5, 0)}  # minimum_compatible_firmware_version
NEWEST_FIRMWARE = (19, 14, 0)  # latest_supported_firmware_version
ELEVEN_COLUMNS = (19, 5, 0)  # from here on a p150 has 11 × 10 cores, before 13 × 10
# Of a chip as TTNN opens it: on an n300, Ethernet cores dispatch.
GRIDS = {"n150": (8, 8), "n300": (8, 8), "p150": (11, 10)}
LEAST_DRAM = 7e9  # bytes, for the published sizes in accurate
MOUNT = "/dev/hugepages-1G"  # where libtt-umd looks for them
HUGEPAGES = "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"
INSTALLER = "https://github.com/tenstorrent/tt-installer"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        status: "error": the engine cannot run so; "warning": it may not run, or not as described;
            "skipped": could not be looked at, `found` says why.
        found: what there is.
        remedy: how to mend it; empty if there is nothing to mend.
    """

    name: str
    status: Status
    found: str
    remedy: str = ""


def examine(root: Path = Path("/"), open_device: bool = True) -> list[Check]:
    """All checks, in the order in which one would mend what they find.

    Args:
        root: where the system's files are.
        open_device: whether to open card 0, if nothing before stands in the way.
    """
    checks = [*_simulated()] or [*_card(root)]
    checks += [
        _try("library", f"ttnn {ttnn_import.VERSION}", ttnn_import.require_ttnn),
        _compiler(),
    ]
    if not open_device or any(check.status == "error" for check in checks):
        return [*checks, Check("device", "skipped", "not opened: see above")]
    if pids := ttnn_import.holders(root):
        return [*checks, _held(pids)]
    return [*checks, *_device(root)]


def _simulated() -> Iterator[Check]:
    for variable in (ttnn_import.SIMULATOR, ttnn_import.EMULATOR):
        if os.environ.get(variable):
            yield Check("card", "ok", f"{variable}={os.environ[variable]}: no card is needed")


def _card(root: Path) -> Iterator[Check]:
    """Driver, cards, their firmware, and memory that they can reach."""
    version = _read(root / "sys/module/tenstorrent/version")
    remedy = f"Install tt-kmd {_text(DRIVER)} or newer: {INSTALLER}, or dkms; then reboot."
    if not version:
        yield Check("driver", "error", "the kernel module tenstorrent is not loaded", remedy)
    else:
        old = _version(version) < DRIVER
        yield Check("driver", "error" if old else "ok", f"tt-kmd {version}", remedy if old else "")
    cards = _cards(root)
    if not cards:
        yield Check(
            "card",
            "error",
            f"no {ttnn_import.DRIVER}/N",
            "Seat the card, connect its power, reboot; `lspci -d 1e52:` has to list it. "
            "`--engine ttnn-host` needs none.",
        )
        return
    for number in cards:
        yield from _one_card(root, number)
    yield _hugepages(root, cards)


def _one_card(root: Path, number: int) -> Iterator[Check]:
    device = root / "dev/tenstorrent" / str(number)
    usable = os.access(device, os.R_OK | os.W_OK)
    board = _attribute(root, number, "tt_card_type")
    found = board or "a card whose type the driver does not say"
    if board.startswith("e"):  # Grayskull
        remedy = f"TTNN {ttnn_import.VERSION} has Wormhole (n150, n300) and Blackhole (p150) only."
    elif not usable:
        remedy = f"May not be read and written: sudo chmod a+rw {device}, or a udev rule."
    else:
        remedy = ""
    yield Check(f"card {number}", "error" if remedy else "ok", found, remedy)
    text = _attribute(root, number, "tt_fw_bundle_ver")
    name, flash = f"firmware {number}", f"Update it with tt-flash: {INSTALLER}."
    if not text:
        yield Check(name, "warning", "the driver does not say its version", "See `tt-smi -ls`.")
        return
    version = _version(text)
    least = FIRMWARE["blackhole" if board.startswith("p") else "wormhole"]
    if version < least:
        yield Check(name, "error", text, f"Expected {_text(least)} or newer. {flash}")
    elif board.startswith("p150") and version < ELEVEN_COLUMNS:
        yield Check(
            name,
            "warning",
            f"{text}: 13 × 10 cores",
            f"`pi0 ttnn dry-run --board p150-13x10` describes it. {flash}",
        )
    elif version > (*NEWEST_FIRMWARE, 99):
        yield Check(name, "ok", f"{text}, newer than TTNN's newest tested {_text(NEWEST_FIRMWARE)}")
    else:
        yield Check(name, "ok", text)


def _hugepages(root: Path, cards: list[int]) -> Check:
    """Pages of 1 GB, one for each card, which no card needs whose IOMMU translates: one that lets
    addresses pass (iommu=pt, type identity) does not."""
    pages = int(_read(root / HUGEPAGES) or 0)
    types = [_attribute(root, card, "device/iommu_group/type") for card in cards]
    iommu = all(each.startswith("DMA") for each in types)
    mounted = f" {MOUNT} hugetlbfs " in _read(root / "proc/mounts")
    found = f"{pages} of 1 GB" + ("" if mounted or not pages else f", not mounted at {MOUNT}")
    if any(types):
        found += ", IOMMU active" if iommu else ", an IOMMU that does not translate"
    if iommu or (pages >= len(cards) and mounted):
        return Check("hugepages", "ok", found)
    return Check(
        "hugepages",
        "error",
        found,
        f"Expected {len(cards)} at least: install tenstorrent-tools ({INSTALLER}), then `sudo "
        "systemctl enable --now tenstorrent-hugepages.service 'dev-hugepages\\x2d1G.mount'` and "
        "reboot.",
    )


def _compiler() -> Check:
    try:
        release = ttnn_import.sfpi_wanted()
    except EngineError:
        return Check("compiler", "skipped", "the library says which one it wants")
    return _try("compiler", f"sfpi {release}", ttnn_import.require_compiler)


def _held(pids: list[int]) -> Check:
    return Check(
        "device",
        "warning",
        "not opened: TTNN may wait for processes that have a card open: "
        f"{', '.join(map(str, pids))}",
        f"End them, or set {ttnn_import.VISIBLE} to the number of a card that is free, which is "
        "card 0 then.",
    )


def _device(root: Path) -> Iterator[Check]:
    """Opens card 0: its cores and its DRAM."""
    from pi0.engines.tenstorrent.device import DeviceBackend  # torch: seconds

    try:
        ttnn_import.log_warnings()
        backend = DeviceBackend(ttnn_import.load({}), 0)
    except EngineError as error:
        yield Check(
            "device",
            "error",
            str(error).rstrip("."),
            "End other processes that hold the card, reset it (`tt-smi -r 0`), try again.",
        )
        return
    try:
        grid, dram = backend.grid, backend.dram()[1]
    finally:
        backend.close()
    board = _attribute(root, 0, "tt_card_type")[:4]
    x, y = GRIDS.get(board, (grid.x, grid.y))
    odd = (x, y) != (grid.x, grid.y)
    yield Check(
        "grid",
        "warning" if odd else "ok",
        f"{grid.x} × {grid.y} cores",
        f"Usual on {board} is {x} × {y}: what the dry run says is of that." if odd else "",
    )
    little = dram < LEAST_DRAM
    yield Check(
        "DRAM",
        "warning" if little else "ok",
        f"{dram / 1e9:.1f} GB",
        "π0 takes 7 GB in accurate, 4.5 GB in fast; `pi0 ttnn dry-run` says how much a model takes."
        if little
        else "",
    )


def _try(name: str, found: str, require: Callable[[], None]) -> Check:
    """What a check of the engine says: a sentence, and how to mend it."""
    try:
        require()
    except EngineError as error:
        said, _, remedy = str(error).partition(". ")
        return Check(name, "error", said, remedy)
    return Check(name, "ok", found)


def _cards(root: Path) -> list[int]:
    folder = root / "dev/tenstorrent"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def _attribute(root: Path, number: int, name: str) -> str:
    return _read(root / f"sys/class/tenstorrent/tenstorrent!{number}" / name)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _version(text: str) -> Version:
    """The numbers of a version, of which firmware's may begin with 80 (80.18.3.0)."""
    numbers = tuple(int(number) for number in re.findall(r"\d+", text))
    return numbers[1:] if numbers[:1] == (80,) else numbers


def _text(version: Version) -> str:
    return ".".join(map(str, version))
