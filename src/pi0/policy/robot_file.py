"""A robot as a TOML file, checked like the built-in tables; docs/robots.md shows a whole one."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pi0.errors import ConfigError
from pi0.number import is_number
from pi0.policy.limits import ActionLimits
from pi0.policy.robot import Camera, Robot

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Section → its keys: the type of each, and whether it must be there.
ROBOT_KEYS: dict[str, tuple[type, bool]] = {
    "name": (str, True),
    "control_hz": (float, False),
    "ignored": (list, False),
    "state_in_prompt": (bool, False),
    "cameras": (list, True),
    "state": (list, True),
    "actions": (list, True),
}
CAMERA_KEYS: dict[str, tuple[type, bool]] = {
    "key": (str, True),
    "names": (list, False),
    "required": (bool, False),
}
STATE_KEYS: dict[str, tuple[type, bool]] = {"key": (str, True), "length": (int, True)}
ACTION_KEYS: dict[str, tuple[type, bool]] = {
    "name": (str, True),
    "unit": (str, False),
    "relative": (bool, False),
    "low": (float, False),
    "high": (float, False),
    "step": (float, False),
    "state": (int, False),
}
SECTIONS = {"cameras": CAMERA_KEYS, "state": STATE_KEYS, "actions": ACTION_KEYS}


def read_robot_file(path: Path) -> Robot:
    """The robot that a TOML file describes.

    An action that is relative to the state commands the state value of its own index; another one
    may say with `state` which one it commands.

    Raises:
        ConfigError: no such file, no TOML, or a key that is missing, unknown or of a wrong type.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:  # no TOML, no UTF-8, thousands of digits
        found = f"none ({error.strerror})" if isinstance(error, OSError) else str(error)
        raise ConfigError(f"robot {path}: expected a TOML file, found {found}.") from error
    _check(path, "robot", table, ROBOT_KEYS)
    for section, keys in SECTIONS.items():
        for i, row in enumerate(table[section]):
            _check(path, f"{section}[{i}]", row, keys)
    actions = table["actions"]
    try:
        robot = Robot(
            name=table["name"],
            cameras=tuple(
                Camera(c["key"], tuple(c.get("names", ())), c.get("required", True))
                for c in table["cameras"]
            ),
            ignored=tuple(table.get("ignored", ())),
            state=tuple((row["key"], row["length"]) for row in table["state"]),
            action_dim=len(actions),
            delta=tuple(1 if action.get("relative") else -1 for action in actions),
            action_names=tuple(action["name"] for action in actions),
            action_units=tuple(action.get("unit", "") for action in actions),
            control_hz=table.get("control_hz"),
            state_in_prompt=table.get("state_in_prompt"),
        )
        return replace(robot, limits=_limits(actions, robot.state_dim or 0))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _limits(actions: list[dict[str, Any]], state_dim: int) -> ActionLimits | None:
    state = [
        action.get("state", i if action.get("relative") else None)
        for i, action in enumerate(actions)
    ]
    for i, index in enumerate(state):
        if index is not None and not 0 <= index < state_dim:
            raise ConfigError(
                f"actions[{i}].state: expected an index of one of the {state_dim} "
                f"state values, found {index}."
            )
        if actions[i].get("relative") and index != i:
            raise ConfigError(
                f"actions[{i}].state: expected {i}, for a relative action is added to the state "
                f"value of its own index, found {index}. Put state and actions in the same order."
            )
    if not any(key in action for action in actions for key in ("low", "high", "step")):
        return None
    low, high, step = (tuple(a.get(key) for a in actions) for key in ("low", "high", "step"))
    return ActionLimits(low, high, step, tuple(state))


def _check(path: Path, where: str, row: Any, keys: Mapping[str, tuple[type, bool]]) -> None:
    if not isinstance(row, dict):
        raise ConfigError(f"robot {path}: {where}: expected a table, found {row!r}.")
    unknown = sorted(row.keys() - keys.keys())
    missing = [key for key, (_, needed) in keys.items() if needed and key not in row]
    if unknown or missing:
        raise ConfigError(
            f"robot {path}: {where}: expected the keys {', '.join(keys)}, found "
            + " and ".join(
                [f"no {', '.join(missing)}"] * bool(missing)
                + [f"also {', '.join(unknown)}"] * bool(unknown)
            )
            + "."
        )
    for key, value in row.items():
        kind = keys[key][0]
        fits = (
            is_number(value)
            if kind is float
            else isinstance(value, kind) and not (kind is int and isinstance(value, bool))
        )
        if not fits:
            words = {str: "text", list: "a list", bool: "true or false", int: "a whole number"}
            raise ConfigError(
                f"robot {path}: {where}.{key}: expected {words.get(kind, 'a number')}, found "
                f"{value!r}."
            )
        if key in ("names", "ignored") and not all(isinstance(item, str) for item in value):
            raise ConfigError(f"robot {path}: {where}.{key}: expected texts, found {value!r}.")
