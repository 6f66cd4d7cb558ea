"""How even `Policy.infer` is: `python benchmarks/jitter.py CKPT`, a checkpoint of the tiny preset.

Engines take turns call by call, so that they meet the same machine, with a fixed number of plain
matrix products: on a machine that others use, too, these are uneven as well, and show how much of
the ratio is the machine's.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from pi0 import Policy

CONTROL = "plain products"
PRODUCTS, ROWS, SIDE = 60, 64, 512  # 8 ms on two cores
ENGINES = ("cpu:float32", "cpu:int8", "reference:float32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--calls", type=int, default=200)
    parser.add_argument("--warm-up", type=int, default=20)
    args = parser.parse_args()
    policies = {}
    for name in ENGINES:
        policies[name] = Policy.from_checkpoint(
            args.checkpoint, engine=name, norm_stats="none", robot="generic"
        )
    robot = policies[ENGINES[0]].robot
    pixels = np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)
    observations = [
        robot.observation(
            {camera.key: np.roll(pixels, i, axis=1) for camera in robot.cameras},
            np.zeros(8),
            "pick up the red cube",
        )
        for i in range(2)
    ]  # in turn: an engine may keep the prefix of the last pictures
    seconds: dict[str, list[float]] = {name: [] for name in (*ENGINES, CONTROL)}
    x, weight = torch.randn(ROWS, SIDE), torch.randn(SIDE, SIDE)
    for i in range(args.warm_up + args.calls):
        for name, policy in policies.items():
            start = time.perf_counter()
            policy.infer(observations[i % 2])
            seconds[name].append(time.perf_counter() - start)
        start = time.perf_counter()
        for _ in range(PRODUCTS):
            x @ weight
        seconds[CONTROL].append(time.perf_counter() - start)
    print(f"{args.calls} calls each, after {args.warm_up}\n")
    print("| engine | p50 ms | p99 ms | p99 / p50 |\n|---|---|---|---|")
    for name, values in seconds.items():
        p50, p99 = np.percentile(values[args.warm_up :], [50, 99]) * 1e3
        print(f"| {name} | {p50:.2f} | {p99:.2f} | {p99 / p50:.2f} |")


if __name__ == "__main__":
    main()
