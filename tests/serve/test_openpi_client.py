"""openpi's published client, unchanged, in its own environment, against our server."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import ssl
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from serving import NO_OPENPI, OPENPI_PYTHON, StateEngine, make_policy, running
from test_wire import MESSAGES

from pi0.policy import RealTimeChunking
from pi0.serve.binding import make_tls
from pi0.serve.options import ServeOptions
from pi0.serve.wire import MessageLimits, pack, unpack

pytestmark = pytest.mark.skipif(not OPENPI_PYTHON.exists(), reason=NO_OPENPI)
DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
WORKER = Path(__file__).with_name("openpi_worker.py")
ROBOTS = {"generic": 14, "aloha": 14, "libero": 7, "droid": 8}


def openpi(*jobs: dict[str, Any], **environment: str) -> list[dict[str, Any]]:
    """The worker's results, one for each job."""
    done = subprocess.run(
        [OPENPI_PYTHON, "-W", "ignore", WORKER],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def test_it_gets_actions_for_four_robots() -> None:
    with contextlib.ExitStack() as stack:
        real_time = RealTimeChunking(jacobian="identity")
        policies = {name: make_policy(StateEngine(), name, real_time=real_time) for name in ROBOTS}
        servers = {name: stack.enter_context(running(p)) for name, p in policies.items()}
        jobs = [
            {"do": "infer", "robot": name, "host": "127.0.0.1", "port": server.port}
            for name, server in servers.items()
        ]
        results = dict(zip(ROBOTS, openpi(*jobs), strict=True))
    for name, result in results.items():
        assert np.shape(result["actions"]) == (50, ROBOTS[name]), name
        assert np.isfinite(result["actions"]).all()
        assert result["dtype"] == "<f4"
        assert result["keys"] == ["actions", "policy_timing", "server_timing"]
        assert result["extras"] == result["keys"]
        assert result["step_shapes"] == [[ROBOTS[name]]]
        assert result["metadata"]["robot"] is None  # these policies were made without a checkpoint
        assert result["metadata"]["n_action_steps"] == 50
        assert result["error"].startswith("Error in inference server:\nobservation: expected")
        assert result["server_timing"]["prev_total_ms"] > 0


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, as docs/serving.md makes one, and its key."""
    (command,) = re.findall(r"^openssl req(?:.*\\\n)*.*$", DOCS.read_text(), re.MULTILINE)
    words = re.sub(r"IP:[\d.]+", "IP:127.0.0.1", command.replace("\\\n", " ")).split()
    try:
        subprocess.run(words, check=True, stderr=-3, cwd=folder)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs openssl with -addext")
    return folder / "tls.crt", folder / "tls.key"


def test_it_shows_its_key_over_tls(tmp_path: Path) -> None:
    cert, key = certificate(tmp_path)
    options = ServeOptions(api_key="0123456789abcdef", tls=make_tls(cert, key))
    assert isinstance(options.tls, ssl.SSLContext)
    policy = make_policy(StateEngine(), real_time=RealTimeChunking(jacobian="identity"))
    with running(policy, options) as served:
        job = {"do": "infer", "robot": "generic", "host": "wss://127.0.0.1", "port": served.port}
        trusted = {"SSL_CERT_FILE": str(cert)}
        (result,) = openpi({**job, "api_key": options.api_key}, **trusted)
        assert np.shape(result["actions"]) == (50, 14)
        with pytest.raises(AssertionError, match="HTTP 401"):
            openpi({**job, "api_key": "fedcba9876543210"}, **trusted)


def test_both_pack_the_same_bytes() -> None:
    """What we pack, openpi's code unpacks and packs again to the same bytes."""
    frames: list[bytes] = []

    # Phases: examples that hypothesis has kept would come twice.
    @settings(
        max_examples=100,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(MESSAGES)
    def collect(value: dict[str, Any]) -> None:
        frames.append(pack(value))

    collect()
    (result,) = openpi({"do": "repack", "frames": [frame.hex() for frame in frames]})
    ours = [pack(unpack(frame, MessageLimits())) for frame in frames]
    assert ours == frames
    assert result["hashes"] == [hashlib.sha256(frame).hexdigest() for frame in frames]
