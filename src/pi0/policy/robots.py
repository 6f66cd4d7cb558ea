"""The robots there are: built-in tables, TOML files, and those of other distributions.

Camera slots, keys, joint signs and gripper constants are those of openpi's `aloha_policy.py`,
`libero_policy.py`, `droid_policy.py` and `config.py`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np

from pi0.errors import Pi0Error, kind_of
from pi0.plugins import ROBOTS as PLUGIN_GROUP
from pi0.plugins import describe, find_plugins, load_plugin
from pi0.policy.robot import SLOTS, Camera, Floats, Robot
from pi0.policy.robot_file import read_robot_file

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
    """π0's joints to ALOHA's commands. Not the inverse of the state's map: commands and states use
    different gripper spaces."""
    actions = actions * ALOHA_SIGNS
    angle = actions[..., ALOHA_GRIPPERS] + GRIPPER_ANGLE[0]
    low, high = GRIPPER_COMMAND
    actions[..., ALOHA_GRIPPERS] = (angle - low) / (high - low)
    return actions


def aloha_encode_actions(actions: Floats) -> Floats:
    """ALOHA's commands to π0's joints, the inverse of `aloha_decode_actions`."""
    actions = actions * ALOHA_SIGNS
    low, high = GRIPPER_COMMAND
    angle = actions[..., ALOHA_GRIPPERS] * (high - low) + low
    actions[..., ALOHA_GRIPPERS] = angle - GRIPPER_ANGLE[0]
    return actions


_ALOHA_CAMERAS = (
    Camera("images/cam_high", ("cam_high", "base")),
    Camera("images/cam_left_wrist", ("cam_left_wrist", "left_wrist"), required=False),
    Camera("images/cam_right_wrist", ("cam_right_wrist", "right_wrist"), required=False),
)
_ARM = ("waist", "shoulder", "elbow", "forearm_roll", "wrist_angle", "wrist_rotate", "gripper")
_ALOHA_ACTIONS = tuple(f"{side}_{joint}" for side in ("left", "right") for joint in _ARM)
_ALOHA_UNITS = (*["rad"] * 6, "opening") * 2


def _aloha(name: str, delta: tuple[int, ...]) -> Robot:
    return Robot(
        name=name,
        cameras=_ALOHA_CAMERAS,
        ignored=("images/cam_low",),
        state=(("state", 14),),
        action_dim=14,
        delta=delta,
        encode_state=aloha_encode_state,
        decode_actions=aloha_decode_actions,
        encode_actions=aloha_encode_actions,
        action_names=_ALOHA_ACTIONS,
        action_units=_ALOHA_UNITS,
        control_hz=50,
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
    "aloha": _aloha("aloha", delta=(6, -1, 6, -1)),
    "aloha_sim": _aloha("aloha_sim", delta=()),
    "libero": Robot(
        name="libero",
        cameras=(
            Camera("observation/image", ("image", "base")),
            Camera("observation/wrist_image", ("wrist_image", "wrist")),
        ),
        state=(("observation/state", 8),),
        action_dim=7,
        delta=(6, -1),  # openpi's pi0_libero; see docs/robots.md
        action_names=("x", "y", "z", "roll", "pitch", "yaw", "gripper"),
    ),
    "droid": Robot(
        name="droid",
        cameras=(
            Camera("observation/exterior_image_1_left", ("exterior", "base")),
            Camera("observation/wrist_image_left", ("wrist_image", "wrist")),
        ),
        state=(("observation/joint_position", 7), ("observation/gripper_position", 1)),
        action_dim=8,
        action_names=(*(f"joint_{i}" for i in range(7)), "gripper"),
        control_hz=15,
    ),
    "tabletop": Robot(  # of pi0.sim, which clips moves to 3 cm
        name="tabletop",
        cameras=(
            Camera("observation/image", ("table", "image", "base")),
            Camera("observation/wrist_image", ("wrist", "wrist_image")),
        ),
        state=(("observation/state", 5),),
        action_dim=4,
        action_names=("x", "y", "z", "gripper"),
        action_units=("3 cm", "3 cm", "3 cm", ""),
        control_hz=10,
    ),
}
# Where openpi's configurations for π0.5 differ from those for π0 of the same robot: pi05_libero has
# absolute actions and does not read the state.
PI05 = {
    "libero": replace(ROBOTS["libero"], name="pi05_libero", delta=(), state_in_prompt=False),
}
ROBOTS |= {robot.name: robot for robot in PI05.values()}
# Words in the names of statistics, of openpi's base checkpoints (docs/norm_stats.md) and of data
# sets, whose robots need another table than `generic`; handed out as they are, their actions would
# be taken for targets.
ROBOT_OF_WORD = {"trossen": "aloha", "aloha": "aloha", "droid": "droid", "libero": "libero"}


def robot_of_assets(folder: str) -> str | None:
    """The robot whose statistics a folder has by its name, such as libero for "libero_10"; None: it
    names none."""
    words = re.findall(r"[a-z]+", folder.lower())
    robot = next((ROBOT_OF_WORD[word] for word in words if word in ROBOT_OF_WORD), None)
    return "aloha_sim" if robot == "aloha" and "sim" in words else robot


def robot_names() -> list[str]:
    """Names that `find_robot` knows; nothing of another distribution is imported."""
    return [*ROBOTS, *_plugins()]


def find_robot(robot: str | Path | Robot, pi05: bool = False) -> Robot:
    """A robot by its name, the path of its TOML file, or itself.

    Args:
        pi05: the model is a π0.5, for which a built-in robot may have another table.

    Raises:
        Pi0Error: there is none of that name, or the file or distribution has none.
    """
    if isinstance(robot, Robot):
        return robot
    name = str(robot)
    if name.lower().endswith(".toml"):
        return read_robot_file(Path(name).expanduser())
    if name in ROBOTS:
        return PI05.get(name, ROBOTS[name]) if pi05 else ROBOTS[name]
    entry = _plugins().get(name)
    if entry is None:
        raise Pi0Error(
            f"robot: expected one of {', '.join(robot_names())} or a file.toml, found {name!r}. "
            "docs/robots.md shows how to describe yours."
        )
    found = load_plugin(entry)
    if not isinstance(found, Robot):
        raise Pi0Error(
            f"plug-in {describe(entry)}: expected {entry.value} to be a Robot, found "
            f"{kind_of(found)}."
        )
    return found


def _plugins() -> dict[str, EntryPoint]:
    return find_plugins(PLUGIN_GROUP, frozenset(ROBOTS))
