"""`pi0 serve --replicas 2` as a process, with a Ray that it starts for itself.

Ray is installed by `make test-ray`. Ray's own processes take a while to start: one server for all.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from serving import IMAGE, read
from websockets.sync.client import connect

from pi0.serve.wire import pack

pytest.importorskip("ray", reason="needs Ray (make test-ray)")

SRC = Path(__file__).parents[2] / "src"
START = 300.0  # seconds for Ray on a busy machine
PATIENCE = 120.0  # and for an answer
OBSERVATION = {
    "images": {"base": IMAGE, "wrist": IMAGE},
    "state": np.zeros(32),
    "prompt": "pick up the cube",
}
STEPS = "600"  # of denoising: a tiny model then takes long enough to be killed


@pytest.fixture(scope="module")
def served(tiny_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A server of two replicas: its address and its log."""
    log = tmp_path_factory.mktemp("ray") / "log"
    words = ["--robot", "generic", "--engine", "reference", "--port", "0", "--steps", STEPS]
    environment = {
        **os.environ,
        "PYTHONPATH": str(SRC),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment.pop("RAY_ADDRESS", None)
    with (
        # A folder of its own, so that no Ray that runs here is found; short, as sockets want it.
        tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, "-m", "pi0", "serve", tiny_path, "--replicas", "2", *words],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**environment, "RAY_TMPDIR": folder},
        ) as process,
    ):
        assert process.stdout
        found = re.search(r"ws://127\.0\.0\.1:\d+", process.stdout.readline())
        assert found, log.read_text()
        yield found[0], log
        process.send_signal(signal.SIGTERM)
        assert process.wait(START) == 0
    assert not replicas(found[0])


def replicas(address: str) -> list[int]:
    """The processes of this server's replicas, which bear its port in their names."""
    name = f"ServeReplica:pi0-{address.rpartition(':')[2]}:".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
        if words.startswith(b"ray::") and name in words:
            found.append(int(folder.name))
    return sorted(found)


def open_client(address: str) -> Any:
    return connect(address, compression=None, max_size=None, open_timeout=PATIENCE)


def answer(client: Any) -> Any:
    """The next answer of a server that may be slow."""
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return read(client)
        except TimeoutError:
            assert time.monotonic() < end


def test_a_killed_replica_loses_no_client(served: tuple[str, Path]) -> None:
    """Both compute when one is killed: its request is asked again, and Ray starts another."""
    address, log = served
    before = replicas(address)
    assert len(before) == 2
    with open_client(address) as a, open_client(address) as b:
        assert "robot" in answer(a)
        assert "robot" in answer(b)
        for client in (a, b):
            client.send(pack(OBSERVATION))
        time.sleep(1.0)
        os.kill(before[0], signal.SIGKILL)
        for client in (a, b):
            assert answer(client)["actions"].shape == (50, 32)
        for client in (a, b):
            client.send(pack(OBSERVATION))
            assert answer(client)["actions"].shape == (50, 32)
    assert "a replica was lost while it computed" in log.read_text()
    end = time.monotonic() + START
    while len(now := replicas(address)) < 2 or before[0] in now:
        assert time.monotonic() < end, "Ray did not replace it"
        time.sleep(0.5)


def test_answers_are_those_of_the_policy(served: tuple[str, Path]) -> None:
    """Errors are sentences of the policy, wherever it runs."""
    with open_client(served[0]) as client:
        answer(client)
        client.send(pack({**OBSERVATION, "state": np.zeros(33)}))
        assert answer(client).startswith("state: expected")
        client.send(pack(OBSERVATION))
        timing = (got := answer(client))["policy_timing"]
        assert np.isfinite(got["actions"]).all()
        assert timing["infer_ms"] > 0


def test_what_cannot_be(tiny_path: Path) -> None:
    command = [sys.executable, "-m", "pi0", "serve", tiny_path, "--robot", "generic"]
    command += ["--port", "0", "--max-replicas", "3"]
    environment = {**os.environ, "PYTHONPATH": str(SRC)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "--max-replicas: expected --replicas beside it" in done.stderr


def test_the_cluster_file_is_one() -> None:
    """Ray's launcher takes it; machines it would reach only with `ray up`."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    text = (SRC.parent / "examples" / "ray_cluster.yaml").read_text()
    validate_config(prepare_config(yaml.safe_load(text)))
