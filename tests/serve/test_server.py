"""Clients against a running server: fairness, order, faults, limits, shutdown."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from serving import (
    IMAGE,
    SOON,
    StateEngine,
    ask,
    ask_together,
    eventually,
    make_policy,
    observation,
    read,
    running,
)
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from pi0.errors import EngineError, ObservationError
from pi0.serve.answer import check_actions
from pi0.serve.options import ServeOptions
from pi0.serve.wire import MessageLimits, pack


def test_an_answer_has_openpis_keys() -> None:
    with running(make_policy(StateEngine())) as served, served.connect() as client:
        first, second = ask(client, observation(0.5)), ask(client, observation(0.25))
    assert list(first) == ["actions", "policy_timing", "server_timing"]
    assert first["actions"].shape == (50, 14)
    assert first["actions"].dtype == np.float32
    np.testing.assert_allclose(first["actions"], 0.5, rtol=1e-5)
    np.testing.assert_allclose(second["actions"], 0.25, rtol=1e-5)
    assert first["policy_timing"]["infer_ms"] > 0
    assert "prev_total_ms" not in first["server_timing"]
    assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]


def test_the_greeting_tells_no_paths() -> None:
    policy = make_policy(StateEngine(), metadata={"checkpoint": "/secret/place", "horizon": 50})
    with running(policy) as served, connect(f"ws://{served.address}") as client:
        greeting = read(client)
    assert greeting["horizon"] == 50
    assert greeting["engine"]["name"] == "state"
    assert "/secret" not in str(greeting)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        ("text", "expected a binary message"),
        (b"\xc1", "observation: expected a msgpack message"),
        (pack([1, 2]), "observation: expected a mapping"),
        (pack(observation(1, prompt=None)), "prompt: expected a sentence"),
        (pack(observation(1, state=None)), "expected 'state', found 'images', 'prompt'"),
        (pack({**observation(1), "state": None}), "expected 'state', found 'images', 'prompt'"),
        (pack(observation(1, state=np.zeros(3))), r"state: expected 14 values.*found shape \[3\]"),
        (pack(observation(1, state=np.full(14, np.nan))), "expected finite values, found nan"),
        (pack(observation(1, images={"base": IMAGE[0]})), r"\[H, W, 3\] or \[3, H, W\], found"),
        (pack(observation(1, images={"bsae": IMAGE})), "found also images/bsae"),
        (pack(observation(1, images={"base": IMAGE.astype(np.int32)})), "found int32"),
        (pack(observation(1, prompt="a\ud800".encode("utf-8", "surrogatepass"))), "UTF-8"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_an_error_is_a_text_and_the_next_observation_is_answered(
    frame: bytes | str, message: str
) -> None:
    with running(make_policy(StateEngine())) as served, served.connect() as client:
        client.send(frame)
        with pytest.raises(ObservationError, match=message):
            raise ObservationError(read(client))
        np.testing.assert_allclose(ask(client, observation(2))["actions"], 2, rtol=1e-5)


def test_latency_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    options = ServeOptions(log_interval=0.2)
    with running(make_policy(StateEngine()), options) as served, served.connect() as client:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            ask(client, observation(1))
    assert re.search(r"last 0 s: \d+ chunks, p50 \d+ ms, p99 \d+ ms, 0 errors, 1 c", caplog.text)


def test_an_internal_error_stays_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    policy = make_policy(StateEngine())
    decode = policy.decode

    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("/secret/place")

    with running(policy) as served, served.connect() as client:
        policy.decode = broken
        said = ask(client, observation(1))
        policy.decode = decode
        assert "actions" in ask(client, observation(1))
    assert said.startswith("server: expected an answer, found an internal error")
    assert "secret" not in said
    assert "ZeroDivisionError: /secret/place" in caplog.text


@pytest.mark.parametrize(
    "actions",
    [
        np.full((50, 14), np.nan, np.float32),
        np.full((50, 14), np.inf, np.float32),
        np.zeros((49, 14), np.float32),
        np.zeros((50, 14), np.float64),
        np.zeros((50, 15), np.float32),
        [[0.0] * 14] * 50,
    ],
    ids=["nan", "inf", "short", "float64", "wide", "list"],
)
def test_no_robot_gets_what_is_no_chunk(actions: Any) -> None:
    """Even of a policy that lies: what leaves is looked at once more."""
    policy = make_policy(StateEngine())
    true = policy.decode
    with running(policy) as served, served.connect() as client:
        policy.decode = lambda *a, **k: {**true(*a, **k), "actions": actions}
        said = ask(client, observation(1))
    assert isinstance(said, str)
    assert said.startswith("actions: expected")
    with pytest.raises(EngineError):
        check_actions(actions, (50, 14))


def test_an_engine_of_nan_is_an_error() -> None:
    engine = StateEngine()
    with running(make_policy(engine)) as served, served.connect() as client:
        engine.scale = float("nan")
        assert "expected finite values" in ask(client, observation(1))


def test_warnings_reach_the_client() -> None:
    with running(make_policy(StateEngine())) as served, served.connect() as client:
        (said,) = ask(client, observation(1e4))["warnings"]
    assert "state[0] = 10000" in said


def test_eight_clients_get_their_own_actions_in_turn() -> None:
    engine = StateEngine(seconds=0.004)
    rounds, count = 12, 8
    with running(make_policy(engine)) as served:
        _, wrong = ask_together(served, count, rounds)
    assert not wrong
    assert len(engine.computed) == 1 + rounds * count  # the warm-up's, too


def test_a_flooding_client_does_not_starve_another() -> None:
    """Turns go round: between two answers of one client the other computes at most twice, the
    second time if the first client is slow to ask again."""
    engine = StateEngine(seconds=0.1)
    done = threading.Event()

    def flood(client: Any) -> None:
        frame = pack(observation(1))
        while not done.is_set():
            client.send(frame)
            time.sleep(0.02)

    def drain(client: Any) -> None:
        for _ in client:
            pass

    with running(make_policy(engine)) as served, served.connect() as greedy:
        threads = [threading.Thread(target=work, args=(greedy,)) for work in (flood, drain)]
        for thread in threads:
            thread.start()
        with served.connect() as modest:
            eventually(lambda: [round(value) for value in engine.computed].count(1) > 3)
            for _ in range(5):
                np.testing.assert_allclose(ask(modest, observation(2))["actions"], 2, rtol=1e-5)
        done.set()
        threads[0].join()
        greedy.close()
        threads[1].join()
    order = [round(value) for value in engine.computed]
    first = order.index(2)
    last = len(order) - order[::-1].index(2)
    assert order[first:last].count(1) <= 2 * order.count(2)


def test_the_newest_observation_wins_and_answers_stay_in_order() -> None:
    engine = StateEngine()
    with running(make_policy(engine)) as served, served.connect() as client:
        engine.gate.clear()
        assert engine.started.acquire(timeout=SOON)  # the warm-up's
        client.send(pack(observation(1)))
        assert engine.started.acquire(timeout=SOON)
        for value in (2, 3, 4):
            client.send(pack(observation(value)))
        (session,) = served.server.sessions
        eventually(lambda: session._newest is not None and session._newest.superseded == 2)
        engine.gate.set()
        answers = [read(client) for _ in range(4)]
    np.testing.assert_allclose(answers[0]["actions"], 1, rtol=1e-5)
    assert [a.partition(":")[0] for a in answers[1:3]] == ["superseded"] * 2
    np.testing.assert_allclose(answers[3]["actions"], 4, rtol=1e-5)
    assert [round(v) for v in engine.computed] == [0, 1, 4]


def test_pings_are_answered_while_a_chunk_is_computed() -> None:
    """The client would drop a server that is silent for 1.5 seconds; the chunk takes four."""
    engine = StateEngine()
    with running(make_policy(engine)) as served:
        engine.seconds = 4.0
        with served.connect(ping_interval=0.2, ping_timeout=1.5) as client:
            assert "actions" in ask(client, observation(1))


def test_an_answer_that_comes_too_late_is_an_error() -> None:
    engine = StateEngine()
    options = ServeOptions(timeout=2.0)
    with running(make_policy(engine), options) as served, served.connect() as client:
        engine.seconds = SOON
        said = ask(client, observation(1))
        assert said.startswith("time: expected an answer within 2 s")
        engine.seconds = 0.0
        assert [round(v) for v in engine.computed] == [0]  # left at one of its steps
        assert "actions" in ask(client, observation(1))


def test_nothing_is_computed_for_a_client_that_left() -> None:
    engine = StateEngine()
    with running(make_policy(engine)) as served:
        engine.seconds = SOON
        engine.started.acquire(timeout=SOON)
        with served.connect() as client:
            client.send(pack(observation(1)))
            engine.started.acquire(timeout=SOON)
            kill(client.socket)
            eventually(lambda: not served.server.sessions)
        engine.seconds = 0.0
        with served.connect() as other:
            np.testing.assert_allclose(ask(other, observation(2))["actions"], 2, rtol=1e-5)
    assert [round(v) for v in engine.computed] == [0, 2]


def kill(sock: socket.socket) -> None:
    """Ends a connection as a process that is killed does: reset, without a word."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def test_a_client_killed_in_the_middle_of_a_frame() -> None:
    with running(make_policy(StateEngine())) as served, served.connect() as other:
        for sent in (2, 10, 5000):
            with served.connect() as client:
                frame = pack({"a": bytes(100_000)})
                header = bytes([0x82, 0xFF]) + len(frame).to_bytes(8, "big") + bytes(4)  # masked
                client.socket.sendall((header + frame)[:sent])
                kill(client.socket)
        eventually(lambda: len(served.server.sessions) == 1)
        assert "actions" in ask(other, observation(1))


def test_a_client_that_does_not_read_is_dropped_and_stalls_nobody() -> None:
    options = ServeOptions(send_timeout=0.5)
    with (
        running(make_policy(StateEngine()), options, send_buffer=4096) as served,
        served.connect() as other,
        socket.socket() as slow,
    ):
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect(("127.0.0.1", served.port))
        slow.sendall(
            b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
        )
        eventually(lambda: len(served.server.sessions) == 2)
        payload = pack("x")  # a short observation that is answered with a text
        frame = bytes([0x82, 0x80 | len(payload)]) + bytes(4) + payload
        slow.setblocking(False)
        end = time.monotonic() + SOON
        while len(served.server.sessions) == 2:
            assert time.monotonic() < end, "it was not dropped"
            with contextlib.suppress(BlockingIOError, ConnectionError):
                slow.send(frame * 100)
            np.testing.assert_allclose(ask(other, observation(2))["actions"], 2, rtol=1e-5)


def test_more_clients_than_allowed_are_told_so() -> None:
    with running(make_policy(StateEngine()), ServeOptions(max_clients=1)) as served:
        with served.connect(), pytest.raises(InvalidStatus) as refused, served.connect():
            pass
        assert refused.value.response.status_code == 503
        assert b"at most 1 at once" in refused.value.response.body
        eventually(lambda: not served.server.sessions)
        with served.connect() as client:
            assert "actions" in ask(client, observation(1))


def test_size_limits() -> None:
    limits = MessageLimits(message_bytes=10_000, array_bytes=5000)
    with running(make_policy(StateEngine()), ServeOptions(message=limits)) as served:
        with served.connect() as client:
            large = np.zeros((60, 60, 3), np.uint8)
            said = ask(client, observation(1, images={"base": large}))
            assert "expected a message of at most 10.0 kB" in said
            small = np.zeros((50, 40, 3), np.uint8)
            said = ask(client, observation(1, images={"base": small}))
            assert said.startswith("images/base: expected an array of at most 5.0 kB")
            assert "actions" in ask(client, observation(1))
            client.send(bytes(30_000))  # far beyond: not even read
            with pytest.raises(ConnectionClosed) as closed:
                read(client)
        assert closed.value.rcvd.code == 1009


def test_clients_wait_until_the_policy_is_warm() -> None:
    engine = StateEngine()
    engine.gate.clear()
    with running(make_policy(engine), wait=False) as served:
        engine.started.acquire(timeout=SOON)  # the warm-up, which is after the server listens
        with connect(f"ws://{served.address}") as client:
            client.send(pack(observation(1)))
            with pytest.raises(TimeoutError):
                client.recv(timeout=0.1)
            engine.gate.set()
            assert "server" in read(client)
            np.testing.assert_allclose(read(client)["actions"], 1, rtol=1e-5)


def test_a_server_that_is_stopped_while_it_warms_up_ends() -> None:
    engine = StateEngine(seconds=2 * SOON)  # of ten steps: it is left at one of them
    with running(make_policy(engine), wait=False) as served:
        engine.started.acquire(timeout=SOON)
        with connect(f"ws://{served.address}") as client:
            served.stop()
            with pytest.raises(ConnectionClosed) as closed:
                read(client)
            assert closed.value.rcvd.code == 1001
    assert not engine.computed


def test_a_policy_that_cannot_compute_ends_the_server() -> None:
    engine = StateEngine(scale=float("nan"))
    with pytest.raises(EngineError, match="expected finite"), running(make_policy(engine)):
        pass


def test_shutdown_delivers_what_is_under_way() -> None:
    engine = StateEngine()
    with running(make_policy(engine)) as served, served.connect() as a, served.connect() as b:
        engine.started.acquire(timeout=SOON)
        engine.seconds = 0.3
        a.send(pack(observation(1)))
        engine.started.acquire(timeout=SOON)
        b.send(pack(observation(2)))
        eventually(lambda: any(session.waiting for session in served.server.sessions))
        served.stop()
        for value, client in ((1, a), (2, b)):
            np.testing.assert_allclose(read(client)["actions"], value, rtol=1e-5)
            with pytest.raises(ConnectionClosed) as closed:
                read(client)
            assert closed.value.rcvd.code == 1001
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", served.port))


def test_shutdown_does_not_wait_for_ever() -> None:
    engine = StateEngine()
    options = ServeOptions(grace=0.1)
    with running(make_policy(engine), options) as served, served.connect() as client:
        engine.seconds = 5.0  # of ten steps: it is left at one of them
        client.send(pack(observation(1)))
        eventually(lambda: any(session.busy for session in served.server.sessions))
        served.stop()
        with pytest.raises(ConnectionClosed) as closed:
            read(client)
        assert closed.value.rcvd.code == 1001


def test_the_real_engine_is_served(tiny_path: Any) -> None:
    from pi0.policy import Policy

    policy = Policy.from_checkpoint(tiny_path, robot="generic", engine="reference")
    noise = Policy.from_checkpoint(tiny_path, robot="generic", engine="reference").draw_noise()
    state = np.linspace(-0.5, 0.5, 32)
    sent = {"images": {"base": IMAGE, "wrist": IMAGE}, "state": state, "prompt": "go"}
    with policy, running(policy) as served, served.connect() as client:
        answer = ask(client, sent)
    alone = Policy.from_checkpoint(tiny_path, robot="generic", engine="reference")
    with alone:
        expected = alone.infer(sent, noise=torch.as_tensor(noise))["actions"]
    np.testing.assert_array_equal(answer["actions"], expected)
