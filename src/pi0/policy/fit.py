"""What does not fit between a model, a robot's table and the statistics of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pi0.checkpoint.infer import CONFIG_JSON, unfit_flow
from pi0.checkpoint.load import Checkpoint
from pi0.config import Pi0Config
from pi0.findings import Finding, error, warning
from pi0.policy.normalize import Normalizer
from pi0.policy.robot import Camera, Robot

# Of LeRobot before 0.4: transforms that were part of the policy.
ADAPT, RELATIVE_JOINTS = "adapt_to_pi_aloha", "use_delta_joint_actions_aloha"
RELATIVE_ACTIONS = "relative_actions"  # of what `pi0 convert` makes from LeRobot's files
SAME_RELATIVE = (
    "the state would be added wrongly. Give the robot's table the same `relative` (`delta`), or "
    "leave out --robot where the processors are at hand."
)


def of_base(what: str, folder: Path) -> Finding:
    """That an adapter has no statistics of its own; `what` they lie in, in the base's folder."""
    return warning(
        f"{what}-of-base",
        f"{what}: expected those of the adapter beside it, found none; those of its base {folder} "
        "are used. Copy the ones that it was trained with, or name statistics with --norm-stats.",
    )


def settings_findings(settings: Mapping[str, Any], config: Pi0Config) -> list[Finding]:
    """Fields of LeRobot's or transformers' config.json that would change the result and are not
    carried out."""
    side = config.vision.image_size
    only: dict[str, Any] = {
        "n_obs_steps": 1,
        "image_resolution": [side, side],
        "resize_imgs_with_padding": [side, side],
    }
    found = [
        f"config.json {key}: expected {value}, as this model has it, found {settings[key]!r}."
        for key, value in only.items()
        if settings.get(key) not in (None, value)
    ]
    return [error("setting-not-carried-out", s) for s in (*found, *unfit_flow(settings))]


def length_findings(checkpoint: Checkpoint, step: int | None) -> list[Finding]:
    """Whether the length of prompts that config.json or the caller states is that of LeRobot's
    tokenizer step."""
    stated = checkpoint.config.max_tokens
    declared = any(checkpoint.settings.get(name) for name in CONFIG_JSON["max_tokens"])
    assumed = "max_tokens" in checkpoint.inferred.assumed
    if step in (None, stated) or assumed:
        return []
    if declared:
        sentence = (
            f"config.json tokenizer_max_length: expected {step} as LeRobot's tokenizer step says, "
            f"which counts, found {stated}. Copy all files of one checkpoint."
        )
        return [warning("max-tokens-declared", sentence)]
    sentence = (
        f"max_tokens (--max-tokens): expected {step} as LeRobot's tokenizer step says, found "
        f"{stated}. Leave it out."
    )
    return [error("max-tokens-differs", sentence)]


def aloha_flags(settings: Mapping[str, Any]) -> list[str]:
    """The flags of ALOHA's conventions that a config.json sets, in whatever way it says yes."""
    return [key for key in (ADAPT, RELATIVE_JOINTS) if settings.get(key)]


def aloha_findings(settings: Mapping[str, Any], robot: Robot) -> list[Finding]:
    """Whether a robot's table does what ALOHA's flags in a config.json ask for."""
    done = {ADAPT: robot.encode_state is not None, RELATIVE_JOINTS: any(n > 0 for n in robot.delta)}
    return [
        warning(
            "aloha-differs",
            f"robot {robot.name}: config.json sets {flag}, found that this robot's table has no "
            f"{'joint signs and gripper units of its own' if flag == ADAPT else 'relative joints'}"
            ". If the checkpoint is ALOHA's, name aloha or aloha_sim with --robot.",
        )
        for flag in aloha_flags(settings)
        if not done[flag]
    ]


def stated_findings(
    settings: Mapping[str, Any], robot: Robot, remedy: str = SAME_RELATIVE
) -> list[Finding]:
    """Whether a robot's table has the conventions that a config.json states: those of ALOHA, and
    the relative actions of LeRobot's processors, which `pi0 convert` keeps there."""
    stated = settings.get(RELATIVE_ACTIONS)
    if stated is None:
        return aloha_findings(settings, robot)
    if not isinstance(stated, list) or any(type(value) is not bool for value in stated):
        sentence = f"config.json {RELATIVE_ACTIONS}: expected true or false by action, found "
        return [error("relative-unknown", f"{sentence}{stated!r:.80}.")]
    return [*aloha_findings(settings, robot), *relative_findings(tuple(stated), robot, remedy)]


def relative_findings(
    relative: tuple[bool, ...] | None, robot: Robot, remedy: str = SAME_RELATIVE
) -> list[Finding]:
    """Whether a robot's table has the relative actions that LeRobot's processors have."""
    ours = robot.relative(len(relative or ()) or sum(map(abs, robot.delta))).tolist()
    if ours == list(relative or [False] * len(ours)):
        return []
    return [
        error(
            "relative-differs",
            f"robot {robot.name}: expected actions relative to the state in "
            f"{_positions(relative or ())}, as LeRobot's processors have them, found "
            f"{_positions(ours)}: {remedy}",
        )
    ]


def camera_findings(
    cameras: Sequence[str], rename: Mapping[str, str], robot: Robot
) -> list[Finding]:
    """Whether a robot's table has the cameras of LeRobot's config.json in the order of its slots.

    Keys that nothing in config.json resembles may be the robot's own, in that order.

    Args:
        rename: of the checkpoint, since a table may have the keys from before.
    """
    named = [_declared(camera, cameras, rename) for camera in robot.cameras]
    named = [key if named.count(key) == 1 else None for key in named]
    found = [key for key in named if key]
    expected = [key for key in cameras if key in found]
    if found != expected:
        sentence = (
            f"robot {robot.name}: expected its cameras in the order in which the checkpoint's "
            f"config.json has them ({', '.join(expected)}), found {', '.join(found)}: the model "
            "would see them in each other's place. Leave out --robot, or put the table's cameras "
            "in this order."
        )
        return [error("cameras-differ", sentence)]
    others = [c.key for c, key in zip(robot.cameras, named, strict=True) if not key]
    if others and (found or len(others) > len(cameras) > 0):
        sentence = (
            f"robot {robot.name}: expected the cameras of the checkpoint's config.json, "
            f"{', '.join(cameras)}, found also {', '.join(others)}: the model would see a picture "
            "in the place of another. Leave out --robot, or give cameras the names in config.json."
        )
        return [warning("cameras-unknown", sentence)]
    if others and cameras:
        sentence = (
            f"robot {robot.name}: expected the cameras of the checkpoint's config.json, "
            f"{', '.join(cameras)}, in this order, found {', '.join(others)}: their order alone "
            "decides which picture takes whose place. Leave out --robot, or give cameras the names "
            "in config.json."
        )
        return [warning("cameras-by-order", sentence)]
    return []


def _declared(camera: Camera, cameras: Sequence[str], rename: Mapping[str, str]) -> str | None:
    """The camera of config.json that a table's camera is, by its key or one of its names."""
    for key in (camera.key, rename.get(camera.key)):
        if key in cameras:
            return key
    names = {last_part(camera.key), *camera.names}
    same = [key for key in cameras if last_part(key) in names]
    return same[0] if len(same) == 1 else None


def last_part(key: str) -> str:
    """The last part of an observation's key."""
    return key.replace("/", ".").rpartition(".")[2]


def processor_findings(out: Normalizer, into: Normalizer) -> list[Finding]:
    """Whether LeRobot's two processors normalise actions by the same statistics."""
    ours = [out, into]
    shapes = {(stats.width, stats.shift) for stats in ours}
    if len(shapes) == 1 and all(
        np.array_equal(*(getattr(stats, name) for stats in ours))
        for name in ("offset", "inverse_scale")
    ):
        return []
    return [
        warning(
            "processors-differ",
            "statistics of actions: expected the same in both of LeRobot's processors, found "
            "others in the preprocessor, which training uses. Those of the postprocessor move the "
            "robot. Copy all files of one checkpoint.",
        )
    ]


def _positions(mask: Sequence[bool]) -> str:
    """Where a mask is set, in words: "dimensions 0 to 5, 7"."""
    starts = [i for i, on in enumerate(mask) if on and not (i and mask[i - 1])]
    ends = [i for i, on in enumerate(mask) if on and not any(mask[i + 1 : i + 2])]
    runs = [f"{a} to {b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True)]
    if not runs:
        return "no dimension"
    return f"dimension{'' if sum(mask) == 1 else 's'} {', '.join(runs)} of {len(mask)}"


def width_findings(
    config: Pi0Config, robot: Robot, state: Normalizer, actions: Normalizer
) -> list[Finding]:
    """What does not fit between the model, a robot's table and statistics; flat statistics."""
    found = []
    reach = robot.reach(robot.action_dim or actions.width)
    if robot.state_dim is None and state.width < reach:
        found.append(
            error(
                "state-statistics-narrow",
                f"statistics of state: expected at least {reach} values, which the relative "
                f"actions of robot {robot.name} are added to, found {state.width}. Name the right "
                "ones with --norm-stats, or the robot with --robot.",
            )
        )
    for what, stats, table, model in (
        ("state", state, robot.state_dim, config.state_dim),
        ("actions", actions, robot.action_dim, config.action_dim),
    ):
        widest = max(stats.width, table or 0)
        if widest > model:
            found.append(
                error(
                    f"{what}-too-wide",
                    f"{what}: expected at most the {model} of the model, found "
                    f"{stats.width} in the statistics and {table or stats.width} of robot "
                    f"{robot.name}.",
                )
            )
        elif table is not None and stats.width < table:
            found.append(
                error(
                    f"{what}-statistics-narrow",
                    f"statistics of {what}: expected {table} values for robot {robot.name}, found "
                    f"{stats.width}. They are another robot's: name the right ones with "
                    "--norm-stats, or the robot with --robot.",
                )
            )
        elif (
            table is not None
            and table < stats.width
            and (stats.width < model or not stats.padded(table))
        ):
            found.append(
                warning(
                    f"{what}-statistics-wide",
                    f"statistics of {what}: expected {table} values for robot {robot.name}, found "
                    f"{stats.width}; the first {table} are used. Another robot's statistics?",
                )
            )
        flat = stats.flat(table or stats.width)
        if flat:
            found.append(
                warning(
                    f"{what}-statistics-flat",
                    f"statistics of {what}: no spread in {', '.join(map(str, flat))}: any "
                    "deviation there becomes huge. Were these joints still in the training data?",
                )
            )
    return found


def image_findings(stats: Mapping[str, Normalizer], robot: Robot, resize: str) -> list[Finding]:
    """Whether statistics of images, by camera, can be applied."""
    unknown = sorted(stats.keys() - {camera.key for camera in robot.cameras})
    if not unknown and resize == "lerobot":
        return []
    found = f"robot {robot.name} without {', '.join(unknown)}" if unknown else "openpi's resizing"
    return [
        error(
            "image-statistics",
            "images: the checkpoint normalises them by statistics of its own cameras before "
            f"LeRobot's resizing; found {found}. Leave out --robot, --resize and --preprocessing.",
        )
    ]
