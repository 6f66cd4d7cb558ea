"""What can be asked for on the tabletop: verbs, their phrasings, and when they are done.

Directions are those of the table camera's picture: the viewer's left and right, and front is
towards the viewer. Knows nothing of physics: success is judged from positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pi0.errors import ConfigError

Floats = NDArray[np.float64]

COLORS = ("red", "green", "blue", "yellow")
VERBS = ("lift", "put", "push")
PLACES = ("bowl", "plate")
# In the robot's frame, whose x axis points towards the table camera and y to the viewer's right.
DIRECTIONS = {
    "left": np.array([0.0, -1.0]),
    "right": np.array([0.0, 1.0]),
    "front": np.array([1.0, 0.0]),
}

# Never in demonstrations: each colour lacks at most one verb, each verb one colour.
UNSEEN_PAIRS = (("lift", "yellow"), ("put", "green"), ("push", "blue"))
# The tasks that an environment can be asked for: the three verbs as in demonstrations, and two that
# hold what demonstrations never show.
TASKS = (*VERBS, "unseen-pairs", "unseen-phrasings")

_INTO = {"bowl": ("into the bowl", "in the bowl"), "plate": ("onto the plate", "on the plate")}
_TO = {
    "left": ("to the left", "left"),
    "right": ("to the right", "right"),
    "front": ("to the front", "forward"),
}
PHRASINGS = {
    "lift": (
        "lift the {color} {cube}",
        "pick up the {color} {cube}",
        "lift up the {color} {cube}",
        "raise the {color} {cube}",
        "grab the {color} {cube} and lift it",
        "take the {color} {cube} off the table",
    ),
    "put": (
        "put the {color} {cube} {into}",
        "place the {color} {cube} {into}",
        "drop the {color} {cube} {into}",
        "pick up the {color} {cube} and put it {into}",
        "move the {color} {cube} {into}",
        "take the {color} {cube} and place it {into}",
    ),
    "push": (
        "push the {color} {cube} {to}",
        "slide the {color} {cube} {to}",
        "shove the {color} {cube} {to}",
        "push the {color} {cube} across the table {to}",
        "nudge the {color} {cube} {to}",
    ),
}
UNSEEN_PHRASINGS = {
    "lift": ("grab the {color} {cube} and raise it", "lift the {color} {cube} off the table"),
    "put": (
        "grab the {color} {cube} and drop it {into}",
        "lift the {color} {cube} and put it {into}",
    ),
    "push": ("move the {color} {cube} {to}", "slide the {color} {cube} across the table {to}"),
}
CUBE_WORDS = ("cube", "block")

LIFTED = 0.06  # metres that a lifted cube has risen
PUSHED = 0.06  # metres along the direction
ASIDE = 0.035  # metres that a pushed cube may have left its line
INSIDE = {"bowl": 0.045, "plate": 0.06}  # metres from the middle, of a cube that was put there
RESTING = 0.05  # metres: the greatest height of a cube that was put
DISTURBED = 0.04  # metres that another cube moved if the wrong thing was done


@dataclass(frozen=True)
class Instruction:
    """One thing to do, with the words that ask for it.

    Attributes:
        verb: of `VERBS`.
        color: of the named cube.
        goal: a place for "put", a direction for "push", else empty.
        prompt: the sentence.
    """

    verb: str
    color: str
    goal: str
    prompt: str = ""

    @property
    def unseen(self) -> bool:
        """Whether demonstrations never show this verb with this colour."""
        return (self.verb, self.color) in UNSEEN_PAIRS


def goals(verb: str) -> tuple[str, ...]:
    """What completes a verb: places, directions, or nothing."""
    return {"lift": ("",), "put": PLACES, "push": tuple(DIRECTIONS)}[verb]


def check_task(task: str) -> str:
    """The task, if there is one of that name.

    Raises:
        ConfigError: there is none.
    """
    if task not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, found {task!r}.")
    return task


def phrase(instruction: Instruction, rng: np.random.Generator, unseen: bool = False) -> Instruction:
    """The instruction with a sentence drawn from those that ask for it."""
    templates = (UNSEEN_PHRASINGS if unseen else PHRASINGS)[instruction.verb]
    template = templates[rng.integers(len(templates))]
    prompt = template.format(
        color=instruction.color,
        cube=CUBE_WORDS[rng.integers(len(CUBE_WORDS))],
        into=_choice(_INTO, instruction.goal, rng),
        to=_choice(_TO, instruction.goal, rng),
    )
    return Instruction(instruction.verb, instruction.color, instruction.goal, prompt)


def done(
    instruction: Instruction,
    start: Mapping[str, Floats],
    now: Mapping[str, Floats],
    places: Mapping[str, Floats],
    released: bool,
) -> bool:
    """Whether an instruction is carried out.

    Args:
        start, now: centre [3] of each cube when the episode began, and now, in metres.
        places: centre [3] of bowl and plate.
        released: whether the gripper is open.
    """
    before, after = start[instruction.color], now[instruction.color]
    if instruction.verb == "lift":
        return bool(after[2] - before[2] >= LIFTED)
    if instruction.verb == "put":
        distance = np.linalg.norm(after[:2] - places[instruction.goal][:2])
        inside = distance <= INSIDE[instruction.goal] and after[2] <= RESTING
        return bool(released and inside)
    direction = DIRECTIONS[instruction.goal]
    moved = after[:2] - before[:2]
    along = moved @ direction
    aside = np.linalg.norm(moved - along * direction)
    on_table = after[2] - before[2] < LIFTED / 4
    return bool(along >= PUSHED and aside <= ASIDE and on_table)


def wrong(
    instruction: Instruction,
    start: Mapping[str, Floats],
    now: Mapping[str, Floats],
    places: Mapping[str, Floats],
) -> bool:
    """Whether something else was done: another cube moved, or the named one put into the wrong
    place. Arguments as `done`'s."""
    others = [color for color in now if color != instruction.color]
    if any(np.linalg.norm(now[color] - start[color]) >= DISTURBED for color in others):
        return True
    if instruction.verb != "put":
        return False
    other = next(place for place in PLACES if place != instruction.goal)
    return done(Instruction("put", instruction.color, other), start, now, places, True)


def _choice(words: Mapping[str, tuple[str, ...]], goal: str, rng: np.random.Generator) -> str:
    options = words.get(goal, ("",))
    return options[rng.integers(len(options))]
