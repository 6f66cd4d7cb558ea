"""How many robots one server feeds: `python benchmarks/serve_load.py CKPT --robot libero`.

Starts `pi0 serve` and lets 1, 8 and 64 clients ask as fast as they get answers, each for some
seconds; `--soak MINUTES` then keeps 8 of them busy and watches memory and open files. Clients run
in this process, on the same cores. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shlex
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from websockets.sync.client import ClientConnection, connect

from pi0.policy import find_robot
from pi0.serve.wire import pack

WARM_UP = 2.0  # seconds that are not counted
SOAK_CLIENTS = 8


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """What says which policy is served."""
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--robot", default="generic", help="as for pi0 serve")
    parser.add_argument("--engine", default="auto", help="as for pi0 serve")


@contextlib.contextmanager
def server(
    args: argparse.Namespace,
    port: int = 0,
    more: Sequence[str] = (),
    wrap: Callable[[str], list[str]] | None = None,
) -> Iterator[tuple[str, int]]:
    """A server in a process of its own: its address and process id.

    Args:
        more: options of `pi0 serve`.
        wrap: the command that runs a command line, as words.
    """
    words = [sys.executable, "-m", "pi0.cli.main", "serve", args.checkpoint, "--port", port]
    words += ["--robot", args.robot, "--engine", args.engine, "--max-clients", "128", *more]
    command = list(map(str, words))
    with subprocess.Popen(
        wrap(shlex.join(command)) if wrap else command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        try:
            assert process.stdout
            found = re.search(r"wss?://\S+?(?=,)", process.stdout.readline())
            if not found:
                raise SystemExit("pi0 serve did not start: run it by hand")
            yield found[0], process.pid
        finally:
            process.terminate()


@contextlib.contextmanager
def connected(address: str) -> Iterator[ClientConnection]:
    """A client that was greeted."""
    with connect(address, compression=None, max_size=None, open_timeout=60) as client:
        client.recv()
        yield client


def sample_observation(robot: str, seed: int = 0) -> dict[str, Any]:
    """An observation with a 224-pixel image for each camera."""
    table, chance = find_robot(robot), np.random.default_rng(seed)
    images = {
        camera.key: chance.integers(0, 256, (224, 224, 3), np.uint8) for camera in table.cameras
    }
    state = np.zeros(table.state_dim or 32, np.float32)
    return table.observation(images, state, "pick up the red cube")


def resident_mb(process: int) -> float:
    """Memory of a process, in MB."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def load(address: str, robot: str, clients: int, seconds: float) -> list[float]:
    """Seconds of each answer while clients ask as fast as they can."""
    times: list[list[float]] = [[] for _ in range(clients)]
    begin = time.perf_counter() + WARM_UP

    def ask(number: int) -> None:
        frame = pack(sample_observation(robot, number))
        with connected(address) as client:
            while (start := time.perf_counter()) < begin + seconds:
                client.send(frame)
                if isinstance(answer := client.recv(timeout=300), str):
                    raise RuntimeError(answer)
                if start >= begin:
                    times[number].append(time.perf_counter() - start)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [value for own in times for value in own]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_server_options(parser)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--soak", type=float, default=0, help="minutes")
    args = parser.parse_args()
    with server(args) as (address, process):
        print(
            "| clients | answers/s | p50 ms | p99 ms | MB of memory |\n|---:|---:|---:|---:|---:|"
        )
        for clients in args.clients:
            times = load(address, args.robot, clients, args.seconds)
            print_row(str(clients), times, args.seconds, process)
        if args.soak:
            print("\n| minute | answers/s | p50 ms | p99 ms | MB of memory | open files |")
            print("|---:|---:|---:|---:|---:|---:|")
            for minute in range(1, int(args.soak) + 1):
                times = load(address, args.robot, SOAK_CLIENTS, 60 - WARM_UP)
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
