"""The tabletop as an environment: what it shows, what it asks for, how it judges."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import pi0.sim
from pi0.errors import ConfigError, ObservationError
from pi0.policy.robots import ROBOTS
from pi0.sim.env import MOVE, TabletopEnv
from pi0.sim.experts import expert_action
from pi0.sim.scene import HALF_CUBE
from pi0.sim.tasks import TASKS, UNSEEN_PAIRS, VERBS

LYING = np.array([0, 0, HALF_CUBE + 0.008])  # of a cube on a bowl's or plate's floor


@pytest.fixture(scope="module")
def env():
    env = TabletopEnv(image_size=32, render_mode="rgb_array")
    yield env
    env.close()


def play(env, seed, **options):
    """An episode by the expert: the last step's info, and how many steps it took."""
    env.reset(seed=seed, options=options)
    steps, done = 0, False
    while not done and steps < pi0.sim.MAX_STEPS:
        *_, done, _, info = env.step(expert_action(env))
        steps += 1
    return info, steps


def test_gymnasium_makes_it_and_finds_nothing_wrong():
    env = gymnasium.make(pi0.sim.ENV_ID, image_size=16, render_mode="rgb_array")
    check_env(env.unwrapped, skip_render_check=True)
    assert env.spec.max_episode_steps == pi0.sim.MAX_STEPS
    env.close()


def test_seed_alone_decides_an_episode(env):
    def episode():
        observation, info = env.reset(seed=5)
        frames = [observation]
        for _ in range(6):
            observation, *_ = env.step(expert_action(env))
            frames.append(observation)
        return info["prompt"], frames

    prompt, frames = episode()
    play(env, 6)  # nothing of another episode stays
    again, others = episode()
    assert prompt == again
    for one, other in zip(frames, others, strict=True):
        for key in one:
            np.testing.assert_array_equal(one[key], other[key])


def test_seeds_vary_what_is_seen(env):
    pictures = [env.reset(seed=seed)[0]["observation/image"].astype(int) for seed in range(4)]
    assert all(np.abs(pictures[0] - other).mean() > 5 for other in pictures[1:])


def test_observation_fits_the_robot(env):
    observation, _ = env.reset(seed=0)
    robot = ROBOTS["tabletop"]
    keys = {camera.key for camera in robot.cameras} | {key for key, _ in robot.state}
    assert keys == set(observation)
    assert observation["observation/state"].shape == (robot.state_dim,)
    assert env.action_space.shape == (robot.action_dim,)
    assert env.observation_space.contains(observation)


@pytest.mark.parametrize("task", TASKS)
def test_expert_does_what_the_sentence_says(env, task):
    results = [play(env, seed, task=task) for seed in range(8)]
    assert all(info["success"] and not info["wrong"] for info, _ in results)
    assert max(steps for _, steps in results) < pi0.sim.MAX_STEPS * 0.9


def test_expert_does_the_swapped_thing(env):
    for seed in range(6):
        first = env.reset(seed=seed)[1]["prompt"]
        info, _ = play(env, seed, instruction="swapped")
        assert info["success"]
        assert info["prompt"] != first


def test_demonstrated_tasks_hold_no_unseen_pair(env):
    for seed in range(60):
        env.reset(seed=seed, options={"task": VERBS[seed % 3]})
        assert (env.instruction.verb, env.instruction.color) not in UNSEEN_PAIRS
        env.reset(seed=seed, options={"task": "unseen-pairs"})
        assert (env.instruction.verb, env.instruction.color) in UNSEEN_PAIRS


def test_another_cube_is_wrong(env):
    env.reset(seed=3, options={"task": "lift"})
    named = env.instruction.color
    other = next(color for color in env.scene.cubes() if color != named)
    position = env.scene.data.joint(other).qpos
    position[:3] += [0, 0, 0.1]
    info = env.step(np.zeros(4, np.float32))[4]
    assert info["wrong"]
    assert not info["success"]
    assert info["moved"][other][2] > 0.04 > abs(info["moved"][named][2])


def test_wrong_place_is_wrong(env):
    env.reset(seed=4, options={"task": "put"})
    color, goal = env.instruction.color, env.instruction.goal
    other = {"bowl": "plate", "plate": "bowl"}[goal]
    place = env.scene.places()[other]
    env.scene.data.joint(color).qpos[:3] = place + LYING
    env.scene.data.joint(color).qvel[:] = 0
    info = env.step(np.array([0, 0, 0, 1], np.float32))[4]
    assert info["wrong"]
    assert not info["success"]


def test_held_cube_is_not_put(env):
    """Above the bowl in closed fingers, a cube is not in it yet."""
    env.reset(seed=4, options={"task": "put"})
    place = env.scene.places()[env.instruction.goal]
    env.scene.data.joint(env.instruction.color).qpos[:3] = place + LYING
    assert not env.step(np.array([0, 0, 0, -1], np.float32))[4]["success"]
    assert env.step(np.array([0, 0, 0, 1], np.float32))[4]["success"]


def test_moves_are_clipped_and_follow_the_command(env):
    before = env.reset(seed=0)[0]["observation/state"][:3]
    after = env.step(np.array([0, 5.0, 0, 1], np.float32))[0]["observation/state"][:3]
    np.testing.assert_allclose(after - before, [0, MOVE, 0], atol=1e-6)
    reached = env.scene.data.site("tcp").xpos
    # The servos lag behind by about half of the first move.
    np.testing.assert_allclose(reached, after, atol=0.02)


@pytest.mark.parametrize("action", [[0, 0, 0], [np.nan, 0, 0, 1], [[0, 0, 0, 1]]])
def test_bad_actions_are_named(env, action):
    env.reset(seed=0)
    with pytest.raises(ObservationError, match="action: expected 4 finite numbers, found"):
        env.step(np.array(action, np.float32))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "juggle"}, "task: expected one of lift, put, push"),
        ({"instruction": "other"}, 'options: expected "task" and "instruction"'),
        ({"color": "red"}, 'options: expected "task" and "instruction"'),
    ],
)
def test_unknown_options_are_named(env, options, message):
    with pytest.raises(ConfigError, match=message):
        env.reset(seed=0, options=options)


def test_film_is_large(env):
    env.reset(seed=0)
    assert env.render().shape == (480, 640, 3)
