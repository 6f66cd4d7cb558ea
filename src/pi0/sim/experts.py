"""Scripted experts: what to do, as a function of the scene alone, for demonstrations.

An expert has no memory, so that a policy without memory can learn from it, and knows where
everything is.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pi0.sim.arm import WIDTH
from pi0.sim.env import MOVE, TabletopEnv
from pi0.sim.scene import HALF_CUBE
from pi0.sim.tasks import DIRECTIONS

Floats = NDArray[np.float64]

OPEN, CLOSED = 1.0, -1.0
ABOVE = 0.10  # metres of the fingertips over the table, on the way
CLEAR = 0.06  # metres at which the fingertips are over all cubes
GRASP = 0.016
CARRY = 0.13
DROP = 0.075
ALIGNED = 0.010  # metres aside at which the hand goes down
HELD = 0.012  # metres between a cube and the fingertips that hold it
SHUT = 0.006  # metres of width below which closed fingers hold nothing
TOUCHING = {"x": 0.012 + HALF_CUBE, "y": 0.030 + HALF_CUBE}  # from closed fingers to a cube
GAP = 0.02  # metres behind a cube at which the closed hand goes down
PUSH_HEIGHT = 0.02
PUSH_SPEED = 0.02  # metres a step, at which a cube does not slide on
LANE = 0.012  # metres aside at which pushing goes on


def expert_action(env: TabletopEnv) -> NDArray[np.float32]:
    """The next action [4] towards what the episode's sentence says."""
    instruction, scene = env.instruction, env.scene
    cube = scene.cubes()[instruction.color]
    hand, width = scene.commanded, float(scene.state[4])
    if instruction.verb == "push":
        return _push(hand, cube, DIRECTIONS[instruction.goal])
    place = scene.places().get(instruction.goal)
    closed = scene.opening == 0
    held = (
        closed
        and SHUT < width < 0.9 * WIDTH
        and np.linalg.norm((hand - cube)[:2]) < 2 * HELD
        and abs(hand[2] - cube[2]) < 2 * HELD
    )
    if held and place is None:
        return _towards(hand, np.array([*hand[:2], CARRY]), CLOSED)
    if held and place is not None:
        return _carry(hand, cube, place)
    return _grasp(hand, cube, closed and width > SHUT, width < WIDTH / 2)


def _grasp(hand: Floats, cube: Floats, closing: bool, narrow: bool) -> NDArray[np.float32]:
    aside = float(np.linalg.norm((hand - cube)[:2]))
    if narrow and not closing and hand[2] < CLEAR:  # up before fingers open, not into the cube
        return _towards(hand, np.array([*hand[:2], ABOVE]), OPEN)
    if aside < ALIGNED and hand[2] < cube[2] + 0.006:
        return _towards(hand, hand, CLOSED)
    if closing and aside < 2 * ALIGNED and hand[2] < cube[2] + 0.01:
        return _towards(hand, hand, CLOSED)
    # Down as the hand comes near, so that the way is a curve.
    height = max(GRASP, cube[2] - 0.002) + np.clip((aside - ALIGNED) * 3, 0, ABOVE)
    return _towards(hand, np.array([*cube[:2], height]), OPEN)


def _carry(hand: Floats, cube: Floats, place: Floats) -> NDArray[np.float32]:
    aside = float(np.linalg.norm((cube - place)[:2]))
    target = place[:2] + (hand - cube)[:2]
    if aside < ALIGNED and hand[2] < DROP + 0.01:
        return _towards(hand, hand, OPEN)
    if aside < ALIGNED:
        return _towards(hand, np.array([*target, DROP]), CLOSED)
    low = hand[2] < DROP + 0.015
    return _towards(hand, np.array([*(hand[:2] if low else target), CARRY]), CLOSED)


def _push(hand: Floats, cube: Floats, direction: Floats) -> NDArray[np.float32]:
    reach = TOUCHING["x" if direction[0] else "y"]
    from_cube = hand[:2] - cube[:2]
    behind = -(from_cube @ direction)
    aside = from_cube + behind * direction  # vector from the cube's line to the hand
    low = hand[2] < PUSH_HEIGHT + 0.012
    in_lane = np.linalg.norm(aside) < LANE and behind > reach - 0.012
    if low and in_lane:
        correct = np.clip(-aside, -0.004, 0.004)
        ahead = direction * PUSH_SPEED
        target = np.array([*(hand[:2] + ahead + correct), PUSH_HEIGHT])
        return _towards(hand, target, CLOSED)
    start = cube[:2] - direction * (reach + GAP)
    off = float(np.linalg.norm(hand[:2] - start))
    height = PUSH_HEIGHT if off < ALIGNED else ABOVE
    if off >= ALIGNED and hand[2] < CLEAR:  # up first, not through the cube
        return _towards(hand, np.array([*hand[:2], ABOVE]), CLOSED)
    return _towards(hand, np.array([*start, height]), CLOSED)


def _towards(hand: Floats, target: Floats, gripper: float) -> NDArray[np.float32]:
    """An action towards a point: straight, at most `MOVE` on an axis."""
    move = (target - hand) / MOVE
    move /= max(1.0, float(np.abs(move).max()))
    return np.array([*move, gripper], np.float32)
