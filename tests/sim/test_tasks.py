"""Sentences, and when they are carried out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pi0.sim.layout import BETWEEN_CUBES, draw_instruction, draw_layout, other_instruction
from pi0.sim.tasks import (
    ASIDE,
    COLORS,
    DIRECTIONS,
    PHRASINGS,
    PUSHED,
    TASKS,
    UNSEEN_PAIRS,
    UNSEEN_PHRASINGS,
    VERBS,
    Instruction,
    done,
    wrong,
)

PLACES = {"bowl": np.array([0.5, 0.2, 0]), "plate": np.array([0.5, -0.2, 0])}
START = {"red": np.array([0.4, 0.0, 0.018]), "blue": np.array([0.5, 0.0, 0.018])}


def moved(color, by):
    return {**START, color: START[color] + by}


@given(st.sampled_from(TASKS), st.integers(0, 2**32 - 1))
def test_every_episode_can_be_carried_out(task, seed):
    rng = np.random.default_rng(seed)
    instruction, colors = draw_instruction(task, rng)
    layout, allowed = draw_layout(instruction, colors, rng)
    assert instruction.color in layout.cubes
    assert instruction.color in instruction.prompt
    centres = np.array([centre for centre, _ in layout.cubes.values()])
    distances = np.linalg.norm(centres[:, None] - centres, axis=-1)[np.triu_indices(3, 1)]
    assert distances.min() >= BETWEEN_CUBES
    other = other_instruction(instruction, allowed, rng)
    same = (other.verb, other.color, other.goal)
    assert same != (instruction.verb, instruction.color, instruction.goal)
    assert other.prompt


def test_unseen_phrasings_are_new_but_their_words_are_not():
    def words(table):
        return {word for templates in table.values() for text in templates for word in text.split()}

    assert words(UNSEEN_PHRASINGS) <= words(PHRASINGS)
    for verb in VERBS:
        assert not set(PHRASINGS[verb]) & set(UNSEEN_PHRASINGS[verb])


def test_each_verb_and_colour_lacks_at_most_one_pair():
    assert len({verb for verb, _ in UNSEEN_PAIRS}) == len(UNSEEN_PAIRS)
    assert len({color for _, color in UNSEEN_PAIRS}) == len(UNSEEN_PAIRS)
    assert {color for _, color in UNSEEN_PAIRS} < set(COLORS)


@pytest.mark.parametrize(("rise", "expected"), [(0.059, False), (0.061, True)])
def test_lifted(rise, expected):
    lift = Instruction("lift", "red", "")
    assert done(lift, START, moved("red", [0, 0, rise]), PLACES, False) is expected


@pytest.mark.parametrize("goal", list(DIRECTIONS))
def test_pushed_along_its_direction(goal):
    direction = np.array([*DIRECTIONS[goal], 0])
    across = np.array([-direction[1], direction[0], 0])
    instruction = Instruction("push", "red", goal)

    def judged(by):
        return done(instruction, START, moved("red", by), PLACES, False)

    assert judged(direction * (PUSHED + 0.001))
    assert not judged(direction * (PUSHED - 0.001))
    assert not judged(-direction * (PUSHED + 0.001))
    assert not judged(direction * PUSHED + across * (ASIDE + 0.001))
    assert not judged(direction * (PUSHED + 0.001) + np.array([0, 0, 0.05]))  # carried, not pushed


def test_put_needs_open_fingers_and_the_right_place():
    instruction = Instruction("put", "red", "bowl")
    inside = {**START, "red": PLACES["bowl"] + [0, 0.02, 0.02]}
    assert done(instruction, START, inside, PLACES, True)
    assert not done(instruction, START, inside, PLACES, False)
    assert not done(Instruction("put", "red", "plate"), START, inside, PLACES, True)
    assert wrong(Instruction("put", "red", "plate"), START, inside, PLACES)
    assert not wrong(instruction, START, inside, PLACES)


def test_wrong_is_about_other_cubes():
    lift = Instruction("lift", "red", "")
    assert wrong(lift, START, moved("blue", [0.05, 0, 0]), PLACES)
    assert not wrong(lift, START, moved("blue", [0.01, 0, 0]), PLACES)
    assert not wrong(lift, START, moved("red", [0.05, 0, 0]), PLACES)
