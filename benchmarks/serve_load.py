"""How many robots one server feeds: `python benchmarks/serve_load.py CKPT --robot libero`.

Starts `pi0 serve` and lets 1, 8 and 64 clients ask as fast as they get answers, each for some
seconds; `--soak MINUTES` then keeps 8 of them busy and watches memory and open files. Clients run
in this process, on the same cores. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from pi0.policy import find_robot
from pi0.serve.load import WARM_UP, answer_times, sample_observation, server

SOAK_CLIENTS = 8


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """What says which policy is served."""
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--robot", default="generic", help="as for pi0 serve")
    parser.add_argument("--engine", default="auto", help="as for pi0 serve")


def served(
    args: argparse.Namespace, *words: str, port: int = 0, before: Sequence[str] = ()
) -> AbstractContextManager[tuple[str, int]]:
    """A server in a process of its own: its address and process id; see `pi0.serve.load.server`."""
    said = ("--robot", args.robot, "--engine", args.engine, "--max-clients", "128")
    return server(str(args.checkpoint), *said, *words, port=port, before=before)


def sample(robot: str, seed: int = 0) -> dict[str, Any]:
    """What a robot sends that the server knows by this name."""
    table = find_robot(robot)
    return sample_observation(table, table.state_dim or 32, seed)


def resident_mb(process: int) -> float:
    """Memory of a process, in MB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_server_options(parser)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--soak", type=float, default=0, help="minutes")
    args = parser.parse_args()
    robot = find_robot(args.robot)
    width = robot.state_dim or 32
    with served(args) as (address, process):
        print("| clients | chunks/s | p50 ms | p99 ms | MB of memory |\n|---:|---:|---:|---:|---:|")
        for clients in args.clients:
            times = answer_times(address, robot, width, clients, args.seconds)
            print_row(str(clients), times, args.seconds, process)
        if args.soak:
            print("\n| minute | chunks/s | p50 ms | p99 ms | MB of memory | open files |")
            print("|---:|---:|---:|---:|---:|---:|")
            for minute in range(1, int(args.soak) + 1):
                times = answer_times(address, robot, width, SOAK_CLIENTS, 60 - WARM_UP)
                files = len(list(Path(f"/proc/{process}/fd").iterdir()))
                print_row(str(minute), times, 60 - WARM_UP, process, f" {files} |")


def print_row(name: str, times: list[float], seconds: float, process: int, more: str = "") -> None:
    p99 = float(np.quantile(times, 0.99)) * 1e3
    print(
        f"| {name} | {len(times) / seconds:.1f} | {statistics.median(times) * 1e3:.1f} | "
        f"{p99:.1f} | {resident_mb(process):.1f} |{more}",
        flush=True,
    )


if __name__ == "__main__":
    main()
