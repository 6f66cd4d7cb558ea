"""What a LeRobot config.json says of cameras, state, actions and chunks.

LeRobot's π0 reads images by feature type, whatever they are called, and state and actions by the
names `observation.state` and `action` only. Source: LeRobot 0.6.1, `policies/pi0/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pi0.checkpoint.lerobot import ACTION, EMPTY_CAMERA, MAX_DIM, STATE, complete_features
from pi0.findings import Finding, error, warning
from pi0.number import is_count
from pi0.policy.lerobot.fields import check_features, show


@dataclass(frozen=True)
class Features:
    """The features of a policy.

    Attributes:
        cameras: keys of images in LeRobot's order, without its empty cameras.
        state_dim, action_dim: declared lengths; None: not declared, or declared as the model's
            padded length, which says nothing of the robot.
        max_state_dim, max_action_dim: the model's padded lengths.
        chunk_size, n_action_steps: actions in a chunk, and how many of them are carried out before
            the next one is computed; None: not declared.
    """

    cameras: tuple[str, ...]
    state_dim: int | None
    action_dim: int | None
    max_state_dim: int
    max_action_dim: int
    chunk_size: int | None
    n_action_steps: int | None


def read_features(
    settings: Mapping[str, Any], robot_given: bool, findings: list[Finding]
) -> Features:
    """The features of a config.json.

    Args:
        robot_given: a robot table says which cameras there are and what its conventions are.
        findings: what is found is appended.
    """
    inputs, outputs = _checked(settings, findings)
    cameras = tuple(
        key
        for key, feature in inputs.items()
        if feature["type"] == "VISUAL" and not key.startswith(EMPTY_CAMERA)
    )
    if not robot_given:
        if not cameras:
            findings.append(
                error(
                    "cameras-missing",
                    "config.json input_features: expected cameras (features of type VISUAL), found "
                    "none. Name the robot with --robot.",
                )
            )
        _check_robot_flags(settings, findings)
    read = {STATE, ACTION, *cameras}
    unread = [
        key for key in (*inputs, *outputs) if key not in read and not key.startswith(EMPTY_CAMERA)
    ]
    if unread:
        findings.append(
            warning(
                "features-unread",
                f"config.json: expected features that LeRobot's π0 reads (images, {STATE}, "
                f"{ACTION}), found also {', '.join(unread)}, which has no effect.",
            )
        )
    counts = {
        name: _count(settings, name, findings)
        for name in ("max_state_dim", "max_action_dim", "chunk_size", "n_action_steps")
    }
    max_state_dim = counts["max_state_dim"] or MAX_DIM
    max_action_dim = counts["max_action_dim"] or MAX_DIM
    chunk_size, n_action_steps = counts["chunk_size"], counts["n_action_steps"]
    if chunk_size and n_action_steps and n_action_steps > chunk_size:
        findings.append(
            error(
                "action-steps",
                f"config.json n_action_steps: expected at most the chunk_size of {chunk_size}, "
                f"found {n_action_steps}.",
            )
        )
    return Features(
        cameras,
        _length(inputs, STATE, max_state_dim, findings),
        _length(outputs, ACTION, max_action_dim, findings),
        max_state_dim,
        max_action_dim,
        chunk_size,
        n_action_steps,
    )


def _checked(
    settings: Mapping[str, Any], findings: list[Finding]
) -> tuple[dict[str, Any], dict[str, Any]]:
    sound = dict(settings)
    for name in ("input_features", "output_features"):
        value = settings.get(name)
        problem = None if value is None else check_features(value)
        if problem is not None:
            findings.append(error("feature-form", f"config.json {name}: {problem}."))
            sound[name] = None
    for name in ("max_state_dim", "max_action_dim"):
        if not is_count(settings.get(name)):
            sound[name] = MAX_DIM
    return complete_features(sound)


def _check_robot_flags(settings: Mapping[str, Any], findings: list[Finding]) -> None:
    """Flags of older releases, whose transforms are here those of the robot tables."""
    adapt, relative = (
        bool(settings.get(name)) for name in ("adapt_to_pi_aloha", "use_delta_joint_actions_aloha")
    )
    if adapt:
        robot = "aloha" if relative else "aloha_sim"
        findings.append(
            error(
                "robot-needed",
                "config.json adapt_to_pi_aloha: expected false, for LeRobot's processors have no "
                f"ALOHA conventions any more, found true. Name the robot with --robot {robot}.",
            )
        )
    elif relative:
        findings.append(
            error(
                "robot-needed",
                "config.json use_delta_joint_actions_aloha: expected false without "
                "adapt_to_pi_aloha, found true. Name a robot whose actions are relative with "
                "--robot.",
            )
        )


def _count(settings: Mapping[str, Any], name: str, findings: list[Finding]) -> int | None:
    value = settings.get(name)
    if value is None:
        return None
    if is_count(value):
        return int(value)
    findings.append(
        error("feature-form", f"config.json {name}: expected a count, found {show(value)}.")
    )
    return None


def _length(
    features: Mapping[str, Any], key: str, padded: int, findings: list[Finding]
) -> int | None:
    shape = features[key]["shape"]
    if len(shape) != 1:
        findings.append(
            error(
                "feature-form",
                f"config.json: expected the feature {key} with a shape [D], found {shape}.",
            )
        )
        return None
    length = int(shape[0])
    return None if length == padded else length
