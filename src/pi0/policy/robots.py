"""Robots as tables: which cameras, which state, which actions.

A new robot is a new table here (or in your own code: `Policy` takes any `Robot`). Camera slots,
keys, joint signs and gripper constants are those of openpi's `aloha_policy.py`, `libero_policy.py`,
`droid_policy.py` and `config.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

SLOTS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")


@dataclass(frozen=True)
class Camera:
    """A camera of a robot.

    Attributes:
        key: where its image is in an observation; "a/b" is the literal key or b inside a.
        names: short names, as `--image NAME=FILE` takes them.
        required: an absent camera is an error; else the model does without it.
    """

    key: str
    names: tuple[str, ...]
    required: bool


@dataclass(frozen=True)
class Robot:
    """What a policy must know of a robot.

    Attributes:
        cameras: in the order of the model's image slots.
        ignored: observation keys that are known and not read.
        state: (key, length) of the vectors that make up the state, in order; a length of None is
            whatever the statistics say.
        action_dim: actions handed out; None: as many as there are statistics for.
        delta: signed run lengths over action dimensions: positive ones are relative to the state.
        encode_state, decode_actions: from robot to model conventions and back, [..., D] → [..., D].
    """

    name: str
    cameras: tuple[Camera, ...]
    state: tuple[tuple[str, int | None], ...]
    action_dim: int | None
    ignored: tuple[str, ...] = ()
    delta: tuple[int, ...] = ()
    encode_state: Callable[[Floats], Floats] | None = None
    decode_actions: Callable[[Floats], Floats] | None = None

    def observation(self, images: Mapping[str, Any], state: Floats, prompt: str) -> dict[str, Any]:
        """An observation in this robot's own keys, from images by camera key and a flat state."""
        ends = np.cumsum([length or len(state) for _, length in self.state])[:-1]
        parts = np.split(state, ends)
        return {
            **images,
            **{key: part for (key, _), part in zip(self.state, parts, strict=True)},
            "prompt": prompt,
        }


def delta_mask(runs: tuple[int, ...], width: int) -> NDArray[np.bool_]:
    """Run lengths as a mask: (6, -1) is six relative dimensions, then one absolute; the rest is
    absolute, too."""
    mask = np.zeros(width, np.bool_)
    start = 0
    for run in runs:
        mask[start : start + abs(run)] = run > 0
        start += abs(run)
    return mask


# ALOHA: π0 was trained with some joints turned round and grippers as angles of the motor.
ALOHA_SIGNS = np.array([1, -1, -1, 1, 1, 1, 1] * 2, np.float64)
ALOHA_GRIPPERS = [6, 13]
GRIPPER_LINEAR = (0.01844, 0.05800)  # metres, closed and open
GRIPPER_ANGLE = (0.5476, 1.6296)  # radians in π0's space, closed and open
GRIPPER_COMMAND = (-0.6213, 1.4910)  # radians of the leader's joint, closed and open
HORN_RADIUS, ARM_LENGTH = 0.022, 0.036  # metres


def aloha_encode_state(state: Floats) -> Floats:
    """ALOHA's joints to π0's: signs, and gripper opening [0, 1] to normalised motor angle."""
    state = state * ALOHA_SIGNS
    opening = state[..., ALOHA_GRIPPERS]
    linear = opening * (GRIPPER_LINEAR[1] - GRIPPER_LINEAR[0]) + GRIPPER_LINEAR[0]
    cosine = (HORN_RADIUS**2 + linear**2 - ARM_LENGTH**2) / (2 * HORN_RADIUS * linear)
    angle = np.arcsin(np.clip(cosine, -1, 1))
    state[..., ALOHA_GRIPPERS] = (angle - GRIPPER_ANGLE[0]) / (GRIPPER_ANGLE[1] - GRIPPER_ANGLE[0])
    return state


def aloha_decode_actions(actions: Floats) -> Floats:
    """π0's joints to ALOHA's commands. Not the inverse of the state's map: commands go to another
    joint than states come from."""
    actions = actions * ALOHA_SIGNS
    angle = actions[..., ALOHA_GRIPPERS] + GRIPPER_ANGLE[0]
    low, high = GRIPPER_COMMAND
    actions[..., ALOHA_GRIPPERS] = (angle - low) / (high - low)
    return actions


_ALOHA_CAMERAS = (
    Camera("images/cam_high", ("cam_high", "base"), required=True),
    Camera("images/cam_left_wrist", ("cam_left_wrist", "left_wrist"), required=False),
    Camera("images/cam_right_wrist", ("cam_right_wrist", "right_wrist"), required=False),
)

ROBOTS = {
    "generic": Robot(
        name="generic",
        cameras=(
            Camera("images/base", ("base", SLOTS[0]), required=False),
            Camera("images/wrist", ("wrist", "left_wrist", SLOTS[1]), required=False),
            Camera("images/right_wrist", ("right_wrist", SLOTS[2]), required=False),
        ),
        state=(("state", None),),
        action_dim=None,
    ),
    "aloha": Robot(
        name="aloha",
        cameras=_ALOHA_CAMERAS,
        ignored=("images/cam_low",),
        state=(("state", 14),),
        action_dim=14,
        delta=(6, -1, 6, -1),
        encode_state=aloha_encode_state,
        decode_actions=aloha_decode_actions,
    ),
    "aloha_sim": Robot(
        name="aloha_sim",
        cameras=_ALOHA_CAMERAS,
        ignored=("images/cam_low",),
        state=(("state", 14),),
        action_dim=14,
        encode_state=aloha_encode_state,
        decode_actions=aloha_decode_actions,
    ),
    "libero": Robot(
        name="libero",
        cameras=(
            Camera("observation/image", ("image", "base"), required=True),
            Camera("observation/wrist_image", ("wrist_image", "wrist"), required=True),
        ),
        state=(("observation/state", 8),),
        action_dim=7,
        delta=(6, -1),  # openpi's pi0_libero; see docs/robots.md
    ),
    "droid": Robot(
        name="droid",
        cameras=(
            Camera("observation/exterior_image_1_left", ("exterior", "base"), required=True),
            Camera("observation/wrist_image_left", ("wrist_image", "wrist"), required=True),
        ),
        state=(("observation/joint_position", 7), ("observation/gripper_position", 1)),
        action_dim=8,
    ),
}
