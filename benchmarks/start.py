"""Time to the first actions from a cold start: `python benchmarks/start.py CKPT`.

Every start is a new process: imports, the policy with its weights, one observation with one image
of noise for each of --cameras. `cache` is a start that finds packed weights kept; they are made
once, apart, beside a link to the checkpoint's file in a folder of their own, and removed at the
end. Alternates all of these, so that they meet the same machine; files are in the page cache unless
--cold (needs root) drops it before every start, libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

START = """
import json, resource, sys, time
began = float(sys.argv[4])
import numpy as np
import torch
import pi0.engines.fast.cpu.engine
from pi0 import ROBOTS, Policy
imported = time.time()
policy = Policy.from_checkpoint(
    sys.argv[1], engine="cpu", dtype=sys.argv[2], weight_cache=sys.argv[3] == "cache",
    norm_stats="none", robot="generic",
)
loaded = time.time()
side = policy.engine.config.vision.image_size
pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
images = {camera.key: pixels for camera in policy.robot.cameras[: int(sys.argv[5])]}
policy.infer(policy.robot.observation(images, np.zeros(8), "pick up the red cube"))
done = time.time()
print(json.dumps({
    "imports": imported - began, "load": loaded - imported, "first sample": done - loaded,
    "total": done - began, "GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
}))
"""
DTYPES = ("float32", "int8")
CACHES = ("none", "cache")


def start(folder: Path, dtype: str, cache: str, cameras: int) -> dict[str, float]:
    """Seconds of each part of a start, and the peak of resident memory."""
    command = [sys.executable, "-c", START, str(folder), dtype, cache]
    command += [repr(time.time()), str(cameras)]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: dict[str, float] = json.loads(out)
    return found


def drop_page_cache() -> None:
    subprocess.run(["sync"], check=True)
    Path("/proc/sys/vm/drop_caches").write_text("1")


def mirror(checkpoint: Path, folder: Path) -> None:
    """Links to everything in a checkpoint's folder but weights kept beside it."""
    for entry in checkpoint.iterdir():
        if entry.suffix != ".pi0":
            os.symlink(entry.resolve(), folder / entry.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cameras", type=int, default=3, choices=(1, 2, 3))
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument("--caches", nargs="+", default=CACHES, choices=CACHES)
    parser.add_argument("--cold", action="store_true", help="drop the page cache before every run")
    args = parser.parse_args()
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    # Beside the checkpoint: packed weights want the same disk.
    with tempfile.TemporaryDirectory(dir=args.checkpoint.resolve().parent) as name:
        folder = Path(name)
        mirror(args.checkpoint, folder)
        packing = {dtype: start(folder, dtype, "cache", args.cameras) for dtype in args.dtypes}
        for _ in range(args.repeat):
            for dtype in args.dtypes:
                for cache in args.caches:
                    if args.cold:
                        drop_page_cache()
                    told = start(folder, dtype, cache, args.cameras)
                    found.setdefault((dtype, cache), []).append(told)
        kept = {dtype: next(folder.glob(f"*{dtype}*.pi0")).stat().st_size for dtype in args.dtypes}
    state = "dropped" if args.cold else "warm"
    print(f"{args.cameras} cameras, page cache {state}; seconds, median (least to most)\n")
    parts = ("imports", "load", "first sample", "total")
    print(f"| engine | cache | {' | '.join(parts)} | peak GB |\n|---|---|{'---|' * 5}")
    for (dtype, cache), runs in found.items():
        cells = []
        for part in parts:
            values = [run[part] for run in runs]
            spread = f"{min(values):.2f} to {max(values):.2f}"
            cells.append(f"{statistics.median(values):.2f} ({spread})")
        peak = max(run["GB"] for run in runs)
        print(f"| cpu:{dtype} | {cache} | {' | '.join(cells)} | {peak:.2f} |")
    print()
    for dtype in args.dtypes:
        seconds = packing[dtype]["load"]
        print(
            f"cpu:{dtype}: packed and written in {seconds:.1f} s, {kept[dtype] / 1e9:.2f} GB kept"
        )


if __name__ == "__main__":
    main()
