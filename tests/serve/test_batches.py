"""Clients whose observations are computed together: each gets what it would get alone."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import (
    IMAGE,
    SOON,
    Running,
    StateEngine,
    ask,
    ask_together,
    eventually,
    make_policy,
    observation,
    read,
    running,
)
from test_replicas import Cluster
from test_server import kill
from test_site import metric
from torch import Tensor
from websockets.sync.client import ClientConnection

from pi0.engines.base import Capabilities
from pi0.errors import EngineError
from pi0.inputs import ModelInputs
from pi0.policy import Policy, RealTimeChunking
from pi0.serve.answer import Answer, Answerer, Request
from pi0.serve.options import ServeOptions
from pi0.serve.server import PolicyServer
from pi0.serve.turns import Turns
from pi0.serve.wire import MessageLimits, pack, unpack

BAD = 13.0  # a state for which an engine of these tests fails


class FragileEngine(StateEngine):
    """Fails on some observations, with whatever is computed beside them."""

    def _sample(
        self, inputs: ModelInputs, noise: Tensor, steps: int, on_step: Callable[[], None]
    ) -> Tensor:
        actions = super()._sample(inputs, noise, steps, on_step)
        return actions.masked_fill(actions.round() == BAD, float("nan"))


@contextlib.contextmanager
def together(
    engine: StateEngine, clients: int, options: ServeOptions | None = None, **policy: Any
) -> Iterator[tuple[Running, list[ClientConnection], Callable[[Sequence[Any]], None]]]:
    """A server whose policy is busy with a first client, the other clients, and a function that
    sends them an observation each and lets the policy go on when all of them wait."""
    options = options or ServeOptions(batch=clients)
    with running(make_policy(engine, **policy), options) as served, contextlib.ExitStack() as stack:
        busy, *others = [stack.enter_context(served.connect()) for _ in range(clients + 1)]
        engine.batches.clear()
        while engine.started.acquire(blocking=False):
            pass  # the warm-up's
        engine.gate.clear()
        busy.send(pack(observation(0.5)))
        assert engine.started.acquire(timeout=SOON)

        def send(values: Sequence[Any]) -> None:
            for number, (client, value) in enumerate(zip(others, values, strict=True)):
                client.send(value if isinstance(value, (bytes, str)) else pack(value))
                eventually(lambda: waiting(served) == number + 1)  # noqa: B023 - called at once
            engine.gate.set()
            read(busy)

        yield served, others, send


def waiting(served: Running) -> int:
    return sum(session.waiting for session in list(served.server.sessions))


def test_eight_clients_get_their_own_actions_together() -> None:
    engine = StateEngine(seconds=0.02)
    rounds, count = 12, 8
    options = ServeOptions(batch=count, batch_wait=0.02)
    with running(make_policy(engine), options) as served:
        answers, wrong = ask_together(served, count, rounds)
        sizes = [answer["server_timing"]["batch"] for answer in answers]
        eventually(lambda: metric(served, "pi0_batch_size_count") == rounds * count)
        assert metric(served, "pi0_batch_size_sum") == sum(sizes)
    assert not wrong
    assert len(engine.computed) == 1 + count + rounds * count  # the warm-up's, alone and together
    assert sum(engine.batches[2:]) == rounds * count
    assert len(engine.batches[2:]) < rounds * count / 2  # one at a time would be all of them
    assert max(engine.batches) == count
    assert max(sizes) > 1


def test_those_that_wait_are_computed_together_and_no_more_than_allowed() -> None:
    engine = StateEngine()
    with together(engine, 3, ServeOptions(batch=2)) as (_, clients, send):
        send([observation(value) for value in (1, 2, 3)])
        for value, client in enumerate(clients, 1):
            np.testing.assert_allclose(read(client)["actions"], value, rtol=1e-5)
    assert engine.batches == [1, 2, 1]
    assert [round(value) for value in engine.computed[-3:]] == [1, 2, 3]  # as they came


def test_without_batches_each_is_computed_alone() -> None:
    engine = StateEngine()
    with together(engine, 3, ServeOptions()) as (_, clients, send):
        send([observation(value) for value in (1, 2, 3)])
        assert not any("batch" in read(client)["server_timing"] for client in clients)
    assert engine.batches == [1] * 4


def test_what_is_wrong_with_one_observation_is_its_own_error() -> None:
    engine = StateEngine()
    with together(engine, 4) as (_, clients, send):
        bad = observation(2, images={"bsae": IMAGE})
        send([observation(1), bad, observation(3, state=np.full(14, np.nan)), observation(4e4)])
        one, two, three, four = [read(client) for client in clients]
        assert "expected" in two
        assert "images/bsae" in two
        assert three.startswith("state: expected finite values")
        np.testing.assert_allclose(one["actions"], 1, rtol=1e-5)
        np.testing.assert_allclose(four["actions"], 4e4, rtol=1e-5)
        assert "warnings" not in one
        assert "state[0] = 40000" in four["warnings"][0]
        for client in clients:
            assert "actions" in ask(client, observation(5))
    assert engine.batches[:2] == [1, 2]


def test_what_makes_the_engine_fail_fails_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine = FragileEngine()
    with together(engine, 3) as (_, clients, send):
        send([observation(1), observation(BAD), observation(3)])
        one, two, three = [read(client) for client in clients]
    np.testing.assert_allclose(one["actions"], 1, rtol=1e-5)
    np.testing.assert_allclose(three["actions"], 3, rtol=1e-5)
    assert two.startswith("actions: expected finite values")
    assert engine.batches == [1, 3, 1, 1, 1]
    assert "a batch of 3 failed and is computed apart: EngineError: actions:" in caplog.text


def test_what_does_not_fit_together_is_computed_apart() -> None:
    """Another number of images, and a chunk that continues another one."""
    engine = StateEngine()
    two_images = {"images": {"base": IMAGE, "wrist": IMAGE}}
    rest = np.full((20, 14), 5, np.float32)
    real_time = RealTimeChunking(jacobian="identity")
    with together(engine, 5, real_time=real_time) as (_, clients, send):
        send(
            [
                observation(1),
                observation(2, **two_images),
                observation(3),
                observation(4, **two_images),
                observation(5, **{"pi0/previous": rest}),
            ]
        )
        for value, client in enumerate(clients, 1):
            answer = read(client)
            np.testing.assert_allclose(answer["actions"], value, rtol=1e-4)
            assert answer["server_timing"]["batch"] == (1 if value == 5 else 2)
    assert engine.batches == [1, 2, 2]


def test_a_client_is_waited_for_within_the_budget() -> None:
    engine = StateEngine()
    options = ServeOptions(batch=4, batch_wait=SOON)
    with running(make_policy(engine), options) as served, served.connect() as one:
        engine.batches.clear()
        assert "actions" in ask(one, observation(1))  # nobody else could come
        with served.connect() as two:
            start = time.monotonic()
            one.send(pack(observation(1)))
            time.sleep(0.1)
            two.send(pack(observation(2)))
            for value, client in enumerate((one, two), 1):
                np.testing.assert_allclose(read(client)["actions"], value, rtol=1e-5)
            assert time.monotonic() - start < SOON / 2
    assert engine.batches == [1, 2]


def test_the_budget_ends() -> None:
    engine = StateEngine()
    options = ServeOptions(batch=4, batch_wait=0.2)
    with (
        running(make_policy(engine), options) as served,
        served.connect() as one,
        served.connect(),  # who asks for nothing
    ):
        start = time.monotonic()
        assert "actions" in ask(one, observation(1))
        assert time.monotonic() - start >= 0.2


def test_a_client_that_leaves_is_no_loss_to_those_beside_it() -> None:
    engine = StateEngine()
    with together(engine, 2) as (served, (one, two), _):
        one.send(pack(observation(1)))
        two.send(pack(observation(2)))
        eventually(lambda: waiting(served) == 2)
        engine.gate.set()
        engine.seconds = 0.5
        assert engine.started.acquire(timeout=SOON)
        kill(one.socket)
        np.testing.assert_allclose(read(two)["actions"], 2, rtol=1e-5)
        assert engine.batches == [1, 2]


def test_a_batch_that_nobody_wants_is_left() -> None:
    engine = StateEngine()
    with together(engine, 2) as (served, (one, two), _):
        one.send(pack(observation(1)))
        two.send(pack(observation(2)))
        eventually(lambda: waiting(served) == 2)
        engine.seconds = 0.3
        engine.gate.set()
        assert engine.started.acquire(timeout=SOON)
        engine.seconds = SOON
        for client in (one, two):
            kill(client.socket)
        eventually(lambda: len(served.server.sessions) == 1)
        engine.seconds = 0.0
        with served.connect() as other:
            np.testing.assert_allclose(ask(other, observation(3))["actions"], 3, rtol=1e-5)
    assert engine.batches == [1, 1]
    assert 2 not in [round(value) for value in engine.computed]


def test_noise_is_each_clients_own(tiny_path: Path) -> None:
    """Of the model itself: each answer is that of its own observation and noise alone. Sums of a
    matrix product may be taken in another order for other numbers of rows: 1e-5 of values that are
    about 1."""
    count = 5
    sent = []
    for seed in range(count):
        chance = np.random.default_rng(seed)
        images = {
            name: chance.integers(0, 256, IMAGE.shape, np.uint8) for name in ("base", "wrist")
        }
        state, prompt = chance.uniform(-0.5, 0.5, 32), "go " * (seed + 1)
        seen = {"images": images, "state": state, "prompt": prompt}
        sent.append((seen, chance.standard_normal((50, 32), np.float32)))
    for engine in ("reference", "cpu"):
        with Policy.from_checkpoint(tiny_path, robot="generic", engine=engine, steps=2) as policy:
            answerer = Answerer(policy, MessageLimits(), count)
            frames = [pack({**seen, "pi0/noise": noise}) for seen, noise in sent]
            answers = answerer.answer([Request(frame, SOON) for frame in frames])
            for (seen, noise), answer in zip(sent, answers, strict=True):
                assert answer.batch == count
                assert isinstance(answer.frame, bytes)
                found = unpack(answer.frame, MessageLimits())["actions"]
                alone = policy.infer(seen, noise)["actions"]
                np.testing.assert_allclose(found, alone, atol=1e-5)


def test_an_engine_that_takes_one_at_a_time_is_refused() -> None:
    class OneEngine(StateEngine):
        name = "one"
        capabilities = Capabilities(precisions=("float32",), batch=False)

    policy = make_policy(OneEngine())
    with pytest.raises(EngineError, match="several observations at once, found one. Leave --batch"):
        PolicyServer(policy, ServeOptions(batch=2))
    encoded = policy.encode(observation(1))
    with pytest.raises(EngineError, match="several observations at once"):
        policy.sample([encoded, encoded])


def test_a_replica_computes_a_batch() -> None:
    engine = StateEngine()
    cluster = Cluster(engine)
    with (
        running(cluster.replicas(), ServeOptions(batch=2)) as served,
        served.connect() as busy,
        served.connect() as one,
        served.connect() as two,
    ):
        assert engine.started.acquire(timeout=SOON)  # the warm-up's
        engine.gate.clear()
        busy.send(pack(observation(9)))
        assert engine.started.acquire(timeout=SOON)
        one.send(pack(observation(1)))
        two.send(pack(observation(2, images={})))
        eventually(lambda: waiting(served) == 2)
        cluster.lose = 1
        engine.gate.set()
        np.testing.assert_allclose(read(one)["actions"], 1, rtol=1e-5)
        assert "camera" in read(two)
    assert [len(asked) for asked in cluster.asked] == [1, 2, 2]  # one was lost


def test_turns_go_round_in_the_order_of_arrival() -> None:
    """Whoever comes again stands behind those that wait, whatever the size of a batch."""
    computed: list[list[str]] = []

    async def compute(requests: Sequence[Request]) -> list[Answer]:
        computed.append([request.client for request in requests])
        await asyncio.sleep(0.005)
        return [Answer("", "ok", {})] * len(requests)

    async def client(turns: Turns, name: str) -> None:
        for _ in range(4):
            await turns.answer(lambda: Request(b"", SOON, name))

    async def run() -> None:
        turns = Turns(compute, batch=2)
        work = asyncio.create_task(turns.work())
        await asyncio.gather(*(client(turns, name) for name in "abcde"))
        work.cancel()

    asyncio.run(run())
    order = "".join(name for batch in computed for name in batch)
    assert order[:15] == "abcde" * 3
    assert sorted(order) == sorted("abcde" * 4)
    assert all(len(batch) == 2 for batch in computed)


def test_one_who_leaves_the_line_is_not_computed() -> None:
    asked: list[str] = []

    async def compute(requests: Sequence[Request]) -> list[Answer]:
        asked.extend(request.client for request in requests)
        return [Answer("", "ok", {})] * len(requests)

    async def run() -> None:
        turns = Turns(compute)
        stays, leaves = (
            asyncio.create_task(turns.answer(lambda name=name: Request(b"", SOON, name)))
            for name in "ab"
        )
        await asyncio.sleep(0)
        leaves.cancel()
        await asyncio.sleep(0)
        work = asyncio.create_task(turns.work())
        await stays
        await asyncio.sleep(0.01)
        work.cancel()

    asyncio.run(run())
    assert asked == ["a"]


def test_an_error_of_computing_ends_a_turn_and_not_the_line() -> None:
    async def compute(requests: Sequence[Request]) -> list[Answer]:
        if requests[0].client == "a":
            raise RuntimeError("pool")
        return [Answer("", "ok", {})]

    async def run() -> None:
        turns = Turns(compute)
        work = asyncio.create_task(turns.work())
        with pytest.raises(RuntimeError):
            await turns.answer(lambda: Request(b"", SOON, "a"))
        _, answer = await turns.answer(lambda: Request(b"", SOON, "b"))
        assert answer.outcome == "ok"
        work.cancel()

    asyncio.run(run())
