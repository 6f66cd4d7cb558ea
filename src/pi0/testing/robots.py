"""Conformance of a robot's table: its conventions must be each other's inverse, for any batch, and
a relative action of zero must leave the robot where it is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pi0.policy.limits import ActionLimits
from pi0.policy.robot import Robot
from pi0.policy.robots import find_robot

Floats = NDArray[np.float64]
Convention = Callable[[Floats], Floats]

HORIZON, BATCH = 7, 3
ANY_WIDTH = 9  # of a state or an action whose length the table leaves to the statistics
TOLERANCE = 1e-9  # of values about 1, in float64


def check_robot(robot: str | Robot) -> None:
    """Checks that a robot's table can be used in both directions.

    Its functions keep shape and dtype, leave their input alone, treat every row of a batch and
    every tick of a chunk alike and each time the same, and `encode_actions` is the inverse of
    `decode_actions`, for values of either sign and in the limits of the table. A relative action
    of zero commands a value of the state, the one that the limits name if they do. Cameras are
    found by their names.

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
    _check_inverse(robot, actions)
    _check_inverse(robot, _within_limits(robot, rng, actions.shape))
    if None not in (robot.state_dim, robot.action_dim):
        _check_relative(robot, state, actions[:, 0])
    for camera in robot.cameras:
        for name in (camera.key, *camera.names):
            _require(
                robot.camera_key(name) == camera.key,
                f"robot {robot.name}: expected {name!r} to mean camera {camera.key}, found "
                f"{robot.camera_key(name)}.",
            )


def _within_limits(robot: Robot, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Actions of either sign, or as the table limits them."""
    limits = robot.limits or ActionLimits(*[(None,) * shape[-1]] * 4)
    bounds = []
    for low, high in zip(limits.low, limits.high, strict=True):
        if low is None:
            low = -1.0 if high is None else min(-1.0, high - 1)
        bounds.append((low, max(1.0, low + 1) if high is None else high))
    bottom, top = np.transpose(bounds)
    return rng.uniform(bottom, top, shape)


def _check_inverse(robot: Robot, actions: Floats) -> None:
    """Where both are finite: what is not is refused when a robot runs."""
    encode, decode = robot.encode_actions, robot.decode_actions
    if encode is None or decode is None:
        return
    for first, second in ((encode, decode), (decode, encode)):
        with np.errstate(invalid="ignore", divide="ignore"):
            found = second(first(actions.copy()))
        off = float(np.abs(found - actions)[np.isfinite(found)].max(initial=0))
        _require(
            off <= TOLERANCE * max(1, np.abs(actions).max()),
            f"robot {robot.name}: expected encode_actions and decode_actions to be each other's "
            f"inverse from {actions.min():.2g} to {actions.max():.2g}, found values {off:.2g} off "
            "after both. If actions are never so far, state their limits.",
        )


def _check_relative(robot: Robot, state: Floats, actions: Floats) -> None:
    """A model that asks for no change: the actions [B, D] of a robot that stays where it is."""
    seen = state if robot.encode_state is None else robot.encode_state(state.copy())
    model = actions if robot.encode_actions is None else robot.encode_actions(actions.copy())
    own = robot.relative(model.shape[-1]).nonzero()[0]
    model = model.copy()
    model[:, own] = seen[:, own]
    commanded = model if robot.decode_actions is None else robot.decode_actions(model)
    states = robot.limits.state if robot.limits else (None,) * len(model[0])
    for i in own:
        index = states[i]
        values = state if index is None else state[:, [index]]
        off = float(np.abs(values - commanded[:, [i]]).max(axis=0).min())
        which = "a value of the state" if index is None else f"state value {index}"
        _require(
            off <= TOLERANCE,
            f"robot {robot.name}: expected a relative action {i} of zero to command {which}, found "
            f"{off:.2g} beside it: the robot would move. encode_state and decode_actions have to "
            "turn the same way, in the same unit.",
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
    out = out.copy()
    rows = np.stack([convention(row) for row in value.reshape(-1, value.shape[-1])])
    off = float(np.abs(rows.reshape(out.shape) - out).max())
    _require(
        off <= TOLERANCE,
        f"{label}: expected the same of a row alone and in a batch, found a difference of "
        f"{off:.2g}.",
    )
    _require(
        np.array_equal(convention(value), out),
        f"{label}: expected the same of the same values each time, found other ones.",
    )


def _require(kept: bool, sentence: str) -> None:
    if not kept:
        raise AssertionError(sentence)
