"""Robot tables, against values measured with openpi's transforms."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from pi0.errors import ConfigError, Pi0Error
from pi0.policy import ActionLimits, Camera, Robot, find_robot
from pi0.policy.robots import (
    ROBOTS,
    aloha_decode_actions,
    aloha_encode_actions,
    aloha_encode_state,
)


@pytest.mark.parametrize(
    ("opening", "expected"),
    [(0, -1.079866), (0.25, -0.513078), (0.5, -0.140056), (0.75, 0.223328), (1, 0.945653)],
)
def test_aloha_gripper_in(opening: float, expected: float) -> None:
    state = np.arange(14.0)
    state[[6, 13]] = opening
    encoded = aloha_encode_state(state)
    np.testing.assert_allclose(encoded[[6, 13]], expected, atol=1e-6)
    np.testing.assert_array_equal(encoded[:6], [0, -1, -2, 3, 4, 5])
    np.testing.assert_array_equal(encoded[7:13], [7, -8, -9, 10, 11, 12])


@pytest.mark.parametrize(("angle", "expected"), [(0, 0.553378), (0.5, 0.790087), (1, 1.026795)])
def test_aloha_gripper_out(angle: float, expected: float) -> None:
    actions = np.ones((50, 14))
    actions[:, [6, 13]] = angle
    decoded = aloha_decode_actions(actions)
    np.testing.assert_allclose(decoded[:, [6, 13]], expected, atol=1e-6)
    np.testing.assert_array_equal(decoded[0, :6], [1, -1, -1, 1, 1, 1])


def test_adaptation_leaves_its_input_alone() -> None:
    state = np.full(14, 0.5)
    aloha_encode_state(state)
    aloha_decode_actions(state)
    assert (state == 0.5).all()


def test_commands_there_and_back() -> None:
    actions = np.random.default_rng(0).normal(size=(3, 50, 14))
    np.testing.assert_allclose(aloha_encode_actions(aloha_decode_actions(actions)), actions)
    np.testing.assert_allclose(aloha_decode_actions(aloha_encode_actions(actions)), actions)


def robot(**changes: Any) -> Robot:
    given = {
        "name": "arm",
        "cameras": (Camera("images/top"),),
        "state": (("joints", 6), ("gripper", 1)),
        "action_dim": 7,
    }
    return Robot(**{**given, **changes})


def test_relative_actions() -> None:
    mask = robot(delta=(2, -1, 1)).relative
    assert mask(6).tolist() == [True, True, False, True, False, False]
    assert mask(2).tolist() == [True] * 2
    assert not robot().relative(7).any()


@pytest.mark.parametrize("name", ROBOTS)
def test_tables_are_sound(name: str) -> None:
    table = ROBOTS[name]
    assert 1 <= len(table.cameras) <= 3
    for camera in table.cameras:
        assert all(table.camera_key(short) == camera.key for short in (*camera.names, camera.key))
    for camera in table.cameras:
        assert table.camera_key(camera.key.rpartition("/")[2]) == camera.key
    assert table.camera_key("nowhere") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cameras": ("front",)}, r"cameras: expected at least one Camera\(key=…, names"),
        ({"cameras": ()}, "cameras: expected at least one Camera"),
        ({"cameras": (Camera("a"), Camera("a"))}, "distinct keys and names, found a twice"),
        ({"cameras": (Camera("a", ("b",)), Camera("b"))}, "distinct keys and names, found b"),
        ({"cameras": (Camera(""),)}, "expected a key for each, found an empty one"),
        ({"state": ()}, "state: expected distinct keys, at least one"),
        ({"state": (("joints", 0),)}, "state: expected lengths of 1 or more"),
        ({"state": (("joints", None), ("gripper", 1))}, "a length for each of several keys"),
        ({"action_dim": 0}, "action_dim: expected 1 or more, found 0"),
        ({"action_dim": 7.5}, "action_dim: expected 1 or more, found 7.5"),
        ({"delta": (40, -3)}, "at most the 7 actions, found 43; .* 7 state values, found 40"),
        ({"delta": (6, 0)}, "delta: expected whole numbers other than 0"),
        ({"delta": (-1, 7), "action_dim": 8}, "at most the 7 state values, found 8"),
        ({"action_names": ("a",)}, "action_names: expected one for each of the 7 actions, found 1"),
        (
            {"limits": ActionLimits((0.0,), (1.0,), (None,), (None,))},
            "limits: expected one for each of the 7 actions, found 1",
        ),
        (
            {
                "delta": (2, -5),
                "limits": ActionLimits(*[(None,) * 7] * 3, (1, None, 5, *[None] * 4)),
            },
            r"limits.state: expected \[0, 1\] for the relative actions, .* found \[1, None\]",
        ),
        ({"decode_actions": aloha_decode_actions}, "expected both or neither"),
        ({"control_hz": -1}, "control_hz: expected 0.001 to 1e"),
        ({"control_hz": float("inf")}, "control_hz: expected 0.001 to 1e"),
        ({"control_hz": 10**400}, "control_hz: expected 0.001 to 1e"),
        ({"control_hz": 1e-320}, "control_hz: expected 0.001 to 1e"),
        ({"control_hz": "50"}, "control_hz: expected a number, found '50'"),
        ({"cameras": Camera("top")}, r"at least one Camera\(key=…, names"),
        (
            {"cameras": (Camera("top", "t"),)},
            r"cameras: expected at least one Camera\(key=…, names",
        ),
        ({"state": ("joints", 7)}, r"state: expected a tuple of \(key, length\), found"),
        ({"state": (("joints", "7"),)}, r"state: expected a tuple of \(key, length\), found"),
        ({"ignored": "depth"}, "ignored: expected a tuple of texts, found 'depth'"),
        ({"delta": 6}, "delta: expected whole numbers other than 0"),
        ({"delta": (True, -1)}, "delta: expected whole numbers other than 0"),
        ({"cameras": (Camera("top", required="no"),)}, "required=True or False"),  # type: ignore
        ({"encode_state": 3}, "encode_state: expected a function, found 3"),
        ({"decode_actions": "x", "encode_actions": abs}, "decode_actions: expected a function"),
        ({"state_in_prompt": "no"}, "state_in_prompt: expected True, False or None, found 'no'"),
        ({"limits": {"low": 0}}, "limits: expected ActionLimits, found"),
        ({"ignored": ("joints",)}, "expected keys of their own, found joints in two of them"),
        ({"cameras": (Camera("joints"),)}, "found joints in two"),
        ({"cameras": (Camera("prompt"), Camera("task"))}, "found prompt, task in two"),
    ],
)
def test_tables_that_contradict_themselves(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=f"robot 'arm': .*{message}"):
        robot(**changes)


def test_no_such_robot() -> None:
    with pytest.raises(Pi0Error, match=r"expected one of generic, .* or a file.toml, found 'r2d2'"):
        find_robot("r2d2")


def test_observation_in_the_robots_keys() -> None:
    observation = ROBOTS["droid"].observation(
        {"observation/wrist_image_left": 1}, np.arange(8.0), "x"
    )
    assert observation["observation/joint_position"].tolist() == list(range(7))
    assert observation["observation/gripper_position"].tolist() == [7]
    assert observation["prompt"] == "x"
