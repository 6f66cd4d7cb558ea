"""How much one server bears: clients that ask again as soon as they have their answer."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from websockets.sync.client import ClientConnection, connect

from pi0.errors import Pi0Error
from pi0.policy import Robot
from pi0.serve.wire import pack

WARM_UP = 2.0  # seconds that are not counted
PATIENCE = 300.0  # seconds for one answer
IMAGE_SIDE = 224  # pixels


@dataclass(frozen=True)
class Load:
    """What a server bore.

    Attributes:
        clients: that asked at the same time.
        rate: answers per second.
        p50, p99: seconds from asking to the answer.
    """

    clients: int
    rate: float
    p50: float
    p99: float

    def robots(self, control_hz: float, execute: int) -> int:
        """How many robots that is, each of which asks once in `execute` actions at its rate."""
        return int(self.rate * execute / control_hz)


@contextlib.contextmanager
def server(
    checkpoint: str, *words: str, port: int = 0, before: Sequence[str] = ()
) -> Iterator[tuple[str, int]]:
    """`pi0 serve` in a process of its own: its address and process id.

    Args:
        words: its options.
        port: to listen on; 0: one that is free.
        before: words of a command that runs the command after it, such as `nice`.

    Raises:
        Pi0Error: it does not start; the sentence is its own.
    """
    command = [*before, sys.executable, "-m", "pi0", "serve", checkpoint]
    command += ["--port", str(port), *words]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            assert process.stdout
            address = re.search(r"wss?://\S+?(?=,)", process.stdout.readline())
            if not address:
                code = process.wait()
                log.seek(0)
                lines = log.read().strip().splitlines() or ["without output"]
                found = f"ended: {lines[-1]}"
                if code < 0:
                    found = f"was ended by {signal.Signals(-code).name}."
                raise Pi0Error(f"pi0 serve: expected it to start, found that it {found}")
            yield address[0], process.pid
        finally:
            process.terminate()


@contextlib.contextmanager
def connected(address: str) -> Iterator[ClientConnection]:
    """A client that was greeted."""
    with connect(address, compression=None, max_size=None, open_timeout=60) as client:
        client.recv()
        yield client


def sample_observation(robot: Robot, width: int, seed: int = 0) -> dict[str, Any]:
    """An observation with a 224-pixel image for each camera and a state of zeros [width]."""
    chance = np.random.default_rng(seed)
    shape = IMAGE_SIDE, IMAGE_SIDE, 3
    images = {camera.key: chance.integers(0, 256, shape, np.uint8) for camera in robot.cameras}
    return robot.observation(images, np.zeros(width, np.float32), "pick up the red cube")


def answer_times(
    address: str, robot: Robot, width: int, clients: int, seconds: float
) -> list[float]:
    """Seconds of each answer while clients ask as fast as they can.

    Raises:
        Pi0Error: the server answers with an error, or not at all.
    """
    times: list[list[float]] = [[] for _ in range(clients)]
    failures: list[str] = []
    begin = time.perf_counter() + WARM_UP

    def ask(number: int) -> None:
        frame = pack(sample_observation(robot, width, number))
        try:
            with connected(address) as client:
                while (start := time.perf_counter()) < begin + seconds and not failures:
                    client.send(frame)
                    if isinstance(answer := client.recv(timeout=PATIENCE), str):
                        failures.append(answer)
                    elif start >= begin:
                        times[number].append(time.perf_counter() - start)
        except Exception as error:  # of a thread, whose errors nobody sees
            failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise Pi0Error(f"load: expected actions, found {failures[0]}")
    return [value for own in times for value in own]


def summarize(clients: int, times: Sequence[float], seconds: float) -> Load:
    """Raises Pi0Error if there was no answer at all in the time."""
    if not times:
        raise Pi0Error(f"load: expected answers within {seconds:g} s, found none. Measure longer.")
    p50, p99 = (float(np.quantile(times, q)) for q in (0.5, 0.99))
    return Load(clients, len(times) / seconds, p50, p99)
