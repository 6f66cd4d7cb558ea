"""Which instruction an episode has, and where its things lie, so that it can be carried out."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pi0.errors import Pi0Error
from pi0.sim.scene import Layout
from pi0.sim.tasks import (
    COLORS,
    DIRECTIONS,
    PLACES,
    UNSEEN_PAIRS,
    VERBS,
    Instruction,
    goals,
    phrase,
)

Floats = NDArray[np.float64]

SHOWN = 3  # cubes of a scene
# Metres in the robot's frame, least and greatest.
CUBES_WITHIN = np.array([[0.38, -0.22], [0.60, 0.22]])
PLACES_WITHIN = np.array([[0.36, -0.28], [0.64, 0.28]])
HAND_WITHIN = np.array([[0.40, -0.10, 0.20], [0.52, 0.10, 0.28]])
TURN = 0.25  # radians, greatest, of a cube
BETWEEN_CUBES = 0.11  # metres between centres; at 0.09 the fingers hit the neighbour
CUBE_TO_PLACE = 0.125
BETWEEN_PLACES = 0.17
PUSH_LENGTH = 0.11  # metres that must be free before a cube, and behind it for the hand
BEHIND = 0.075
LANE = 0.07  # metres to the centre of anything beside the way of a pushed cube
ATTEMPTS = 10_000


def draw_instruction(task: str, rng: np.random.Generator) -> tuple[Instruction, tuple[str, ...]]:
    """An instruction of a task, and the colours of the scene's cubes."""
    if task == "unseen-pairs":
        verb, color = UNSEEN_PAIRS[rng.integers(len(UNSEEN_PAIRS))]
    else:
        verb = VERBS[rng.integers(len(VERBS))] if task == "unseen-phrasings" else task
        seen = [color for color in COLORS if (verb, color) not in UNSEEN_PAIRS]
        color = seen[rng.integers(len(seen))]
    options = goals(verb)
    instruction = Instruction(verb, color, options[rng.integers(len(options))])
    others = rng.permutation([other for other in COLORS if other != color])[: SHOWN - 1]
    chosen = phrase(instruction, rng, unseen=task == "unseen-phrasings")
    return chosen, (color, *map(str, others))


def draw_layout(
    instruction: Instruction, colors: tuple[str, ...], rng: np.random.Generator
) -> tuple[Layout, list[Instruction]]:
    """Places for everything, drawn until the instruction can be carried out; and all instructions
    that could be, which demonstrations show in general."""
    for _ in range(ATTEMPTS):
        cubes = rng.uniform(CUBES_WITHIN[0], CUBES_WITHIN[1], (len(colors), 2))
        places = rng.uniform(PLACES_WITHIN[0], PLACES_WITHIN[1], (len(PLACES), 2))
        if _crowded(cubes, places):
            continue
        at = dict(zip(colors, cubes, strict=True))
        allowed = [other for other in _all_instructions(colors) if _is_free(other, at, places)]
        if not any(_same(other, instruction) for other in allowed):
            continue
        turned = {color: (at[color], float(rng.uniform(-TURN, TURN))) for color in colors}
        hand = rng.uniform(HAND_WITHIN[0], HAND_WITHIN[1])
        return Layout(turned, dict(zip(PLACES, places, strict=True)), hand), allowed
    raise Pi0Error(f"simulator: found no room for {instruction.prompt!r}.")


def other_instruction(
    instruction: Instruction, allowed: list[Instruction], rng: np.random.Generator
) -> Instruction:
    """Another thing to do in the same scene: with another cube, or another verb or goal."""
    others = [o for o in allowed if not o.unseen and not _same(o, instruction)]
    return phrase(others[rng.integers(len(others))], rng)


def _all_instructions(colors: tuple[str, ...]) -> list[Instruction]:
    return [Instruction(v, c, goal) for v in VERBS for c in colors for goal in goals(v)]


def _same(one: Instruction, other: Instruction) -> bool:
    return (one.verb, one.color, one.goal) == (other.verb, other.color, other.goal)


def _crowded(cubes: Floats, places: Floats) -> bool:
    between = np.linalg.norm(cubes[:, None] - cubes, axis=-1) + np.eye(len(cubes))
    to_places = np.linalg.norm(cubes[:, None] - places, axis=-1)
    return bool(
        between.min() < BETWEEN_CUBES
        or to_places.min() < CUBE_TO_PLACE
        or np.linalg.norm(places[0] - places[1]) < BETWEEN_PLACES
    )


def _is_free(instruction: Instruction, cubes: dict[str, Floats], places: Floats) -> bool:
    """Whether the way of a pushed cube, and of the hand behind it, is free."""
    if instruction.verb != "push":
        return True
    direction = DIRECTIONS[instruction.goal]
    start = cubes[instruction.color]
    others = [at for color, at in cubes.items() if color != instruction.color]
    things = np.array([*others, *places]) - start
    radius = np.array([0.0] * len(others) + [0.05] * len(places))
    along = things @ direction
    aside = np.abs(things @ np.array([-direction[1], direction[0]])) - radius
    beside = (along > -BEHIND - radius) & (along < PUSH_LENGTH + radius)
    return not bool((beside & (aside < LANE)).any())
