"""Robot tables, against values measured with openpi's transforms."""

from __future__ import annotations

import numpy as np
import pytest

from pi0.policy.robots import ROBOTS, aloha_decode_actions, aloha_encode_state, delta_mask


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


def test_delta_mask() -> None:
    assert delta_mask((2, -1, 1), 6).tolist() == [True, True, False, True, False, False]
    assert delta_mask((6, -1), 4).tolist() == [True] * 4


@pytest.mark.parametrize("robot", ROBOTS.values(), ids=ROBOTS)
def test_tables_are_sound(robot) -> None:
    names = [name for camera in robot.cameras for name in camera.names]
    assert len(names) == len(set(names))
    assert 1 <= len(robot.cameras) <= 3
    if robot.action_dim is not None:
        assert sum(map(abs, robot.delta)) <= robot.action_dim


def test_observation_in_the_robots_keys() -> None:
    observation = ROBOTS["droid"].observation(
        {"observation/wrist_image_left": 1}, np.arange(8.0), "x"
    )
    assert observation["observation/joint_position"].tolist() == list(range(7))
    assert observation["observation/gripper_position"].tolist() == [7]
    assert observation["prompt"] == "x"
