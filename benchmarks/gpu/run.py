"""The first minutes on a GPU, in one command: `python benchmarks/gpu/run.py FOLDER`.

Runs the other scripts and the tests that need a GPU, each in a process of its own that may fail or
be cut off without stopping the rest, and writes FOLDER/gpu.json and FOLDER/gpu.md after each: first
whether every precision is right, then how fast. Takes ten minutes at most.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "src"))

from common import show, write  # noqa: E402

SECONDS = 570  # in all: less than ten minutes
LIMITS = {"probe": 120, "tests": 180, "parts": 300, "gemm": 90}
TAIL = 3000  # characters of a step's output that are kept
TESTS = ("tests/engines/test_triton.py", "tests/engines/test_cuda_device.py")
PYTEST = ("-q", "-n", "8", "-W", "default", "-p", "no:cacheprovider")
# Latency in milliseconds as its authors give it; prompts, chunks and GPUs differ.
PUBLISHED: list[dict[str, Any]] = [
    {"engine": "realtime-vla, bfloat16", "GPU": "RTX 4090", "2 cameras": 27.3, "3 cameras": 36.8},
    {"engine": "realtime-vla, bfloat16", "GPU": "RTX 5090", "2 cameras": 24.0, "3 cameras": 31.9},
    {"engine": "FlashRT, fp8", "GPU": "RTX 5090", "2 cameras": 21.16, "3 cameras": 24.48},
    {
        "engine": "openpi in PyTorch with graphs (pull request 865), bfloat16; cameras not stated",
        "GPU": "H200",
        "2 cameras": 29.6,
        "3 cameras": "-",
    },
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--checkpoint", help="without one, a random one of full size is made")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the scripts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the scripts")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    run = Run(options.folder)
    making = None
    if options.checkpoint is None:
        preset, options.checkpoint = "tiny" if options.tiny else "pi0_base", run.folder / "random"
        command = ["-m", "pi0", "synth", "--preset", preset, str(options.checkpoint)]
        making = subprocess.Popen(
            [sys.executable, *command], env=run.environment, cwd=ROOT, stdout=subprocess.DEVNULL
        )
    try:
        run.script("probe", options)
        if options.device == "cuda":
            run.step("tests", ["-m", "pytest", *PYTEST, *TESTS])
        if making is not None and making.wait(timeout=run.left()):
            raise SystemExit("the random checkpoint could not be made; name one with --checkpoint")
        run.script("parts", options, str(options.checkpoint))
        run.script("gemm", options)
    finally:
        if making is not None and making.poll() is None:
            making.kill()


class Run:
    """The steps so far, their results, and the time that is left."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.end = time.monotonic() + SECONDS
        paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self.results: dict[str, Any] = {"steps": []}

    def left(self) -> float:
        return max(1.0, self.end - time.monotonic())

    def script(self, name: str, options: argparse.Namespace, *arguments: str) -> None:
        out = self.folder / f"{name}.json"
        out.unlink(missing_ok=True)
        tiny = ["--tiny"] if options.tiny else []
        command = [str(HERE / f"{name}.py"), *arguments, "--device", options.device, *tiny]
        self.step(name, [*command, "--out", str(out)], out)

    def step(self, name: str, command: list[str], out: Path | None = None) -> None:
        """Runs a command of Python; its output goes into a file of its own."""
        log, start = self.folder / f"{name}.log", time.monotonic()
        with log.open("w", encoding="utf-8") as file:
            try:
                code: int | str = subprocess.run(
                    [sys.executable, "-u", *command],
                    cwd=ROOT,
                    env=self.environment,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=min(LIMITS[name], self.left()),
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                code = "cut off"
        seconds = round(time.monotonic() - start, 1)
        print(f"{name}: exit code {code}, {seconds} s, {log}", flush=True)
        tail = log.read_text(encoding="utf-8", errors="replace")[-TAIL:]
        step = {"step": name, "exit code": code, "seconds": seconds}
        self.results["steps"].append(step | {"tail": tail})
        if out is not None and out.exists():
            self.results[name] = json.loads(out.read_text(encoding="utf-8"))
        write(self.folder / "gpu.json", self.results)
        (self.folder / "gpu.md").write_text("\n".join(report(self.results)) + "\n", "utf-8")


def report(results: dict[str, Any]) -> Iterator[str]:
    """The page: right first, then fast."""
    probe, parts = results.get("probe", {}), results.get("parts", {})
    yield "# Engine cuda on this machine\n"
    yield from (f"- {name}: {value}" for name, value in probe.get("versions", {}).items())
    steps = results["steps"]
    yield "\n## Steps\n"
    yield from show([{k: v for k, v in step.items() if k != "tail"} for step in steps])
    for step in steps:
        if step["exit code"] != 0 or step["step"] == "tests":
            yield f"\n{step['step']}:\n\n```\n{step['tail']}\n```"
    yield "\n## Is it right? Error as a part of what the model moved\n"
    yield from show(worst_errors(parts.get("accuracy", [])))
    yield from (f"- {name}: {'; '.join(notes)}" for name, notes in parts.get("notes", {}).items())
    yield "\n## How fast? A call from the CPU and back, median ms\n"
    yield from show(calls(parts.get("times", [])))
    yield "\nPublished by others, on other GPUs, with other prompts:\n"
    yield from show(PUBLISHED)
    yield "\n## Parts, replayed as graphs\n"
    yield from show([row for row in parts.get("times", []) if "eager" not in row["precision"]])
    yield "\n## Attention\n"
    yield from show(probe.get("attention", []))
    yield "\n## Products in e4m3\n"
    yield from show(probe.get("products", []))
    yield "\n## All products\n"
    yield from show(results.get("gemm", []))


def worst_errors(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of all seeds."""
    worst: dict[tuple[str, int], float] = {}
    for row in rows:
        key = row["precision"], row["cameras"]
        worst[key] = max(worst.get(key, 0.0), row["error"])
    return [
        {"precision": precision, "cameras": cameras, "worst error": error}
        for (precision, cameras), error in worst.items()
    ]


def calls(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With the speed beside the eager reference in bfloat16."""
    whole = [row for row in rows if row["part"] == "call from the CPU"]
    eager = {r["cameras"]: r["median ms"] for r in whole if r["precision"] == "eager bfloat16"}
    return [
        {
            **{k: v for k, v in row.items() if k != "part"},
            "× eager bfloat16": eager[row["cameras"]] / row["median ms"]
            if row["cameras"] in eager
            else "-",
        }
        for row in whole
    ]


if __name__ == "__main__":
    main()
