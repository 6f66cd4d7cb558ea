"""Evaluation through `pi0 serve`: the episodes of the in-process run, latency, real-time chunks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from dots import ROBOT, DotPolicy

from pi0.errors import ConfigError, Pi0Error
from pi0.eval import CheckpointPolicy, EnvOptions, EvalPlan, ServedPolicy, evaluate
from pi0.policy import PolicyOptions, RealTimeChunking
from pi0.serve.answer import Answerer
from pi0.serve.wire import MessageLimits, pack, unpack

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))

from serving import StateEngine, make_policy, running

DOTS = EnvOptions("dots:test/Dots-v0", max_steps=12)
PLAN = EvalPlan(DOTS, ("red", "blue"), episodes=2, execute=4)
pytestmark = pytest.mark.filterwarnings("ignore:robot .* states no limits")


def random_policy(path: Path, jacobian: str | None) -> CheckpointPolicy:
    """Random weights on the dots."""
    options = PolicyOptions(robot=ROBOT, norm_stats="none", preprocessing="openpi")
    real_time = RealTimeChunking(jacobian=jacobian) if jacobian else None
    return CheckpointPolicy(path, options, "reference", 2, real_time=real_time)


@pytest.fixture(scope="module", params=[None, "exact"], ids=str)
def both(request: pytest.FixtureRequest, tiny_path: Path) -> Iterator[tuple]:
    """A policy here and its like behind a server."""
    here = random_policy(tiny_path, request.param)
    with here() as policy, running(policy) as served:
        yield here, ServedPolicy(f"ws://{served.address}", real_time=request.param)


@pytest.mark.parametrize("latency", [0, 300])
def test_the_same_episodes_bit_for_bit(both: tuple, latency: float) -> None:
    """Outcomes, steps and jumps are equal, and those of two robots at a time as well."""
    here, there = both
    plan = replace(PLAN, injected_latency=latency)
    alone = evaluate(here, plan)
    assert alone.jumps
    assert alone.run["delay"] == (2 if latency else 0)  # at 5 Hz
    served = evaluate(there, plan)
    assert served == alone
    assert evaluate(there, replace(plan, workers=2)) == alone
    assert served.run["checkpoint"] == there.address
    assert served.run["real_time"] == alone.run["real_time"]


def test_real_time_chunks_jump_less(tiny_path: Path) -> None:
    """Also where a server could and is not asked to."""
    plan = replace(PLAN, injected_latency=300)
    with random_policy(tiny_path, "exact")() as policy, running(policy) as served:
        address = f"ws://{served.address}"
        asked, free = (
            evaluate(ServedPolicy(address, real_time=mode), plan) for mode in ("exact", None)
        )
    assert asked.border_jump["borders"] == free.border_jump["borders"] > 4
    assert asked.border_jump["rms"] < 0.5 * free.border_jump["rms"]
    assert free.run["real_time"] is None


def test_latency_is_in_ticks_of_the_last_chunk(tiny_path: Path) -> None:
    """The dot still gets there; a chunk is asked for at the same ticks as without latency."""
    policy = DotPolicy(tiny_path)
    plan = replace(PLAN, env=replace(DOTS, max_steps=40))
    slow = evaluate(policy, replace(plan, injected_latency=300))
    assert slow.total.success == 4
    assert len(slow.latency_ms) == sum(-(-e.steps // 4) for e in slow.episodes)
    with pytest.raises(ConfigError, match="found 48 that are executed .* 3 ticks of 200 ms until"):
        evaluate(policy, replace(plan, execute=48, injected_latency=401))


def test_what_a_server_must_be(tiny_path: Path) -> None:
    with running(make_policy(StateEngine())) as served:  # made without a checkpoint
        address = f"ws://{served.address}"
        with pytest.raises(ConfigError, match="the greeting of `pi0 serve`, found one without r"):
            evaluate(ServedPolicy(address), PLAN)
    with pytest.raises(Pi0Error, match="expected one that answers"):
        evaluate(ServedPolicy(address), PLAN)
    with random_policy(tiny_path, None)() as policy, running(policy) as served:
        there = ServedPolicy(f"ws://{served.address}", real_time="exact")
        with pytest.raises(ConfigError, match="started with --real-time exact, found none"):
            evaluate(there, PLAN)
        with pytest.raises(ConfigError, match="perturb: expected a policy in this process"):
            evaluate(replace(there, real_time=None), replace(PLAN, perturb=0.1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": None}, None),  # a server of before there was a choice
        ({"n_action_steps": None}, "of `pi0 serve`, found one without n_action_steps"),
        ({"steps": None}, "of `pi0 serve`, found one without steps"),
        ({"robot": {"name": "dots"}}, "whose table of the robot cannot be read .KeyError: 'cam"),
        ({"robot": "dots"}, "a robot's table, found one that cannot be read"),
        ({"robot": {"limits": {"new": [1]}}}, "a robot's table, found one that cannot be read"),
    ],
)
def test_other_greetings(
    tiny_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    message: str | None,
) -> None:
    """Of an older server, which does not say everything, and of what is none."""
    greet = Answerer.metadata

    def greet_otherwise(answerer: Answerer) -> bytes:
        greeting = {**unpack(greet(answerer), MessageLimits()), **changes}
        return pack({key: value for key, value in greeting.items() if value is not None})

    monkeypatch.setattr(Answerer, "metadata", greet_otherwise)
    plan = replace(PLAN, tasks=("red",), episodes=1)
    with random_policy(tiny_path, None)() as policy, running(policy) as served:
        there = ServedPolicy(f"ws://{served.address}")
        if message is None:
            assert evaluate(there, plan).run["sampler"] == "euler"
            return
        with pytest.raises(Pi0Error, match=message):
            evaluate(there, plan)


@pytest.mark.skipif(find_spec("mujoco") is None, reason="needs mujoco ([sim])")
def test_the_tabletop_through_a_server(tiny_path: Path) -> None:
    options = PolicyOptions(robot="tabletop", norm_stats="none", preprocessing="openpi")
    here = CheckpointPolicy(tiny_path, options, "reference", steps=1)
    plan = EvalPlan(EnvOptions(max_steps=3), ("lift",), episodes=1, execute=2)
    with here() as policy, running(policy) as served:
        there = ServedPolicy(f"ws://{served.address}")
        assert evaluate(there, plan) == evaluate(here, plan)
