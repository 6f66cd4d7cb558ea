"""Thousands of broken frames are in benchmarks/serve_fuzz.py; here are a few hundred."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from serving import StateEngine, ask, make_policy, observation, running

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from serve_fuzz import fuzz, malformed
from websockets.sync.client import connect

from pi0.serve.options import ServeOptions


def test_broken_frames_are_answered_and_harm_nobody() -> None:
    """One answer for each frame, or a closed connection and a server that takes the next."""
    frames = list(malformed(seed=0, count=300, observation=observation(1)))
    with running(make_policy(StateEngine())) as served, served.connect() as other:
        count = fuzz(f"ws://{served.address}", frames)
        assert count.frames == 300
        assert count.errors > 200  # some stay valid
        assert count.errors + count.actions == 300
        assert "actions" in ask(other, observation(1))


def test_broken_frames_in_batches_harm_nobody() -> None:
    """Those of three clients and the observations of two robots, computed together."""
    engine = StateEngine(seconds=0.01)
    options = ServeOptions(batch=5, batch_wait=1.0)
    done = threading.Event()

    def drive(value: float) -> int:
        asked = 0
        with served.connect() as robot:
            while not done.is_set():
                answer = ask(robot, observation(value))
                np.testing.assert_allclose(answer["actions"], value, rtol=1e-5)
                asked += 1
        return asked

    with running(make_policy(engine), options) as served, ThreadPoolExecutor() as pool:
        robots = [pool.submit(drive, value) for value in (2, 3)]
        sent = [list(malformed(seed, 60, observation(1))) for seed in (1, 2, 3)]
        fuzzed = [pool.submit(fuzz, f"ws://{served.address}", frames) for frames in sent]
        try:
            counts = [one.result() for one in fuzzed]
        finally:
            done.set()
        assert all(robot.result() for robot in robots)
    assert [count.errors + count.actions for count in counts] == [60, 60, 60]
    assert max(engine.batches[2:]) > 1  # after the warm-up's


def test_broken_websockets_are_closed_and_harm_nobody() -> None:
    import random
    import socket

    chance = random.Random(0)
    upgrade = (
        b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
    )
    with running(make_policy(StateEngine())) as served, served.connect() as other:
        for i in range(60):
            with socket.create_connection(("127.0.0.1", served.port)) as raw:
                noise = chance.randbytes(chance.randrange(1, 200))
                raw.sendall(noise if i % 2 else upgrade + noise)
        assert "actions" in ask(other, observation(1))
        with connect(f"ws://{served.address}") as late:
            assert late.recv()
