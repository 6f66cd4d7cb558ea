"""Several replicas behind one server, without Ray: threads stand for its processes.

With Ray: tests/serve/test_replicas_ray.py.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from serving import (
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
from test_record import episodes
from torch import Tensor

from pi0.checkpoint import memory
from pi0.checkpoint.locate import find_files
from pi0.cli.main import main
from pi0.data import Dataset
from pi0.errors import ConfigError, EngineError, Pi0Error
from pi0.policy import Policy, PolicyOptions, RealTimeChunking
from pi0.serve import cluster, record
from pi0.serve.answer import Answer
from pi0.serve.client import ServerPolicy
from pi0.serve.cluster import Scale, require_ray
from pi0.serve.options import ServeOptions
from pi0.serve.replicas import PolicyReplica, Recipe, Replicas
from pi0.serve.wire import MessageLimits, pack


class LostError(Exception):
    """A replica is gone."""


class Response:
    """As much of Ray's DeploymentResponse as a server uses."""

    def __init__(self, task: Future[list[Answer]]) -> None:
        self.task, self.cancelled = task, False

    def result(self, timeout_s: float) -> list[Answer]:
        try:
            return self.task.result(timeout_s)
        except TimeoutError:
            raise
        except Exception as error:
            if type(error).__name__ == "TimeoutError":  # of Python 3.10's futures
                raise TimeoutError from error
            raise

    def cancel(self) -> None:
        self.cancelled = True


class Cluster:
    """Replicas in threads, one for each engine or policy; `lose` of the next requests lose
    theirs."""

    def __init__(self, *given: StateEngine | Policy) -> None:
        policies = [make_policy(one) if isinstance(one, StateEngine) else one for one in given]
        self.pipeline = policies[0].pipeline
        self.made = [replica_of(policy) for policy in policies]
        self.idle = list(self.made)
        self.lose, self.asked = 0, list[list[dict[str, Any]]]()
        self.responses: list[Response] = []
        self._pool = ThreadPoolExecutor(len(policies))

    def ask(self, requests: list[dict[str, Any]], ages: list[float]) -> Response:
        self.asked.append(requests)
        lost, self.lose = self.lose > 0, max(0, self.lose - 1)
        self.responses.append(Response(self._pool.submit(self._answer, requests, ages, lost)))
        return self.responses[-1]

    def _answer(
        self, requests: list[dict[str, Any]], ages: list[float], lost: bool
    ) -> list[Answer]:
        if lost:
            raise LostError("killed")
        replica = self.idle.pop()
        try:
            return asyncio.run(replica.answer(requests, ages))
        finally:
            self.idle.append(replica)

    def replicas(self, **options: Any) -> Replicas:
        limits, made = MessageLimits(), self.made[0].describe()
        return Replicas(
            self.ask, self.pipeline, limits, made, len(self.made), lost=LostError, **options
        )


def replica_of(policy: Any) -> PolicyReplica:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "make", lambda _: policy)
        return PolicyReplica(Recipe(Path("nowhere"), PolicyOptions(), "reference"))


def test_eight_clients_get_their_own_actions_of_two_replicas() -> None:
    cluster = Cluster(StateEngine(seconds=0.01), StateEngine(seconds=0.01))
    with running(cluster.replicas()) as served:
        _, wrong = ask_together(served, 8, 8)
    assert not wrong
    assert len(cluster.asked) == 64


def test_two_requests_are_computed_at_the_same_time() -> None:
    engines = [StateEngine(), StateEngine()]
    with running(Cluster(*engines).replicas()) as served:
        for engine in engines:
            assert engine.started.acquire(timeout=SOON)  # the warm-up's
            engine.gate.clear()
        with served.connect() as a, served.connect() as b:
            a.send(pack(observation(1)))
            b.send(pack(observation(2)))
            for engine in engines:
                assert engine.started.acquire(timeout=SOON)
            for engine in engines:
                engine.gate.set()
            np.testing.assert_allclose(read(a)["actions"], 1, rtol=1e-5)
            np.testing.assert_allclose(read(b)["actions"], 2, rtol=1e-5)


def test_a_lost_replica_costs_nobody_an_answer(caplog: pytest.LogCaptureFixture) -> None:
    """The request is asked once more, with the noise that it had."""
    cluster = Cluster(StateEngine(), StateEngine())
    with running(cluster.replicas()) as served, served.connect() as client:
        cluster.lose = 1
        np.testing.assert_allclose(ask(client, observation(1))["actions"], 1, rtol=1e-5)
        (first,), (second,) = cluster.asked
        assert torch.equal(first["noise"], second["noise"])
        np.testing.assert_allclose(ask(client, observation(2))["actions"], 2, rtol=1e-5)
    assert not torch.equal(cluster.asked[2][0]["noise"], first["noise"])
    assert "a replica was lost while it computed (killed)" in caplog.text


def test_two_lost_replicas_are_an_error_and_the_connection_stays() -> None:
    cluster = Cluster(StateEngine(), StateEngine())
    with running(cluster.replicas()) as served, served.connect() as client:
        cluster.lose = 2
        assert "two replicas were lost" in ask(client, observation(1))
        np.testing.assert_allclose(ask(client, observation(2))["actions"], 2, rtol=1e-5)


def test_a_client_that_left_is_not_waited_for() -> None:
    engine = StateEngine()
    cluster = Cluster(engine)
    with running(cluster.replicas()) as served:
        engine.gate.clear()
        with served.connect() as client:
            client.send(pack(observation(1)))
            eventually(lambda: len(cluster.responses) == 1)
        eventually(lambda: cluster.responses[0].cancelled)
        engine.gate.set()


def test_errors_of_a_replica_reach_the_client() -> None:
    with running(Cluster(StateEngine()).replicas()) as served, served.connect() as client:
        assert "camera" in ask(client, observation(1, images={}))
        assert "actions" in ask(client, observation(1))


def test_noise_follows_from_the_seed() -> None:
    drawn: list[list[Tensor]] = []
    for _ in range(2):
        cluster = Cluster(StateEngine())
        with running(cluster.replicas(seed=7)) as served, served.connect() as client:
            for value in (1, 2):
                ask(client, observation(value))
        drawn.append([asked["noise"] for (asked,) in cluster.asked])
    assert all(torch.equal(a, b) for a, b in zip(*drawn, strict=True))


def test_noise_and_previous_reach_a_replica(tiny_path: Path) -> None:
    """Bit for bit what `infer` gives here; the client's noise goes before the front's."""
    recipe = Recipe(tiny_path, PolicyOptions(robot="generic"), "reference", steps=2)
    policy = replace(recipe, real_time=RealTimeChunking()).make()
    noise = np.random.default_rng(0).standard_normal((50, 32), np.float32)
    seen = observation(0.5, state=np.zeros(32))
    alone = policy.infer(seen, noise)["actions"]
    rest = alone[20:]
    expected = policy.infer(seen, noise, previous=rest, delay=10)["actions"]
    with (
        running(Cluster(policy).replicas()) as served,
        ServerPolicy(f"ws://{served.address}") as client,
    ):
        assert client.metadata["real_time"]["jacobian"] == "exact"
        np.testing.assert_array_equal(client.infer(seen, noise)["actions"], alone)
        answer = client.infer(seen, noise, previous=rest, delay=10)
        np.testing.assert_array_equal(answer["actions"], expected)
    with running(Cluster(StateEngine()).replicas()) as served, served.connect() as client:
        refused = ask(client, observation(1, **{"pi0/previous": rest}))
    assert refused.startswith("pi0/previous: expected a server that continues chunks")


def test_what_replicas_answer_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a single policy: clients' frames do not mix, and errors are no frames."""
    monkeypatch.setattr(record, "_yield_to_others", lambda: None)  # a busy machine's minutes
    folder = tmp_path / "recorded"
    replicas = Cluster(StateEngine(), StateEngine()).replicas()
    with (
        running(replicas, ServeOptions(record=folder)) as served,
        served.connect() as one,
        served.connect() as two,
    ):
        for value in (1, 2):
            ask(one, observation(value))
            ask(two, observation(10 + value))
        assert "camera" in ask(one, observation(9, images={}))
        ask(one, observation(3, **{"pi0/reset": True}))
    assert sorted(episodes(folder)) == [[1, 2], [3], [11, 12]]
    np.testing.assert_array_equal(
        sorted(Dataset.open(folder).column("observation.state")[:, 0]), [1, 2, 3, 11, 12]
    )


def test_the_live_page_shows_the_last_answer() -> None:
    with running(Cluster(StateEngine()).replicas()) as served, served.connect() as client:
        assert status(served.address)["last"] is None
        ask(client, observation(3, **{"pi0/reset": True}))
        last = status(served.address)["last"]
    assert last["actions"][0][0] == pytest.approx(3)
    assert last["cameras"]


def status(address: str) -> Any:
    with urllib.request.urlopen(f"http://{address}/status.json", timeout=SOON) as response:
        return json.load(response)


def test_a_replica_whose_device_is_lost_is_not_healthy() -> None:
    """An internal error makes it suspect; a chunk for nobody tells whether it still computes."""
    engine = StateEngine()
    policy = make_policy(engine)
    replica = replica_of(policy)
    asyncio.run(replica.check_health())
    sample = policy.sample

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("device lost")

    fields = {"frame": pack(observation(1)), "timeout": SOON, "previous": None, "noise": None}
    policy.sample = broken
    assert outcome(replica, fields) == "internal"
    computed = len(engine.computed)
    policy.sample = sample
    asyncio.run(replica.check_health())
    assert len(engine.computed) == computed + 1
    policy.sample = broken
    assert outcome(replica, fields) == "internal"
    policy.sample, engine.scale = sample, float("nan")
    with pytest.raises(EngineError):
        asyncio.run(replica.check_health())
    engine.scale = 1.0
    assert outcome(replica, fields) == "ok"


def outcome(replica: PolicyReplica, fields: dict[str, Any]) -> str:
    (answer,) = asyncio.run(replica.answer([fields], [0.0]))
    return answer.outcome


def test_age_counts_as_time_in_the_queue() -> None:
    fields = {"frame": pack(observation(1)), "timeout": 100.0, "previous": None, "noise": None}
    replica = replica_of(make_policy(StateEngine()))
    (answer,) = asyncio.run(replica.answer([fields], [50.0]))
    assert 50 <= answer.stages["queue"] < 100
    (late,) = asyncio.run(replica.answer([fields], [150.0]))
    assert late.outcome == "timeout"


def test_paths_hold_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "arm.toml").write_text("")
    options = PolicyOptions(robot="arm.toml", tokenizer=Path("none"), norm_stats="none")
    made = Recipe(Path("ckpt"), options, "cpu", base=Path("base")).with_absolute_paths()
    assert (made.checkpoint, made.base) == (tmp_path / "ckpt", tmp_path / "base")
    assert made.options.robot == tmp_path / "arm.toml"
    assert made.options.norm_stats == "none"


def test_the_policy_that_ships_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where replicas look for it, too, for which a name would be a folder of theirs."""
    found: list[Path] = []

    def start(recipe: Recipe, *_: object) -> None:
        found.append(recipe.with_absolute_paths().checkpoint)
        raise ConfigError("enough")

    monkeypatch.setattr("pi0.serve.replicas.start_replicas", start)
    monkeypatch.setattr(sys, "argv", ["pi0", "serve", "tabletop", "--port", "0", "--replicas", "1"])
    with pytest.raises(SystemExit):
        main()
    assert find_files(found[0]).path == found[0]


def test_memory_for_all_replicas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is compared before they start, if Ray was started here and so all are on this machine."""
    (tmp_path / "meminfo").write_text("MemAvailable: 1000 kB\n")
    monkeypatch.setattr(memory, "PROC", tmp_path)
    left: list[bool] = []
    ray, serve, exceptions = map(ModuleType, ("ray", "ray.serve", "ray.exceptions"))
    fake: Any = ray, exceptions
    fake[0].serve, fake[1].RayActorError = serve, ConnectionError
    fake[0].shutdown = lambda: left.append(True)
    for module in (ray, serve, exceptions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr("pi0.serve.replicas.require_ray", lambda: None)
    monkeypatch.setattr("pi0.serve.replicas.connect", lambda: True)
    words = ["serve", "tabletop", "--port", "0", "--engine", "cpu", "--replicas", "3"]
    monkeypatch.setattr(sys, "argv", ["pi0", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2
    assert "memory: expected enough for 3 replicas of engine cpu" in capsys.readouterr().err
    assert left == [True]


def test_scale_and_missing_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="at least --replicas \\(4\\), found 2"):
        Scale(4, 2)
    monkeypatch.setattr(
        cluster, "find_spec", lambda name: None if name == "ray" else find_spec(name)
    )
    with pytest.raises(Pi0Error, match=r"expected the package ray.*pi0\[ray\]"):
        require_ray()


def test_room_is_checked_before_ray_waits() -> None:
    stopped: list[bool] = []
    with pytest.raises(ConfigError, match="a Ray cluster with 4 CPUs for 2 replicas, found 2"):
        cluster.require_room({"CPU": 2.0}, Scale(2, cpus=2), lambda: stopped.append(True))
    assert stopped
    cluster.require_room({"CPU": 4.0}, Scale(2, cpus=2), lambda: stopped.append(True))
    assert len(stopped) == 1


class NoRay(ModuleType):
    """A Ray that neither joins a cluster nor starts, as it says itself."""

    def __init__(self, starts: Exception) -> None:
        super().__init__("ray")
        self._starts = starts

    def init(self, address: str | None = None, **_: Any) -> None:
        assert address or os.environ[cluster.NICENESS] == "0"  # as soon as others here
        raise ConnectionError(f"no node at {address}") if address else self._starts


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("auto", r"a Ray cluster at RAY_ADDRESS, auto, found an error: no node"),
        ("127.0.0.1:1", r"RAY_ADDRESS: .* at 127\.0\.0\.1:1, found none \(.*refused\)"),
        ("ray://no.such.host.invalid:1", r"RAY_ADDRESS: .* found none"),
        ("127.0.0.1:99999", r"RAY_ADDRESS: .* found none"),
        (None, r"Ray to start here, found an error: The node timed out\. Start it"),
    ],
)
def test_a_ray_that_does_not_start_is_one_sentence(
    address: str | None, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody wants another in the place of a cluster that is named."""
    monkeypatch.setitem(sys.modules, "ray", NoRay(Exception("The node timed out.")))
    kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    monkeypatch.setattr(os, "environ", kept)
    if address:
        kept["RAY_ADDRESS"] = address
    with pytest.raises(Pi0Error, match=message):
        cluster.connect()
