"""A distribution with plug-ins, written into a folder instead of installed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# An engine with a precision of its own, whose results are not quite the reference's.
ENGINE = """
from types import MappingProxyType

from pi0.engines.base import Capabilities, EngineOptions
from pi0.engines.threshold import Threshold
from pi0.engines.reference import ReferenceEngine


class MyEngine(ReferenceEngine):
    name = "mine"
    capabilities = Capabilities(precisions=("half-ish",))
    thresholds = MappingProxyType(
        {"half-ish": {"*": Threshold(0.999, 0.04, "weights are rounded to bfloat16")}}
    )

    def __init__(self, checkpoint, options):
        super().__init__(checkpoint, EngineOptions("bfloat16", image_size=options.image_size))
        self.options = options
"""


def write_distribution(
    folder: Path,
    modules: Mapping[str, str],
    entry_points: Mapping[str, Mapping[str, str]],
    name: str = "pi0-mine",
) -> None:
    """Writes modules, and the metadata with which Python takes them for an installed distribution.

    Args:
        folder: to be on the import path; see `run_with`.
        modules: source text by module name.
        entry_points: by group, such as "pi0.engines", what an entry point names by its name.
    """
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
    info = folder / f"{name.replace('-', '_')}-1.2.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2\n")
    lines = []
    for group, entries in entry_points.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def run_with(folder: Path, *words: object, code: str | None = None) -> subprocess.CompletedProcess:
    """Runs `pi0`, or Python code, in an interpreter that has the folder's distributions."""
    source = Path(__file__).parents[1] / "src"
    start = ["-c", code] if code else ["-m", "pi0"]
    return subprocess.run(
        [sys.executable, *start, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{folder}", "COLUMNS": "200"},
    )
