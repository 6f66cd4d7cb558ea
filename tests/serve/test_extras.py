"""Optional keys beside an observation: noise and the previous chunk over the wire, and the client
of our own that sends them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import IMAGE, StateEngine, ask, eventually, make_policy, observation, running

from pi0 import ActionBuffer, Policy, RealTimeChunking
from pi0.errors import ObservationError, Pi0Error
from pi0.serve.client import ServerPolicy
from pi0.serve.extras import Extras, add_extras, split_extras
from pi0.serve.options import ServeOptions

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


CHUNK = np.zeros((3, 14), np.float32)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pi0/reset": 1}, "pi0/reset: expected true or false, found 1"),
        ({"pi0/rset": True}, "that begin with pi0/ only pi0/previous, pi0/delay, pi0/noise, pi0/"),
        ({"pi0/delay": 2}, "pi0/delay: expected beside pi0/previous, found alone"),
        ({"pi0/previous": CHUNK, "pi0/delay": 1.5}, "pi0/delay: expected a whole number, found 1"),
        ({"pi0/previous": CHUNK, "pi0/delay": True}, "pi0/delay: expected a whole number"),
        ({"pi0/previous": [[0.0]]}, "pi0/previous: expected an array of numbers, found a list"),
        ({"pi0/noise": np.array("text")}, "pi0/noise: expected an array of numbers, found <U4"),
        ({"pi0/noise": np.zeros((3, 32))}, r"noise: expected float32 \[1, 50, 32\], found"),
        ({"pi0/noise": np.full((50, 32), np.nan)}, "noise: expected finite values"),
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
        (np.zeros((51, 32)), 0, "previous: expected 1 to 50 actions"),
        (np.zeros((3, 31)), 0, r"previous: expected .*32\], found shape \[3, 31\]"),
        (np.zeros((3, 32)), 51, "delay: expected a number of ticks from 0 to 50"),
        (np.full((3, 32), np.nan), 0, "previous: expected finite values"),
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


def test_no_answer_in_time() -> None:
    engine = StateEngine()
    with (
        running(make_policy(engine)) as served,
        ServerPolicy(f"ws://{served.address}", timeout=0.2) as client,
    ):
        engine.gate.clear()
        with pytest.raises(Pi0Error, match=r"expected an answer within 0\.2 s, found none"):
            client.infer(observation(1))
        engine.gate.set()
        with pytest.raises(Pi0Error, match="found that it has ended"):  # and no late answer
            client.infer(observation(2))
