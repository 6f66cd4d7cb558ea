"""The scripts of a GPU's first minutes, as far as a CPU takes them, at tiny sizes."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "gpu"


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run.py`, which runs the other scripts in this process."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = ("common", "probe", "gemm", "parts", "run")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    run = importlib.import_module("run")

    def in_process(command: list[str], **_: Any) -> Any:
        _, _, script, *arguments = command
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        importlib.import_module(Path(script).stem).main()
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(run.subprocess, "run", in_process)
    yield run
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.filterwarnings("ignore")  # of each precision, what a CPU does not have
def test_all_on_a_cpu(
    scripts: Any, tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["run.py", str(tmp_path), "--checkpoint", str(tiny_path), "--device", "cpu", "--tiny"]
    monkeypatch.setattr(sys, "argv", command)
    scripts.main()
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert [step["step"] for step in result["steps"]] == ["probe", "parts", "gemm"]
    assert result["probe"]["versions"]["e4m3 products"] == "right"
    (math_row,) = (
        row for row in result["probe"]["attention"] if row["backend"] == "MATH" and row["mask"]
    )
    assert math_row["error"] < 0.01
    assert all(row["error"] < 0.01 for row in result["probe"]["products"])
    worst = {row["precision"]: row["error"] for row in result["parts"]["accuracy"]}
    assert worst.keys() == {"bfloat16", "fp8", "float32", "eager bfloat16"}
    assert worst["float32"] < 1e-5 < worst["bfloat16"] < worst["fp8"] < 0.2
    parts = {row["part"] for row in result["parts"]["times"]}
    assert parts == {"vision", "prefill", "step", "call", "call from the CPU"}
    assert all(math.isfinite(row["microseconds"]) for row in result["gemm"])
    page = (tmp_path / "gpu.md").read_text()
    assert page.index("## Is it right?") < page.index("## How fast?")
    assert "| bfloat16 | 2 |" in page


def test_a_step_that_fails_does_not_hide_the_others(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = scripts.Run(tmp_path)

    def cut_off(command: list[str], timeout: float, **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(scripts.subprocess, "run", cut_off)
    run.step("gemm", ["script.py"], tmp_path / "gemm.json")
    assert "| gemm | cut off |" in (tmp_path / "gpu.md").read_text()
