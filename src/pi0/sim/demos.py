"""Demonstrations: the experts at work, disturbed, as episodes of a dataset.

What is recorded as the action is what the expert wants, while something else is executed: a policy
that learns from it sees how to come back to the way (Laskey et al., "DART", arXiv 1703.09327).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pi0.data.schema import Recording, Schema
from pi0.sim.env import IMAGE_SIZE, TabletopEnv
from pi0.sim.experts import expert_action
from pi0.sim.tasks import COLORS, PLACES

Floats = NDArray[np.float64]

CAMERAS = {
    "observation.images.table": "observation/image",
    "observation.images.wrist": "observation/wrist_image",
}
STATE_NAMES = ("x", "y", "z", "opening", "width")
ACTION_NAMES = ("x", "y", "z", "gripper")
POINT_NAMES = ("x", "y", "z")
OBJECTS = (*COLORS, *PLACES)
ABSENT = np.array([-1.0, -1.0])  # of an object that a scene does not show
FIRST_RESERVED_SEED = 9_000_000  # for evaluation alone


@dataclass(frozen=True)
class Disturbance:
    """What is added to an expert's moves, in units of 3 cm.

    A push now and then, not some noise in every step: a chunk of actions holds the answers to all
    that disturbs it, which nobody can foresee, and a policy would learn to predict their mean.
    With some pushes the gripper slips: it does the opposite of what the expert wants, misses a cube
    or drops one. Nothing else shows a policy a hand that has closed on nothing.

    Attributes:
        episodes: share of episodes that are disturbed at all.
        pushes: share of steps in which a push begins.
        slips: share of pushes with which the gripper slips.
        steps: that a push lasts, each the same way.
        slip_steps: that a push with a slip lasts: until fingers are shut.
        near, far: standard deviation of a push on each axis, low over the table and high.
    """

    episodes: float = 0.75
    pushes: float = 0.06
    slips: float = 0.3
    steps: int = 2
    slip_steps: int = 5
    near: float = 0.2
    far: float = 0.7


LOW, HIGH = 0.04, 0.10  # metres of the fingertips where `near` and `far` hold


def schema(image_size: int = IMAGE_SIZE) -> Schema:
    """What all episodes of the tabletop share."""
    return Schema(
        fps=TabletopEnv.metadata["render_fps"],
        robot="tabletop",
        cameras=dict.fromkeys(CAMERAS, (image_size, image_size)),
        columns={
            "observation.state": STATE_NAMES,
            "action": ACTION_NAMES,
            "aux.target_position": POINT_NAMES,
            "aux.goal_position": POINT_NAMES,
            "aux.target_point": ("u", "v"),
            "aux.object_points": tuple(f"{name}_{axis}" for name in OBJECTS for axis in "uv"),
        },
    )


def record_episode(
    env: TabletopEnv, seed: int, task: str, disturbance: Disturbance, max_steps: int
) -> Recording | None:
    """One demonstration; None if the expert failed, as it may when disturbed."""
    observation, info = env.reset(seed=seed, options={"task": task})
    rng = np.random.default_rng([seed, 1])  # not the episode's own numbers again
    disturbed = rng.random() < disturbance.episodes
    push, slips, left = np.zeros(3), False, 0  # of the hand, and for how many more steps
    frames: list[tuple[dict[str, NDArray[np.generic]], NDArray[np.float32]]] = []
    points: list[dict[str, Floats]] = []
    for _ in range(max_steps):
        action = expert_action(env)
        frames.append((observation, action))
        points.append(_points(env, info))
        if disturbed and not left and rng.random() < disturbance.pushes:
            push, slips = _push(env, disturbance, rng), rng.random() < disturbance.slips
            left = disturbance.slip_steps if slips else disturbance.steps
        executed = action.copy()
        if left:
            executed[:3] += push
            executed[3] *= -1 if slips else 1
            left -= 1
        observation, _, done, _, info = env.step(executed)
        if done:
            return _recording(info["prompt"], frames, points)
    return None


def _recording(
    prompt: str,
    frames: Sequence[tuple[dict[str, NDArray[np.generic]], NDArray[np.float32]]],
    points: Sequence[Mapping[str, Floats]],
) -> Recording:
    return Recording(
        task=prompt,
        images={key: np.stack([o[own] for o, _ in frames]) for key, own in CAMERAS.items()},
        columns={
            "observation.state": np.stack([o["observation/state"] for o, _ in frames]),
            "action": np.stack([action for _, action in frames]),
            **{key: np.stack([p[key] for p in points]).astype(np.float32) for key in points[0]},
        },
    )


def _points(env: TabletopEnv, info: Mapping[str, Any]) -> dict[str, Floats]:
    """What auxiliary losses may ask for: in metres, and in the table camera's picture."""
    scene = env.scene
    things = {**scene.cubes(), **scene.places()}
    seen = [
        scene.in_picture("table", things[name]) if name in things else ABSENT for name in OBJECTS
    ]
    return {
        "aux.target_position": info["target_position"],
        "aux.goal_position": info["goal_position"],
        "aux.target_point": scene.in_picture("table", info["target_position"]),
        "aux.object_points": np.concatenate(seen),
    }


def _push(env: TabletopEnv, disturbance: Disturbance, rng: np.random.Generator) -> Floats:
    height = env.scene.commanded[2]
    share = np.clip((height - LOW) / (HIGH - LOW), 0, 1)
    sigma = disturbance.near + share * (disturbance.far - disturbance.near)
    return rng.normal(0, sigma, 3)
