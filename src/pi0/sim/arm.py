"""The arm: a hand that points down, moved to where it is told by inverse kinematics.

Damped least squares on the Jacobian of the point between the fingertips (Buss, "Introduction to
inverse kinematics", 2004), one joint target for each control step; servos follow.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pi0.sim.render import mujoco

Floats = NDArray[np.float64]

JOINTS = 7
READY = np.array([0.0, -0.2, 0.0, -2.3, 0.0, 2.1, 0.785])  # radians; where iterations begin
ITERATIONS = 8
DAMPING = 1e-3
LARGEST_TURN = 0.3  # radians of a joint in one iteration
POINTING_DOWN = np.array([1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, -1.0])  # rows of the rotation
WIDTH = 0.08  # metres between the fingertips of the open hand


class Arm:
    """Kinematics of the arm, apart from the simulation, whose state is not touched."""

    def __init__(self, model: mujoco.MjModel) -> None:
        self.model = model
        self.data = mujoco.MjData(model)
        self.site = model.site("tcp").id
        self.jacobian = np.zeros((6, model.nv))
        self.low, self.high = model.jnt_range[:JOINTS].T

    def joints_at(self, target: Floats, start: Floats) -> Floats:
        """Joint angles [7] in radians that bring the fingertips to a point [3] in metres, the hand
        pointing down; iterations begin from the joints `start`."""
        data, model = self.data, self.model
        joints = start.copy()
        for _ in range(ITERATIONS):
            data.qpos[:JOINTS] = joints
            mujoco.mj_kinematics(model, data)
            mujoco.mj_comPos(model, data)
            mujoco.mj_jacSite(model, data, self.jacobian[:3], self.jacobian[3:], self.site)
            error = np.concatenate([target - data.site_xpos[self.site], self._turn()])
            if np.abs(error).max() < 1e-4:
                break
            jacobian = self.jacobian[:, :JOINTS]
            square = jacobian @ jacobian.T + DAMPING * np.eye(6)
            step = jacobian.T @ np.linalg.solve(square, error)
            joints = np.clip(
                joints + np.clip(step, -LARGEST_TURN, LARGEST_TURN), self.low, self.high
            )
        return joints

    def _turn(self) -> Floats:
        """Rotation vector [3] from the hand's orientation to pointing down."""
        now, down, difference = np.zeros(4), np.zeros(4), np.zeros(3)
        mujoco.mju_mat2Quat(now, self.data.site_xmat[self.site])
        mujoco.mju_mat2Quat(down, POINTING_DOWN)
        mujoco.mju_subQuat(difference, down, now)  # in the hand's frame
        rotation: Floats = self.data.site_xmat[self.site].reshape(3, 3)
        return np.asarray(rotation @ difference)
