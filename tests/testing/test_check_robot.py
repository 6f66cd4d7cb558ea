"""The conformance check of robots: built-in tables pass, broken ones are named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi0.errors import Pi0Error
from pi0.policy import ROBOTS, ActionLimits
from pi0.testing import check_robot


@pytest.mark.parametrize("name", ROBOTS)
def test_built_in_robots(name: str) -> None:
    check_robot(name)
    check_robot(ROBOTS[name])


def in_place(x: np.ndarray) -> np.ndarray:
    x *= 2
    return x


def noisy(x: np.ndarray) -> np.ndarray:
    return x + 1e-12 * np.random.default_rng().random()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encode_state": in_place}, "encode_state: expected its input to stay as it is"),
        ({"encode_state": lambda x: x[..., :3]}, r"encode_state: expected float64 \[3, 14\]"),
        ({"encode_state": lambda x: x.astype(np.float32)}, "as it was given, found float32"),
        ({"encode_state": lambda x: x * np.inf}, "expected finite values for finite ones"),
        ({"encode_state": lambda x: x - x.mean()}, "the same of a row alone and in a batch"),
        ({"encode_actions": lambda x: x}, "to be each other's inverse from 0.1 to 0.9, found"),
        ({"encode_state": noisy}, "expected the same of the same values each time, found other"),
    ],
)
def test_broken_conventions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_robot(replace(ROBOTS["aloha"], **changes))


def difference(x: np.ndarray) -> np.ndarray:
    return np.diff(x, axis=-2, prepend=0.0) if x.ndim > 1 else x.copy()


def total(x: np.ndarray) -> np.ndarray:
    return x.cumsum(axis=-2) if x.ndim > 1 else x.copy()


@pytest.mark.parametrize(
    ("encode", "decode", "message"),
    [
        (difference, total, "encode_actions: expected the same of a row alone and in a batch"),
        (np.abs, np.abs, "each other's inverse from -1 to 0.99, found values 2 off"),
        (np.square, np.sqrt, "each other's inverse from -1 to 0.99, found values 2 off"),
    ],
)
def test_conventions_of_actions(encode: Any, decode: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check_robot(replace(ROBOTS["droid"], encode_actions=encode, decode_actions=decode))


def test_an_opening_without_a_sign() -> None:
    """Values beyond the stated limits, and those that are refused when a robot runs, are none."""
    limits = ActionLimits((0,) * 8, (1,) * 8, (None,) * 8, (None,) * 8)
    opening = {"encode_actions": np.square, "decode_actions": np.sqrt}
    check_robot(replace(ROBOTS["droid"], **opening, limits=limits))
    logarithm = {"encode_actions": np.log, "decode_actions": np.exp}
    check_robot(replace(ROBOTS["droid"], **logarithm))


def turned(x: np.ndarray) -> np.ndarray:
    return x * [1, -1, *[1] * (x.shape[-1] - 2)]


@pytest.mark.parametrize(
    ("robot", "changes"),
    [
        ("libero", {"encode_state": turned}),
        ("libero", {"encode_actions": turned, "decode_actions": turned}),
        ("libero", {"encode_state": np.rad2deg}),
        ("aloha", {"encode_state": None}),
        ("aloha", {"encode_actions": None, "decode_actions": None}),
    ],
)
def test_a_relative_action_of_zero_does_not_move(robot: str, changes: dict[str, Any]) -> None:
    message = r"a relative action \d of zero to command a value of the state, found .* would move"
    with pytest.raises(AssertionError, match=message):
        check_robot(replace(ROBOTS[robot], **changes))


def test_states_in_another_order_than_actions() -> None:
    """`encode_state` turns round what `decode_actions` leaves; the limits name the state value."""

    def turn_round(x: np.ndarray) -> np.ndarray:
        return x[..., ::-1].copy()

    robot = replace(ROBOTS["aloha_sim"], decode_actions=None, encode_actions=None, delta=(14,))
    robot = replace(robot, encode_state=turn_round)
    check_robot(robot)
    nothing = (None,) * 14
    check_robot(
        replace(robot, limits=ActionLimits(nothing, nothing, nothing, tuple(range(14))[::-1]))
    )
    with pytest.raises(AssertionError, match="action 0 of zero to command state value 0, found"):
        check_robot(
            replace(robot, limits=ActionLimits(nothing, nothing, nothing, tuple(range(14))))
        )


def test_no_such_robot(tmp_path: Path) -> None:
    with pytest.raises(Pi0Error, match="found 'r2d2'"):
        check_robot("r2d2")
    with pytest.raises(Pi0Error, match="expected a TOML file"):
        check_robot(str(tmp_path / "arm.toml"))
