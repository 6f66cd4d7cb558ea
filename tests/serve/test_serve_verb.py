"""`pi0 serve` as a process: it starts, ends, is killed and comes back."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serving import IMAGE, SOON, StateEngine, ask, make_policy, read, running
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from pi0.data.lock import locked
from pi0.policy import RealTimeChunking
from pi0.serve.wire import pack

SRC = Path(__file__).parents[2] / "src"
OBSERVATION = {
    "observation/image": IMAGE,
    "observation/wrist_image": IMAGE,
    "observation/state": np.zeros(8),
    "prompt": "go",
}


@pytest.fixture(scope="module")
def libero(tmp_path_factory: pytest.TempPathFactory, tiny_path: Path) -> Path:
    """The tiny checkpoint with statistics of 8 states and 7 actions."""
    folder = tmp_path_factory.mktemp("serve") / "libero"
    shutil.copytree(tiny_path, folder)
    values = {"mean": 0.0, "std": 1.0, "q01": -1.0, "q99": 1.0}
    stats = {
        what: {name: [value] * width for name, value in values.items()}
        for what, width in (("state", 8), ("actions", 7))
    }
    (path,) = folder.glob("assets/*/norm_stats.json")
    path.write_text(json.dumps({"norm_stats": stats}))
    return folder


def command(checkpoint: Path, *words: str) -> list[str]:
    fixed = [sys.executable, "-m", "pi0", "serve", str(checkpoint), "--robot", "libero"]
    return [*fixed, "--engine", "reference", *words]


@contextlib.contextmanager
def served(checkpoint: Path, port: int = 0) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that is ready, and its address."""
    with subprocess.Popen(
        command(checkpoint, "--port", str(port)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(SRC)},
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup of the tests
    ) as process:
        try:
            assert process.stdout
            assert process.stderr
            line = process.stdout.readline()
            found = re.match(r"serving robot libero on (ws://127\.0\.0\.1:\d+), live page", line)
            assert found, process.stderr.read()
            yield process, found[1]
        finally:
            process.kill()
            process.stdout.close()
            process.stderr.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_it_after_the_answer(libero: Path, number: signal.Signals) -> None:
    with served(libero) as (process, address), connect(address, compression=None) as client:
        assert read(client)["robot"]["name"] == "libero"
        assert ask(client, OBSERVATION)["actions"].shape == (50, 7)
        process.send_signal(number)
        with pytest.raises(ConnectionClosed) as closed:
            read(client)
        assert closed.value.rcvd.code == 1001
        assert process.wait(SOON) == 0
        assert process.stderr
        log = process.stderr.read()
    assert re.search(r"\d INFO client 127\.0\.0\.1:\d+: connected, 1 in all", log)
    assert "Traceback" not in log


def test_killed_and_started_again_while_clients_reconnect(libero: Path) -> None:
    """A client that tries again gets actions of the next process on the same port."""
    with served(libero) as (process, address), connect(address, compression=None) as client:
        read(client)
        client.send(pack(OBSERVATION))
        process.kill()
        process.wait()
        with pytest.raises(ConnectionClosed):
            read(client) and read(client)
    port = int(address.rpartition(":")[2])
    with served(libero, port) as (_, again):
        assert again == address
        end = time.monotonic() + SOON
        while True:
            try:
                with connect(address, compression=None) as client:
                    read(client)
                    assert ask(client, OBSERVATION)["actions"].shape == (50, 7)
                break
            except (OSError, ConnectionClosed):
                assert time.monotonic() < end


def test_the_example_gets_actions_and_errors() -> None:
    example = Path(__file__).parents[2] / "examples" / "robot_client.py"
    real_time = RealTimeChunking(jacobian="identity")
    for robot, code in (("libero", 0), ("aloha", 1)):
        with running(make_policy(StateEngine(), robot, real_time=real_time)) as server:
            done = subprocess.run(
                [sys.executable, example, f"ws://{server.address}", "2", "--real-time"],
                capture_output=True,
                text=True,
                timeout=300,
            )
        assert done.returncode == code, done.stderr
        if code:
            assert done.stderr.startswith("observation: expected for robot aloha the cameras")
        else:
            assert done.stdout.count("50 actions, the first: [") == 2
    for words in ([], ["127.0.0.1:8000", "3"], ["ws://127.0.0.1:8000", "three"]):
        command = [sys.executable, example, *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.stderr.startswith("A robot's side of `pi0 serve`")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--host", "0.0.0.0"], "--host: expected --api-key-file beside an address"),
        (["--api-key-file", "none"], "--api-key-file: expected a file with a key"),
        (["--api-key-file", "~/none"], f"found none in {Path('~/none').expanduser()} ("),
        (["--tls-cert", "~/c", "--tls-key", "k"], f"found {Path('~/c').expanduser()} and k (No su"),
        (["--tls-cert", "none"], "--tls-cert, --tls-key: expected both or neither"),
        (["--host", "192.0.2.1"], "--host, --port: expected an address"),
        (["--batch-wait", "5"], "--batch-wait: expected --batch beside it, found none"),
        (["--batch", "1000000000", "--engine", "reference"], "1000000000 at a time: at least"),
        (["--on-limit", "no"], "on_limit: expected one of error, clamp, warn"),
        (["--robot", "aloha"], "state"),
        (["--record", "other"], "expected a new folder or a dataset written by pi0, found meta/"),
        (["--record", "held"], "expected a folder that no other process is writing into"),
    ],
    ids=str,
)
def test_refused_with_one_sentence(
    libero: Path,
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    from pi0.cli.main import main

    (tmp_path / "other" / "meta").mkdir(parents=True)
    (tmp_path / "other" / "meta" / "info.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["pi0", *command(libero, "--port", "0", *words)[3:]])
    with locked(tmp_path / "held"), pytest.raises(SystemExit) as ended:
        main()
    captured = capsys.readouterr()
    assert ended.value.code == 2
    assert message in captured.err
    assert "Traceback" not in captured.err


def test_what_a_killed_server_left_half_written_is_removed(
    libero: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from pi0.cli.main import main

    part = tmp_path / "videos" / ".file-001.mp4.12345.part"
    part.parent.mkdir()
    part.touch()
    words = command(libero, "--port", "0", "--record", str(tmp_path), "--dtype", "int3")
    monkeypatch.setattr(sys, "argv", ["pi0", *words[3:]])
    with pytest.raises(SystemExit):
        main()
    assert not part.exists()


def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], libero: Path
) -> None:
    from pi0 import serve
    from pi0.cli.main import main

    monkeypatch.setattr(serve, "PACKAGES", ("websockets", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["pi0", *command(libero)[3:]])
    with pytest.raises(SystemExit):
        main()
    assert "found no no_such_package" in capsys.readouterr().err
