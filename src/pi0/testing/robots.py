"""Conformance of a robot's table: its conventions must be each other's inverse, for any batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pi0.policy.robot import Robot
from pi0.policy.robots import find_robot

Floats = NDArray[np.float64]
Convention = Callable[[Floats], Floats]

HORIZON, BATCH = 7, 3
ANY_WIDTH = 9  # of a state or an action whose length the table leaves to the statistics
TOLERANCE = 1e-9  # of values about 1, in float64


def check_robot(robot: str | Robot) -> None:
    """Checks that a robot's table can be used in both directions.

    Its functions keep shape and dtype, leave their input alone, treat every row of a batch alike,
    and `encode_actions` is the inverse of `decode_actions`; its cameras are found by their names.

    Args:
        robot: a `Robot`, the name of an installed one, or the path of a TOML file.

    Raises:
        AssertionError: says in one sentence what the table does not keep.
        Pi0Error: there is no such robot, or it contradicts itself.
    """
    robot = find_robot(robot)
    rng = np.random.default_rng(0)
    state = rng.uniform(0.1, 0.9, (BATCH, robot.state_dim or ANY_WIDTH))
    actions = rng.uniform(0.1, 0.9, (BATCH, HORIZON, robot.action_dim or ANY_WIDTH))
    for name, value in (
        ("encode_state", state),
        ("encode_actions", actions),
        ("decode_actions", actions),
    ):
        convention = getattr(robot, name)
        if convention is not None:
            _check_convention(f"robot {robot.name}: {name}", convention, value)
    if robot.encode_actions is not None and robot.decode_actions is not None:
        for first, second in (
            (robot.encode_actions, robot.decode_actions),
            (robot.decode_actions, robot.encode_actions),
        ):
            off = float(np.abs(second(first(actions)) - actions).max())
            _require(
                off <= TOLERANCE,
                f"robot {robot.name}: expected encode_actions and decode_actions to be each "
                f"other's inverse, found values {off:.2g} off after both.",
            )
    for camera in robot.cameras:
        for name in (camera.key, *camera.names):
            _require(
                robot.camera_key(name) == camera.key,
                f"robot {robot.name}: expected {name!r} to mean camera {camera.key}, found "
                f"{robot.camera_key(name)}.",
            )


def _check_convention(label: str, convention: Convention, value: Floats) -> None:
    before = value.copy()
    out = convention(value)
    _require(np.array_equal(value, before), f"{label}: expected its input to stay as it is.")
    _require(
        isinstance(out, np.ndarray) and out.shape == value.shape and out.dtype == np.float64,
        f"{label}: expected float64 {list(value.shape)}, as it was given, found "
        f"{getattr(out, 'dtype', type(out).__name__)} {list(np.shape(out))}.",
    )
    _require(bool(np.isfinite(out).all()), f"{label}: expected finite values for finite ones.")
    rows = np.stack([convention(row) for row in value])
    _require(
        np.allclose(rows, out, rtol=0, atol=TOLERANCE),
        f"{label}: expected the same of a row alone and in a batch, found a difference of "
        f"{float(np.abs(rows - out).max()):.2g}.",
    )


def _require(kept: bool, sentence: str) -> None:
    if not kept:
        raise AssertionError(sentence)
