"""How long loading a checkpoint takes, beside reading its file: `python benchmarks/load.py CKPT`.

Alternates `cat FILE >/dev/null` and loading in fresh processes, so that both meet the same machine;
the file is in the page cache unless --cold (needs root) drops it before every run.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every run")
    args = parser.parse_args()
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
        median = statistics.median(values)
        spread = f"{median:.2f} ({min(values):.2f} to {max(values):.2f})"
        print(f"| {name} | {spread} | {median / reading:.1f} | {memory.get(name, ' | ')} |")


if __name__ == "__main__":
    main()
