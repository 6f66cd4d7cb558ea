"""Finding the library, and telling it where it runs before it is imported.

TTNN reads its environment when it is imported and when it first looks for a chip, so a process is
for one of three things: a card (or Tenstorrent's simulator), a mock device, or the host alone.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

from pi0.engines.tenstorrent import stub_compiler
from pi0.errors import EngineError, install_hint

VERSION = "0.81.1"
MOCK = "TT_METAL_MOCK_CLUSTER_DESC_PATH"
SIMULATOR = "TT_METAL_SIMULATOR"
EMULATOR = "TT_METAL_EMULE_MODE"
DRIVER = Path("/dev/tenstorrent")  # a file for each card
SFPI = Path("/opt/tenstorrent/sfpi")  # where Tenstorrent's packages put the compiler
LOG = "ttnn.log"
LOG_FILE = "TT_METAL_LOGGER_FILE"
VISIBLE = "TT_VISIBLE_DEVICES"
HOLDERS = "proc/driver/tenstorrent"  # of each card: who has it open, as the driver says


def cache_path() -> Path:
    """The folder of `cache_folder`, whether it is there or not."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pi0" / "ttnn"


def cache_folder() -> Path:
    """Where what TTNN builds and logs is kept between runs; made if it is not there.

    Raises:
        EngineError: nothing can be written there.
    """
    folder = cache_path()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise EngineError(
            f"cache of ttnn: expected a folder that can be written, found {folder}, which cannot. "
            "Set XDG_CACHE_HOME to one that can."
        )
    return folder


def require_ttnn() -> None:
    """Raises EngineError unless the version of TTNN that this was written for is installed."""
    try:
        found = version("ttnn")
    except PackageNotFoundError as error:
        raise EngineError(
            f"ttnn: expected ttnn {VERSION}, found none. It needs an environment of Python 3.10 or "
            f"3.12. {install_hint('ttnn')}"
        ) from error
    if found != VERSION:
        raise EngineError(
            f"ttnn: expected ttnn {VERSION}, found {found}. Install it: pip install "
            f"ttnn=={VERSION}."
        )


def package_folder() -> Path:
    """The folder of the installed library, without importing it."""
    return Path(str(distribution("ttnn").locate_file("ttnn")))


def has_device() -> bool:
    """Whether there is a card, a simulator or the kernel emulator."""
    return DRIVER.exists() or any(os.environ.get(name) for name in (SIMULATOR, EMULATOR))


def holders(root: Path = Path("/")) -> list[int]:
    """Other processes that have a card open, of all cards that this one may see.

    TTNN opens them all, and waits for a process that uses one, without an end or a word.
    """
    visible = os.environ.get(VISIBLE, "").split(",")
    pids = set()
    for path in (root / HOLDERS).glob("*/pids"):
        if visible == [""] or path.parent.name in visible:
            with contextlib.suppress(OSError):
                pids |= {int(pid) for pid in path.read_text(encoding="utf-8").split()}
    return sorted(pids - {os.getpid()})


def sfpi_wanted() -> str:
    """The version of Tenstorrent's compiler that the library wants.

    Raises:
        EngineError: the library is not installed in the right version.
    """
    require_ttnn()
    return stub_compiler.sfpi_release(package_folder())["sfpi_version"]


def find_compiler() -> Path | None:
    """Tenstorrent's compiler, where the library looks for it: in its runtime root, then in the
    system."""
    root = Path(os.environ.get("TT_METAL_RUNTIME_ROOT") or package_folder())
    for folder in (root / "runtime" / "sfpi", SFPI):
        compiler = folder / "compiler" / "bin" / stub_compiler.NAME
        if compiler.is_file():
            return compiler
    return None


def require_compiler() -> None:
    """Raises EngineError unless Tenstorrent's compiler is there in the version that TTNN wants.

    It is not part of the wheel (tt-metal issue 31962), and without it the first operation fails.
    The emulator compiles with the host's compiler.
    """
    if os.environ.get(EMULATOR):
        return
    release = sfpi_wanted()
    mend = (
        f"Install sfpi {release}: the package sfpi_{release}_x86_64_debian.deb (or _fedora.rpm) of "
        "https://github.com/tenstorrent/sfpi/releases."
    )
    compiler = find_compiler()
    if compiler is None:
        raise EngineError(
            f"engine ttnn: expected Tenstorrent's compiler sfpi {release} in {SFPI}, found none. "
            f"{mend}"
        )
    found = compiler_version(compiler)
    if f"sfpi:{release}[" not in found:
        raise EngineError(
            f"engine ttnn: expected Tenstorrent's compiler sfpi {release}, found {found!r} at "
            f"{compiler}. {mend}"
        )


def compiler_version(compiler: Path) -> str:
    """What a compiler says that it is: its first line."""
    try:
        done = subprocess.run(
            [str(compiler), "--version"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return (done.stdout or done.stderr).strip().partition("\n")[0]


def log_warnings() -> tuple[str, ...]:
    """Has the library, not imported yet, write its warnings to a file, since results have the
    output, and says where; a level that is set in the environment stays, and goes to the output.

    The level is `warn`: `warning` is no level to TTNN 0.81.1, which then says everything.
    """
    if "TT_METAL_LOGGER_LEVEL" not in os.environ:
        (cache_folder() / "logs").mkdir(exist_ok=True)
        os.environ["TT_METAL_LOGGER_LEVEL"] = "warn"
        os.environ.setdefault(LOG_FILE, str(cache_path() / "logs" / LOG))
    file = os.environ.get(LOG_FILE)
    return (f"TTNN's own warnings are in {file}.",) if file else ()


def load(environment: dict[str, str]) -> Any:
    """The library, imported with these settings beside those of the process.

    Raises:
        EngineError: not installed, or the process has been using it in another way.
    """
    require_ttnn()
    asked = environment.get(MOCK, os.environ.get(MOCK, "") if os.environ.get(EMULATOR) else "")
    if os.environ.get(MOCK, "") != asked and MOCK in os.environ:
        raise EngineError(
            "ttnn: expected a process that uses one board, found one that was set up for another "
            f"({MOCK}). Start a new process without that variable."
        )
    os.environ.update(environment)
    os.environ.setdefault("TT_METAL_LOGGER_LEVEL", "off")  # what matters is raised as well
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")
    return importlib.import_module("ttnn")
