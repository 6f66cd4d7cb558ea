"""Thousands of broken frames are in benchmarks/serve_fuzz.py; here are a few hundred."""

from __future__ import annotations

import sys
from pathlib import Path

from serving import StateEngine, ask, make_policy, observation, running

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from serve_fuzz import fuzz, malformed
from websockets.sync.client import connect


def test_broken_frames_are_answered_and_harm_nobody() -> None:
    """One answer for each frame, or a closed connection and a server that takes the next."""
    frames = list(malformed(seed=0, count=300, observation=observation(1)))
    with running(make_policy(StateEngine())) as served, served.connect() as other:
        count = fuzz(f"ws://{served.address}", frames)
        assert count.frames == 300
        assert count.errors > 200  # some stay valid
        assert count.errors + count.actions == 300
        assert "actions" in ask(other, observation(1))


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
