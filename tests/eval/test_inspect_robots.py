"""The adapter in contrib/inspect-robots, against the framework itself.

Both are installed in an environment of their own: `make test-inspect-robots`.
"""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
from dots import DotPolicy

from pi0.eval import EnvOptions, EvalPlan, evaluate
from pi0.policy import Policy, PolicyOptions

REASON = "needs inspect-robots and contrib/inspect-robots in an environment of their own"
inspect_robots = pytest.importorskip("inspect_robots", reason=REASON)
adapter = pytest.importorskip("inspect_robots_pi0", reason=REASON)
pytestmark = [
    pytest.mark.filterwarnings("ignore:robot .* states no limits"),
    pytest.mark.filterwarnings("ignore:.*action semantics missing"),
]

needs_mujoco = pytest.mark.skipif(find_spec("mujoco") is None, reason="needs mujoco ([sim])")
DOTS = "dots:test/Dots-v0"


def scenes(task: str, count: int) -> list:
    return [
        inspect_robots.Scene(f"{task}-{i}", "", metadata={"task": task, "env_seed": 9_000_000 + i})
        for i in range(count)
    ]


def run(policy: Policy, env: str, task: object, folder: Path) -> object:
    body = adapter.GymnasiumEmbodiment(env, on_limit="clamp")
    (log,) = inspect_robots.eval(task, adapter.Pi0Policy(policy), body, log_dir=str(folder))
    body.close()
    return log


def test_same_episodes_as_pi0_eval(tiny_path: Path, tmp_path: Path) -> None:
    make = replace(DotPolicy(tiny_path), on_limit="clamp")
    plan = EvalPlan(EnvOptions(DOTS), ("red",), episodes=3)
    ours = evaluate(make, plan)
    scorers = ["success_at_end", "episode_length", "pi0-wrong-object"]
    task = inspect_robots.Task("dots", scenes("red", 3), scorers, max_steps=100)
    with make() as policy:
        log = run(policy, DOTS, task, tmp_path)
    assert log.status == "success", log
    trials = [trial for scene in log.samples for trial in scene.epochs]
    assert [t["success_at_end"] for t in trials] == [e.success for e in ours.episodes]
    assert [t["episode_length"] for t in trials] == [e.steps for e in ours.episodes]
    assert [t["pi0-wrong-object"] for t in trials] == [e.wrong for e in ours.episodes]
    assert all(e.success for e in ours.episodes)


@needs_mujoco
def test_entry_points_and_conformance(tiny_path: Path) -> None:
    from inspect_robots.compat import check_compatibility
    from inspect_robots.conformance import assert_embodiment_conformant

    task = inspect_robots.registry.resolve("task", "pi0-tabletop", episodes=2, tasks="lift, push")
    assert [scene.id for scene in task.scenes][1:3] == ["lift-9000001", "push-9000000"]
    body = inspect_robots.registry.resolve("embodiment", "pi0-gymnasium")
    assert_embodiment_conformant(body.info)
    policy = inspect_robots.registry.resolve(
        "policy",
        "pi0",
        checkpoint=str(tiny_path),
        robot="tabletop",
        norm_stats="none",
        preprocessing="openpi",
        engine="reference",
        steps=1,
        execute=4,
        on_limit="clamp",
    )
    assert isinstance(policy, inspect_robots.Policy)
    assert isinstance(body, inspect_robots.Embodiment)
    report = check_compatibility(policy, body, task)
    assert not report.issues, report.issues
    observation = body.reset(task.scenes[0], seed=1)
    policy.reset(task.scenes[0])
    chunk = policy.act(observation)
    assert len(chunk) == 4
    assert body.info.action_space.dim == 4
    assert "cube" in observation.instruction or "block" in observation.instruction
    body.close()


def test_other_robots_do_not_fit(tiny_path: Path) -> None:
    from inspect_robots.compat import check_compatibility

    options = PolicyOptions(robot="libero", norm_stats="none", preprocessing="openpi")
    policy = Policy.from_checkpoint(tiny_path, **vars(options), engine="reference")
    body = adapter.GymnasiumEmbodiment(DOTS)
    codes = {issue.code for issue in check_compatibility(adapter.Pi0Policy(policy), body).errors}
    assert codes == {"action_dim", "missing_camera", "missing_state"}
