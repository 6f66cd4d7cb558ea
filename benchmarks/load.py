"""How long loading a checkpoint takes, beside reading its file: `python benchmarks/load.py CKPT`.

Alternates `cat FILE >/dev/null` and loading in fresh processes, so that both meet the same machine;
the file is in the page cache unless --cold (needs root) drops it before every run. With --check,
engines are made with and without looking for NaN and infinities in all tensors, instead.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS

LOAD = """
import resource, sys, time, torch
from pi0 import load_model, open_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
open_checkpoint(sys.argv[1])  # imports and headers are not what is measured
before = peak()
start = time.perf_counter()
model = load_model(open_checkpoint(sys.argv[1]), getattr(torch, sys.argv[2]))
seconds = time.perf_counter() - start
print(seconds, sum(p.nbytes for p in model.parameters()), peak() - before)
"""

CHECK = """
import sys, time
from pi0 import open_checkpoint
from pi0.checkpoint import files
from pi0.engines.base import make_engine
if sys.argv[3] == "without":
    files.require_finite = lambda *_: None
checkpoint = open_checkpoint(sys.argv[1])
make_engine(sys.argv[2], open_checkpoint(sys.argv[4]))  # imports and compiling do not count
start = time.perf_counter()
make_engine(sys.argv[2], checkpoint)
print(time.perf_counter() - start)
"""


def read(file: Path) -> float:
    start = time.perf_counter()
    subprocess.run(["cat", file], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def load(checkpoint: Path, dtype: str) -> tuple[float, float, float]:
    """Seconds, bytes of the parameters, growth of peak memory in bytes."""
    command = [sys.executable, "-c", LOAD, str(checkpoint), dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, held, grown = map(float, out.split())
    return seconds, held, grown


def check(checkpoint: Path, engines: list[str], repeat: int) -> None:
    """Prints how long each engine takes to make, with and without the check, in turn."""
    ways = ("with", "without")
    print(
        "| | with, seconds, median (least to most) | without | median more by |\n|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny"
        synthesise(tiny, PRESETS["tiny"], LAYOUTS["openpi"], 0, torch.bfloat16)
        for engine in engines:
            seconds: dict[str, list[float]] = {way: [] for way in ways}
            for turn in range(repeat):
                for way in ways if turn % 2 else reversed(ways):
                    command = [sys.executable, "-c", CHECK, checkpoint, engine, way, tiny]
                    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                    seconds[way].append(float(out))
            medians = [statistics.median(seconds[way]) for way in ways]
            more = medians[0] / medians[1] - 1
            print(f"| {engine} | {' | '.join(map(spread, seconds.values()))} | {more:.1%} |")


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every run")
    parser.add_argument("--check", nargs="+", metavar="ENGINE", help="what the check costs these")
    args = parser.parse_args()
    if args.check:
        check(args.checkpoint, args.check, args.repeat)
        return
    file = args.checkpoint / "model.safetensors"

    def prepare() -> None:
        if args.cold:
            subprocess.run(["sync"], check=True)
            Path("/proc/sys/vm/drop_caches").write_text("1")

    seconds: dict[str, list[float]] = {"cat": [], "bfloat16": [], "float32": []}
    memory = {}
    for _ in range(args.repeat):
        prepare()
        seconds["cat"].append(read(file))
        for dtype in ("bfloat16", "float32"):
            prepare()
            took, held, grown = load(args.checkpoint, dtype)
            seconds[dtype].append(took)
            memory[dtype] = f"{held / 1e9:.2f} | {grown / held:.3f}"
    reading = statistics.median(seconds["cat"])
    print(f"file {file.stat().st_size / 1e9:.2f} GB, {'cold' if args.cold else 'in page cache'}\n")
    print("| | seconds, median (least to most) | ratio to cat | GB held | peak / held |")
    print("|---|---|---|---|---|")
    for name, values in seconds.items():
        ratio = statistics.median(values) / reading
        print(f"| {name} | {spread(values)} | {ratio:.1f} | {memory.get(name, ' | ')} |")


if __name__ == "__main__":
    main()
