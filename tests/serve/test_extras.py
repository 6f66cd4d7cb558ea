"""Optional keys beside an observation: noise and the previous chunk over the wire, and the client
of our own that sends them."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serving import (
    IMAGE,
    SOON,
    StateEngine,
    ask,
    eventually,
    make_policy,
    observation,
    running,
)
from test_openpi_client import certificate
from websockets.sync.server import ServerConnection, serve

from pi0 import ActionBuffer, Policy, RealTimeChunking
from pi0.errors import ConfigError, EngineError, ObservationError, Pi0Error
from pi0.policy import ROBOTS, ActionLimits
from pi0.serve import client as client_module
from pi0.serve.binding import make_tls
from pi0.serve.client import ServerPolicy
from pi0.serve.extras import Extras, add_extras, split_extras
from pi0.serve.options import ServeOptions
from pi0.serve.wire import MessageLimits, pack, unpack

SEEN = {"images": {"base": IMAGE}, "state": np.linspace(-0.5, 0.5, 32), "prompt": "go"}


@pytest.fixture(scope="module")
def policy(tiny_path: Path) -> Policy:
    return Policy.from_checkpoint(
        tiny_path, robot="generic", engine="reference", steps=3, real_time=RealTimeChunking()
    )


def test_noise_and_previous_over_the_wire(policy: Policy) -> None:
    """Bit for bit what `infer` gives in this process; the delay counts."""
    noises = np.random.default_rng(0).standard_normal((2, 50, 32), np.float32)
    alone = policy.infer(SEEN, noises[0])["actions"]
    rest = alone[20:]
    expected = {
        delay: policy.infer(SEEN, noises[1], previous=rest, delay=delay)["actions"]
        for delay in (0, 10)
    }
    with running(policy) as served, ServerPolicy(f"ws://{served.address}") as client:
        assert client.metadata["noise_shape"] == [50, 32]
        assert client.metadata["real_time"]["jacobian"] == "exact"
        np.testing.assert_array_equal(client.infer(SEEN, noises[0])["actions"], alone)
        for delay, chunk in expected.items():
            answer = client.infer(SEEN, noises[1], previous=rest, delay=delay)
            np.testing.assert_array_equal(answer["actions"], chunk)
            assert "warnings" not in answer
    free = policy.infer(SEEN, noises[1])["actions"]
    jump = {name: np.abs(c[:10] - rest[:10]).mean() for name, c in {**expected, -1: free}.items()}
    assert jump[10] < 0.1 * jump[-1]
    assert jump[10] < jump[0]


def test_the_buffer_inpaints_through_a_server(policy: Policy) -> None:
    """With an execution horizon of all actions but one, what is left is one action."""
    with running(policy) as served, ServerPolicy(f"ws://{served.address}") as client:
        with ActionBuffer(client, execution_horizon=5, overlap="inpaint") as buffer:
            actions = [buffer.step(SEEN) for _ in range(60)]
        outcomes = served.server.metrics.outcomes
    assert all(np.isfinite(action).all() for action in actions)
    assert set(outcomes) == {"ok"}
    assert outcomes["ok"] >= 2


def test_limits_hold_at_the_border_of_a_servers_chunks(tiny_path: Path) -> None:
    none = (None,) * 32
    limits = ActionLimits(none, none, (0.01,) * 32, none)
    robot = replace(ROBOTS["generic"], action_dim=32, limits=limits)
    made = Policy.from_checkpoint(
        tiny_path, robot=robot, engine="reference", steps=1, on_limit="clamp"
    )
    with running(made) as served, ServerPolicy(f"ws://{served.address}") as client:
        assert client.limits == made.robot.limits
        with ActionBuffer(client, execution_horizon=5) as buffer:
            actions = np.array([buffer.step(SEEN) for _ in range(100)])
        assert served.server.metrics.outcomes["ok"] >= 2
    assert np.abs(np.diff(actions, axis=0)).max() < 0.01 + 1e-6


CHUNK = np.zeros((3, 14), np.float32)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pi0/reset": 1}, "pi0/reset: expected true or false, found 1"),
        ({"pi0/rset": True}, "that begins with pi0/ but pi0/previous, pi0/delay, pi0/noise, pi0/r"),
        ({"pi0/delay": 2}, "pi0/delay: expected beside pi0/previous, found alone"),
        ({"pi0/previous": CHUNK, "pi0/delay": 1.5}, "pi0/delay: expected a whole number, found 1"),
        ({"pi0/previous": CHUNK, "pi0/delay": True}, "pi0/delay: expected a whole number"),
        ({"pi0/previous": [[0.0]]}, "pi0/previous: expected an array of numbers, found a list"),
        ({"pi0/noise": np.array("text")}, "pi0/noise: expected an array of numbers, found <U4"),
        ({"pi0/noise": np.zeros((3, 32))}, r"^pi0/noise: expected float32 \[50, 32\], found"),
        ({"pi0/noise": np.zeros((2, 50, 32))}, r"^pi0/noise: expected float32 \[1, 50, 32\], f"),
        ({"pi0/noise": np.full((50, 32), np.nan)}, "^pi0/noise: expected finite values"),
        ({"pi0/previous": CHUNK}, "pi0/previous: expected a server that continues chunks, found"),
    ],
    ids=str,
)
def test_extra_keys_are_checked(extra: dict[str, Any], message: str) -> None:
    with running(make_policy(StateEngine())) as served, served.connect() as client:
        with pytest.raises(ObservationError, match=message):
            raise ObservationError(ask(client, observation(1, **extra)))
        assert "actions" in ask(client, observation(1, **{"pi0/reset": True}))


@pytest.mark.parametrize(
    ("previous", "delay", "message"),
    [
        (np.zeros((51, 32)), 0, "^pi0/previous: expected 1 to 50 actions"),
        (np.zeros((3, 31)), 0, r"^pi0/previous: expected .*32\], found shape \[3, 31\]"),
        (np.zeros((3, 32)), 51, "^pi0/delay: expected a whole number of ticks from 0 to 50"),
        (np.full((3, 32), np.nan), 0, "^pi0/previous: expected finite values"),
    ],
)
def test_a_previous_chunk_that_is_none(
    policy: Policy, previous: Any, delay: int, message: str
) -> None:
    with running(policy) as served, ServerPolicy(f"ws://{served.address}") as client:
        with pytest.raises(ObservationError, match=message):
            client.infer(SEEN, previous=previous, delay=delay)
        assert "actions" in client.infer(SEEN)


def test_there_and_back() -> None:
    seen, said = split_extras(add_extras(SEEN, Extras(CHUNK, 2, np.ones((2, 2)), reset=True)))
    assert seen.keys() == SEEN.keys()
    np.testing.assert_array_equal(said.previous, CHUNK)
    np.testing.assert_array_equal(said.noise, np.ones((2, 2)))
    assert (said.delay, said.reset) == (2, True)


def test_tensors_and_pictures_are_sent_as_arrays(policy: Policy) -> None:
    """What a `Policy` takes the client takes, with the same actions."""
    tensors = {
        "images": {"base": torch.from_numpy(IMAGE), "wrist": Image.fromarray(IMAGE)},
        "state": torch.linspace(-0.5, 0.5, 32).bfloat16(),
        "prompt": ["go"],
    }
    noise = np.ones(policy.noise_shape, np.float32)
    with running(policy) as served, ServerPolicy(f"ws://{served.address}") as client:
        np.testing.assert_array_equal(
            client.infer(tensors, noise)["actions"], policy.infer(tensors, noise)["actions"]
        )
        rest = torch.zeros(5, 32, dtype=torch.bfloat16)
        np.testing.assert_array_equal(
            client.infer(tensors, torch.from_numpy(noise), previous=rest)["actions"],
            policy.infer(tensors, noise, previous=rest)["actions"],
        )


def test_what_the_client_says_of_a_server() -> None:
    with pytest.raises(Pi0Error, match=r"server: expected an address such as ws://127\.0\.0\.1"):
        ServerPolicy("127.0.0.1:8000")
    options = ServeOptions(api_key="0123456789abcdef", max_clients=1)
    with running(make_policy(StateEngine()), options) as served:
        address = f"ws://{served.address}"
        with pytest.raises(Pi0Error, match="expected to be let in, found HTTP 401: key: expected"):
            ServerPolicy(address)
        with ServerPolicy(address, options.api_key) as client:
            with pytest.raises(ObservationError, match="state: expected 14 values"):
                client.infer(observation(1, state=np.zeros(3)))
            assert client.infer(observation(1))["actions"].shape == (50, 14)
            served.stop()
            eventually(lambda: not served.server.sessions)
            with pytest.raises(Pi0Error, match="expected a connection, found that it has ended"):
                client.infer(observation(1))
    with pytest.raises(Pi0Error, match="expected one that answers, found: .*Start it with"):
        ServerPolicy(address, timeout=1)


@pytest.mark.parametrize(
    ("address", "options", "message"),
    [
        ("ws://127.0.0.1:99999", {}, "server: expected an address such as"),
        ("ws://127.0.0.1:port", {}, "server: expected an address such as"),
        ("ws://[::1", {}, "server: expected an address such as"),
        ("ws://127.0.0.1:1", {"timeout": np.nan}, "timeout: expected a number of seconds"),
        ("ws://127.0.0.1:1", {"timeout": np.inf}, "timeout: expected a number of seconds"),
        ("ws://127.0.0.1:1", {"api_key": "a\nb"}, r"api_key: expected printable ASCII [^\n]+$"),
        ("ws://127.0.0.1:1", {"api_key": "schlüssel"}, "api_key: expected printable ASCII"),
    ],
)
def test_what_no_server_can_be(address: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(Pi0Error, match=message):
        ServerPolicy(address, **options)


def test_a_key_as_a_file_has_it() -> None:
    key = "0123456789abcdef"
    with (
        running(make_policy(StateEngine()), ServeOptions(api_key=key)) as served,
        ServerPolicy(f"ws://{served.address}", f"{key}\n") as client,
    ):
        assert client.infer(observation(1))["actions"].shape == (50, 14)


def test_a_certificate_that_nobody_here_trusts(tmp_path: Path) -> None:
    options = ServeOptions(tls=make_tls(*certificate(tmp_path)))
    message = r"expected a certificate .*self.signed.* SSL_CERT_FILE=FILE"
    with (
        running(make_policy(StateEngine()), options) as served,
        pytest.raises(Pi0Error, match=message),
    ):
        ServerPolicy(f"wss://{served.address}")


def test_no_answer_in_time() -> None:
    engine = StateEngine()
    with (
        running(make_policy(engine)) as served,
        ServerPolicy(f"ws://{served.address}", timeout=2.0) as client,
    ):
        engine.gate.clear()
        with pytest.raises(Pi0Error, match=r"expected an answer within 2 s, found none"):
            client.infer(observation(1))
        engine.gate.set()
        with pytest.raises(Pi0Error, match="found that it has ended"):  # and no late answer
            client.infer(observation(2))


@contextlib.contextmanager
def foreign(talk: Callable[[ServerConnection], None]) -> Iterator[str]:
    """The address of a server that is not ours, such as openpi's."""

    def handle(connection: ServerConnection) -> None:
        connection.send(pack({}))
        talk(connection)

    with serve(handle, "127.0.0.1", 0, compression=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"


def test_actions_of_others_are_looked_at() -> None:
    def talk(connection: ServerConnection) -> None:
        for actions in (np.full((50, 14), np.nan), np.zeros(14), np.zeros((50, 14))):
            connection.recv()
            connection.send(pack({"actions": actions}))

    with foreign(talk) as address, ServerPolicy(address) as client:
        with pytest.raises(EngineError, match="actions: expected finite values, found NaN"):
            client.infer(SEEN)
        with pytest.raises(EngineError, match=r"actions: expected numbers \[n, D\]"):
            client.infer(SEEN)
        assert client.infer(SEEN)["actions"].shape == (50, 14)


def test_a_server_that_would_not_continue_a_chunk() -> None:
    """openpi's ignores keys that it does not know: the robot would jump at each border."""
    with foreign(lambda connection: connection.recv()) as address, ServerPolicy(address) as client:
        with pytest.raises(ConfigError, match="server started with --real-time, found one without"):
            ActionBuffer(client, execution_horizon=4, overlap="inpaint")
        with pytest.raises(ConfigError, match="to continue chunks, found that it does not say so"):
            client.infer(SEEN, previous=CHUNK)


@pytest.mark.parametrize("side", [32, 4000])
def test_a_server_that_hangs(side: int) -> None:
    """It does not answer, or does not even read what is too much for the buffers between."""
    hangs = threading.Event()

    def talk(connection: ServerConnection) -> None:
        connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with connection.protocol_mutex:  # which reading needs
            hangs.wait(60)

    with foreign(talk) as address, ServerPolicy(address, timeout=2.0) as client:
        time.sleep(0.2)
        start = time.monotonic()
        with pytest.raises(Pi0Error, match=r"expected an answer within 2 s, found none"):
            client.infer({"image": np.zeros((side, side, 3), np.uint8)})
        assert time.monotonic() - start < SOON
        hangs.set()


def test_a_server_that_answers_no_pings(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def talk(connection: ServerConnection) -> None:
        connection.protocol.receive_data = lambda data: None
        done.wait(SOON)

    done = threading.Event()
    pings = {"ping_interval": 0.1, "ping_timeout": 0.1, "close_timeout": 0.1}
    monkeypatch.setattr("pi0.serve.client.connect", partial(client_module.connect, **pings))
    message = r"found that it has ended: .*keepalive ping timeout"
    with foreign(talk) as address:
        with pytest.raises(Pi0Error, match=message), ServerPolicy(address) as client:
            client.infer(observation(1))
        done.set()
    assert caplog.text == ""


def test_threads_get_their_own_answers() -> None:
    """A chunk that a reset has forgotten may still be computed when the next one is asked for."""
    with (
        running(make_policy(StateEngine(0.002))) as served,
        ServerPolicy(f"ws://{served.address}") as client,
        ThreadPoolExecutor(8) as pool,
    ):
        chunks = pool.map(lambda i: client.infer(observation(i)), range(40))
        assert [round(float(c["actions"][0, 0])) for c in chunks] == list(range(40))


def test_interrupted_between_question_and_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        running(make_policy(StateEngine())) as served,
        ServerPolicy(f"ws://{served.address}") as client,
    ):
        send = client._connection.send

        def interrupted(frame: bytes) -> None:
            send(frame)
            raise KeyboardInterrupt

        monkeypatch.setattr(client._connection, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.infer(observation(1))
        monkeypatch.undo()
        with pytest.raises(Pi0Error, match="found that it has ended"):
            client.infer(observation(2))


def test_the_example_continues_no_chunk_across_a_restart() -> None:
    """By the time that it is connected again, the rest of its chunk is over."""
    told = []

    def talk(connection: ServerConnection) -> None:
        for _ in range(2):
            told.append("pi0/previous" in unpack(connection.recv(), MessageLimits()))
            connection.send(pack({"actions": np.zeros((50, 7), np.float32)}))

    example = Path(__file__).parents[2] / "examples" / "robot_client.py"
    with foreign(talk) as address:
        words = [sys.executable, example, address, "4", "--real-time"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert told == [False, True] * 2


def test_an_episode_begins_with_what_is_answered() -> None:
    told = []

    def talk(connection: ServerConnection) -> None:
        for answer in ("camera base: expected an image, found none.", {"actions": CHUNK}):
            told.append(unpack(connection.recv(), MessageLimits()).get("pi0/reset", False))
            connection.send(answer if isinstance(answer, str) else pack(answer))

    with foreign(talk) as address, ServerPolicy(address) as client:
        with pytest.raises(ObservationError, match="camera base"):
            client.infer(SEEN)
        client.infer(SEEN)
    assert told == [True, True]
