"""Finding the library, and telling it where it runs before it is imported.

TTNN reads its environment when it is imported and when it first looks for a chip, so a process is
for one of three things: a card (or Tenstorrent's simulator), a mock device, or the host alone.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pi0.errors import EngineError, install_hint

VERSION = "0.81.1"
MOCK = "TT_METAL_MOCK_CLUSTER_DESC_PATH"


def cache_folder() -> Path:
    """Where what TTNN builds and logs is kept between runs."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pi0" / "ttnn"


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


def has_device() -> bool:
    """Whether there is a card or a simulator."""
    return Path("/dev/tenstorrent").exists() or "TT_METAL_SIMULATOR" in os.environ


def load(environment: dict[str, str]) -> Any:
    """The library, imported with these settings beside those of the process.

    Raises:
        EngineError: not installed, or the process has been using it in another way.
    """
    require_ttnn()
    if os.environ.get(MOCK, "") != environment.get(MOCK, "") and MOCK in os.environ:
        raise EngineError(
            "ttnn: expected a process that uses one board, found one that was set up for another "
            f"({MOCK}). Start a new process."
        )
    os.environ.update(environment)
    os.environ.setdefault("TT_METAL_LOGGER_LEVEL", "off")  # what matters is raised as well
    os.environ.setdefault("LOGURU_LEVEL", "ERROR")
    return importlib.import_module("ttnn")
