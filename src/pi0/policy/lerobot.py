"""What a LeRobot checkpoint's own files say about its robot and its normalisation.

Read are config.json (camera features) and policy_preprocessor.json / policy_postprocessor.json
with the statistics files that these name. Format: LeRobot 0.6.1, `processor/pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pi0.checkpoint.files import get_nested, read_headers, read_json, stream
from pi0.errors import Pi0Error
from pi0.policy.normalize import Normalizer, identity, make_normalizer
from pi0.policy.robots import Camera, Robot

PREPROCESSOR, POSTPROCESSOR = "policy_preprocessor.json", "policy_postprocessor.json"
MODES = {
    "IDENTITY": "identity",
    "MEAN_STD": "mean_std",
    "QUANTILES": "quantiles",
    "MIN_MAX": "min_max",
}
CAMERA_PREFIX = "observation.images."


def is_lerobot(folder: Path) -> bool:
    return (folder / PREPROCESSOR).exists()


def read_normalizers(folder: Path, mode: str | None = None) -> tuple[Normalizer, Normalizer]:
    """Of state and actions, from the processors' statistics files.

    Args:
        mode: of `NEEDED` in normalize.py; None: what the processors say.

    Raises:
        Pi0Error: a processor or statistic is missing, or of a mode that is not known here.
    """
    state = _normalizer(
        folder, PREPROCESSOR, "normalizer_processor", "STATE", "state", "observation.state", mode
    )
    actions = _normalizer(
        folder, POSTPROCESSOR, "unnormalizer_processor", "ACTION", "actions", "action", mode
    )
    return state, actions


def read_robot(folder: Path) -> Robot:
    """Cameras, state and action widths from config.json, relative actions from the preprocessor.

    Raises:
        Pi0Error: config.json names no cameras, or relative actions whose joints have no names.
    """
    path = folder / "config.json"
    config = read_json(path)
    inputs = get_nested(config, "input_features")
    cameras = [
        key
        for key in (inputs if isinstance(inputs, Mapping) else ())
        if key.startswith(CAMERA_PREFIX) and "empty_camera" not in key
    ]
    state_dim = _width(path, inputs, "observation.state")
    action_dim = _width(path, get_nested(config, "output_features"), "action")
    if not cameras:
        raise Pi0Error(
            f"{path}: expected input_features with cameras ({CAMERA_PREFIX}…), found none. Name "
            "the robot with --robot."
        )
    return Robot(
        name="lerobot",
        # As in LeRobot, one camera at least must be there, the others may be absent.
        cameras=tuple(Camera(k, (k.removeprefix(CAMERA_PREFIX),), required=False) for k in cameras),
        state=(("observation.state", state_dim),),
        action_dim=action_dim,
        delta=_relative_actions(folder, action_dim),
    )


def _width(path: Path, features: Any, key: str) -> int:
    """The length of a vector feature. Keys hold dots, so this is no `dig`."""
    feature = features.get(key) if isinstance(features, Mapping) else None
    shape = get_nested(feature, "shape")
    if not isinstance(shape, list) or len(shape) != 1 or not isinstance(shape[0], int):
        raise Pi0Error(
            f"{path}: expected the feature {key} with a shape [D] as LeRobot writes it, found "
            f"{feature}. Name the robot with --robot."
        )
    return shape[0]


def _relative_actions(folder: Path, action_dim: int) -> tuple[int, ...]:
    step = _step(folder, PREPROCESSOR, "relative_actions_processor")
    if not get_nested(step, "config.enabled"):
        return ()
    names = get_nested(step, "config.action_names")
    if not isinstance(names, list) or len(names) != action_dim:
        raise Pi0Error(
            f"{folder / PREPROCESSOR}: expected the names of {action_dim} actions for relative "
            f"actions, found {names}."
        )
    excluded = get_nested(step, "config.exclude_joints") or []
    return tuple(-1 if any(word in name for word in excluded) else 1 for name in names)


def _normalizer(
    folder: Path,
    file: str,
    registry_name: str,
    feature_type: str,
    what: str,
    key: str,
    mode: str | None,
) -> Normalizer:
    step = _step(folder, file, registry_name)
    if step is None:
        raise Pi0Error(f"{folder / file}: expected a step {registry_name}, found none.")
    name = get_nested(step, f"config.norm_map.{feature_type}")
    if not isinstance(name, str) or name not in MODES:
        raise Pi0Error(
            f"{folder / file}: expected norm_map {feature_type} to be one of {', '.join(MODES)}, "
            f"found {name}."
        )
    if mode is None and name == "IDENTITY":
        return identity(what, _width(folder / file, get_nested(step, "config.features"), key))
    state_file = step.get("state_file")
    if not isinstance(state_file, str) or not (folder / state_file).is_file():
        raise Pi0Error(
            f"{folder / file}: expected the statistics file of {registry_name}, found "
            f"{state_file} missing. Copy all files of the checkpoint."
        )
    headers = {
        k: v for k, v in read_headers([folder / state_file]).items() if k.startswith(key + ".")
    }
    stats = {
        k.removeprefix(key + "."): values.double().numpy().astype(np.float64)
        for k, _, values in stream(headers)
    }
    return make_normalizer(what, mode or MODES[name], "lerobot", stats)


def _step(folder: Path, file: str, registry_name: str) -> dict[str, Any] | None:
    if not (folder / file).exists():
        raise Pi0Error(
            f"{folder}: expected {file} beside the other LeRobot processor file, found none. Copy "
            "all files of the checkpoint."
        )
    steps = read_json(folder / file).get("steps")
    if not isinstance(steps, list):
        raise Pi0Error(f"{folder / file}: expected a list `steps`, found none.")
    return next(
        (step for step in steps if get_nested(step, "registry_name") == registry_name), None
    )
