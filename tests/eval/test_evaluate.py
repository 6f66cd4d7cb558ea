"""Closed-loop evaluation: what is counted, what an episode depends on, and what is refused."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from dots import ROBOT, DotPolicy, DotsEnv
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import pi0
from pi0.errors import ConfigError, EngineError, LimitError, Pi0Error
from pi0.eval import (
    CheckpointPolicy,
    EnvOptions,
    EvalPlan,
    FilmOptions,
    evaluate,
    wilson_interval,
)
from pi0.eval.film import _captioned, _write_gif
from pi0.eval.results import Episode, summarise
from pi0.policy import ActionLimits, Camera, PolicyOptions

needs_mujoco = pytest.mark.skipif(find_spec("mujoco") is None, reason="needs mujoco ([sim])")
DOTS = EnvOptions("dots:test/Dots-v0")
PLAN = EvalPlan(DOTS, episodes=4)
pytestmark = pytest.mark.filterwarnings("ignore:robot .* states no limits")


@pytest.fixture
def policy(tiny_path: Path) -> DotPolicy:
    return DotPolicy(tiny_path)


def test_counts_successes_by_task(policy: DotPolicy) -> None:
    seen: list[Episode] = []
    results = evaluate(policy, PLAN, seen.append)
    assert list(results.tasks) == ["red", "blue"]
    assert results.tasks["red"].success == results.tasks["blue"].success == 4
    assert results.total.wrong == 0
    assert tuple(seen) == results.episodes
    assert [e.seed for e in results.episodes] == [*range(9_000_000, 9_000_004)] * 2
    assert results.episodes[0].prompt == "move the dot to the red spot"
    assert len(results.latency_ms) == sum(-(-e.steps // 8) for e in results.episodes)
    data = results.to_data()
    assert data["success"] == data["episodes"] == 8
    assert data["tasks"]["blue"]["interval"] == list(wilson_interval(4, 4))
    assert data["rollouts"][5]["task"] == "blue"
    assert data["steps"] == 10
    assert data["execute"] == 8
    assert data["env"] == "dots:test/Dots-v0"
    assert data["seed_start"] == 9_000_000
    assert data["versions"]["pi0"] == pi0.__version__


def test_workers_change_nothing(policy: DotPolicy) -> None:
    plan = replace(PLAN, episodes=3, perturb=0.1)
    policy = replace(policy, on_limit="clamp")
    alone = evaluate(policy, plan)
    assert evaluate(policy, replace(plan, workers=3)) == alone
    assert evaluate(policy, replace(plan, seed_start=17)) != alone


def test_an_episode_depends_on_its_seed_alone(policy: DotPolicy) -> None:
    plan = replace(PLAN, tasks=("blue",), episodes=3)
    later = evaluate(policy, replace(plan, episodes=1, seed_start=plan.seed_start + 2))
    assert later.episodes[0] == evaluate(policy, plan).episodes[2]


def test_swapped_sentences_and_blank_cameras(policy: DotPolicy) -> None:
    plain = evaluate(policy, replace(PLAN, tasks=("red",)))
    swapped = evaluate(policy, replace(PLAN, tasks=("red",), env=replace(DOTS, prompt_swap=True)))
    assert {e.prompt for e in swapped.episodes} == {"move the dot to the blue spot"}
    assert swapped.total.success == 4
    assert [e.seed for e in swapped.episodes] == [e.seed for e in plain.episodes]
    blank = evaluate(policy, replace(PLAN, env=replace(DOTS, blank_cameras=True)))
    assert blank.total.success == 0
    assert {e.steps for e in blank.episodes} == {40}


def test_wrong_object(policy: DotPolicy) -> None:
    """A policy that always goes to the red spot."""
    other = replace(DOTS, prompt="go")
    results = evaluate(policy, replace(PLAN, tasks=("blue",), env=other))
    assert results.total.success == 0
    assert results.total.wrong == 4
    assert {e.outcome for e in results.episodes} == {"wrong"}


def test_environment_of_others(policy: DotPolicy) -> None:
    """Nested keys, is_success, no tasks, no sentence of its own."""
    robot = replace(ROBOT, cameras=(Camera("pixels/top"),), state=(("agent_pos", 2),))
    env = EnvOptions("dots:test/Plain-v0", prompt="move the dot to the red spot")
    results = evaluate(replace(policy, robot=robot), replace(PLAN, env=env))
    assert list(results.tasks) == ["dots:test/Plain-v0"]
    assert results.total.wrong is None
    assert results.total.wrong_rate is None
    assert results.total.success > 0
    with pytest.raises(Pi0Error, match=r"seed 9000000: prompt: expected a sentence .*found none"):
        evaluate(replace(policy, robot=robot), replace(PLAN, env=EnvOptions(env.id)))
    with pytest.raises(Pi0Error, match="expected a sentence from --prompt .*found ' '"):
        evaluate(policy, replace(PLAN, env=replace(DOTS, prompt=" ")))


def test_execute_and_max_steps(policy: DotPolicy) -> None:
    results = evaluate(policy, replace(PLAN, execute=2))
    assert len(results.latency_ms) == sum(-(-e.steps // 2) for e in results.episodes)
    short = evaluate(policy, replace(PLAN, env=replace(DOTS, max_steps=3)))
    assert {e.steps for e in short.episodes} == {3}
    assert short.total.mean_success_steps is None
    with pytest.raises(ConfigError, match="execute: expected at most the 50 actions"):
        evaluate(policy, replace(PLAN, execute=51))


def test_perturbation_is_seeded_and_scaled(policy: DotPolicy) -> None:
    policy = replace(policy, on_limit="clamp")
    rates = [evaluate(policy, replace(PLAN, episodes=10, perturb=s)).total for s in (0, 0.1, 20)]
    assert rates[0].success == 20
    assert rates[1].success == 20
    assert rates[2].success < 20
    assert rates[2].outside > rates[1].outside


def test_actions_beyond_the_action_space(policy: DotPolicy) -> None:
    wild = replace(policy, gain=5.0, on_limit="error")
    sentence = r"task red, seed 9000000: action x: expected at .*clamp"
    with pytest.raises(LimitError, match=sentence):
        evaluate(wild, PLAN)
    clamped = evaluate(replace(wild, on_limit="clamp"), PLAN)
    assert clamped.total.success == 8
    assert clamped.total.outside > 0
    with (
        pytest.warns(UserWarning, match="environment .* handed on as they are"),
        pytest.raises(Pi0Error, match="found AssertionError"),
    ):
        evaluate(replace(wild, on_limit="warn", gain=5.0), PLAN)


def test_limits_of_the_robot_hold_at_the_border_of_chunks(
    policy: DotPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed: list[np.ndarray] = []
    step = DotsEnv.step
    monkeypatch.setattr(DotsEnv, "step", lambda env, a: executed.append(a) or step(env, a))
    limits = ActionLimits(*[(None, None)] * 2, (0.02, 0.02), (None, None))
    limited = replace(policy, robot=replace(ROBOT, limits=limits), on_limit="clamp")
    with pytest.warns(UserWarning, match="action x: expected a change of at most 0.02 .* clamped"):
        evaluate(limited, replace(PLAN, episodes=1, tasks=("red",), execute=2))
    assert len(executed) > 4
    assert np.abs(np.diff(executed, axis=0)).max() < 0.02 + 1e-6


def test_errors_name_task_and_seed(policy: DotPolicy) -> None:
    with pytest.raises(EngineError, match="task red, seed 9000000: actions: expected finite"):
        evaluate(replace(policy, fails_at=1), PLAN)
    broken = EnvOptions("dots:test/Broken-v0")
    sentence = "task red, seed 9000000: environment dots:test/Broken-v0: expected step to succeed, "
    with pytest.raises(Pi0Error, match=sentence + "found RuntimeError: the motor is on fire"):
        evaluate(policy, replace(PLAN, env=broken))


REFUSED = {
    "dots:test/Dot-v0": r"expected one of test/Dots-v0, .*found 'dots:test/Dot-v0'",
    "nowhere/Dots-v0": r"nothing is registered under 'nowhere/'.*PACKAGE:nowhere/Dots-v0",
    "no_package:test/Dots-v0": "expected its packages, found no no_package",
    "Humanoids-v5": r"expected one of Humanoid-v5, .* and \d+ more, found 'Humanoids-v5'",
    "CartPole-v1": r"CartPole-v1: expected actions that are a vector .*found Discrete",
    "MountainCarContinuous-v0": "expected observations with images, found Box",
    "dots:test/Blind-v0": "expected observations with images",
    "dots:test/Plain-v0": r"expected image, position in .*robot dots, found agent_pos, pixels/top",
    "dots:test/Wide-v0": "expected a policy with 3 actions, found 2 of robot dots",
    "dots:test/Old-v0": "expected reset to succeed, found ValueError",
    "dots:test/OneTask-v0": "expected its attribute tasks to be a tuple of names, found 'red'",
    "dots:test/Word-v0": "expected true or false as success in info, found 'yes'",
    "dots:test/List-v0": r"prompt: expected a sentence from --prompt .*found \['move', 'the dot'\]",
    "dots:test/Silent-v0": "expected success or is_success in info, found prompt, distance",
}


@pytest.mark.parametrize("name", REFUSED)
def test_unfit_environments(name: str, policy: DotPolicy) -> None:
    with pytest.raises(Pi0Error, match=REFUSED[name]) as caught:
        evaluate(policy, EvalPlan(EnvOptions(name), episodes=1))
    assert "\n" not in str(caught.value)


def test_what_is_not_known_is_no_success(policy: DotPolicy) -> None:
    results = evaluate(policy, EvalPlan(EnvOptions("dots:test/Nan-v0", max_steps=3), episodes=1))
    assert (results.total.success, results.total.wrong) == (0, None)


def test_swap_and_tasks_need_an_environment_that_knows_them(policy: DotPolicy) -> None:
    plain = EnvOptions("dots:test/Plain-v0")
    with pytest.raises(ConfigError, match="knows the reset option instruction"):
        evaluate(policy, EvalPlan(replace(plain, prompt_swap=True)))
    with pytest.raises(ConfigError, match="expected one with tasks for --tasks"):
        evaluate(policy, EvalPlan(plain, tasks=("red",)))


def test_every_task_is_tried_before_the_work(policy: DotPolicy) -> None:
    with pytest.raises(ConfigError, match="expected one of the tasks red, blue, found 'green'"):
        evaluate(policy, replace(PLAN, tasks=("red", "green")), on_episode=pytest.fail)


def test_missing_simulator(policy: DotPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mujoco"]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith("pi0.sim.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(Pi0Error, match=r"expected .*mujoco.*sim\]'"):
        evaluate(policy, EvalPlan())


@needs_mujoco
def test_the_tabletop_with_any_number_of_workers(tiny_path: Path) -> None:
    options = PolicyOptions(robot="tabletop", norm_stats="none", preprocessing="openpi")
    policy = CheckpointPolicy(tiny_path, options, "reference", steps=1, on_limit="clamp")
    plan = EvalPlan(EnvOptions(max_steps=3), ("lift", "push"), episodes=1, execute=2)
    alone = evaluate(policy, plan)
    assert alone.total.wrong is not None
    assert [len(e.prompt) > 0 for e in alone.episodes] == [True, True]
    assert evaluate(policy, replace(plan, workers=2)) == alone


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"episodes": 0}, "episodes: expected a whole number of 1 or more, found 0"),
        ({"workers": 0}, "workers: expected"),
        ({"seed_start": -1}, "seed_start: expected 0 or more"),
        ({"perturb": float("nan")}, "perturb: expected 0 or more"),
        ({"tasks": ("red", "red")}, "tasks: expected different names"),
    ],
)
def test_plans_are_checked(options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        EvalPlan(DOTS, **options)


def test_missing_gymnasium(policy: DotPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(Pi0Error, match=r"expected the package gymnasium.*pip install '\.\[sim\]'"):
        evaluate(policy, PLAN)


@pytest.mark.parametrize("form", ["mp4", "gif"])
def test_films(policy: DotPolicy, tmp_path: Path, form: str) -> None:
    film = FilmOptions(tmp_path / "films", form, episodes=2)
    results = evaluate(policy, replace(PLAN, film=film, episodes=3))
    names = [f"{task}-{9_000_000 + i}.{form}" for task in ("blue", "red") for i in range(2)]
    assert sorted(p.name for p in film.folder.iterdir()) == sorted([*names, "contact-sheet.png"])
    frames = read_film(film.folder / names[0])
    episode = next(e for e in results.episodes if e.task == "blue")
    assert len(frames) == episode.steps + 1 + round(1.5 * 5)
    assert not np.array_equal(frames[0], frames[-1])
    with Image.open(film.folder / "contact-sheet.png") as sheet:
        colors = {color for _, color in sheet.getcolors(1 << 20)}
    assert (0x2F, 0x85, 0x5A) in colors  # the frame of a success


@pytest.mark.parametrize("fps", [30.0, 60.0, 240.0])
def test_a_gif_is_as_long_as_the_episode(tmp_path: Path, fps: float) -> None:
    """In whole hundredths of a second, of which browsers want at least two for a picture."""
    shades = np.linspace(0, 255, 240).astype(np.uint8)
    pictures = [Image.fromarray(np.full((8, 8, 3), shade)) for shade in shades]
    _write_gif(tmp_path / "film.gif", pictures, fps)
    with Image.open(tmp_path / "film.gif") as film:
        durations = []
        for i in range(film.n_frames):
            film.seek(i)
            durations.append(film.info["duration"])
    assert min(durations) >= 20
    assert abs(sum(durations) - 240_000 / fps) <= 20


def read_film(path: Path) -> list[np.ndarray]:
    if path.suffix == ".gif":
        with Image.open(path) as film:
            # Pictures that do not change are stored once, with a longer duration.
            frames = []
            for i in range(film.n_frames):
                film.seek(i)
                frames += [np.asarray(film.convert("RGB"))] * round(film.info["duration"] / 200)
            return frames
    import av

    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_sentences_of_films_have_the_letters_of_other_languages() -> None:
    pytest.importorskip("matplotlib")
    frame = np.zeros((240, 320, 3), np.uint8)
    pictures = {_captioned(frame, f"{letter}ffne", None).tobytes() for letter in "öäéж"}
    assert len(pictures) == 4


def test_places_are_tried_before_the_work(policy: DotPolicy, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    film = FilmOptions(tmp_path / "file" / "films")
    with pytest.raises(Pi0Error, match="expected"):
        evaluate(policy, replace(PLAN, film=film))


def test_seeds_begin_where_demonstrations_end() -> None:
    demos = pytest.importorskip("pi0.sim.demos")
    assert EvalPlan().seed_start == demos.FIRST_RESERVED_SEED


def test_wilson_known_values() -> None:
    """By hand: 10 of 10 at z = 1.96 gives 1 / (1 + z²/10) = 0.7225; symmetric at one half."""
    assert wilson_interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    low, high = wilson_interval(50, 100)
    assert (low + high) / 2 == pytest.approx(0.5)
    assert high - low == pytest.approx(0.1923, abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_rate(counts: tuple[int, int]) -> None:
    """Its ends solve |p - rate| = z √(p (1 - p) / n), the equation that it inverts."""
    successes, trials = counts
    low, high = wilson_interval(successes, trials)
    rate = successes / trials
    assert 0 <= low <= rate + 1e-12
    assert rate - 1e-12 <= high <= 1
    for end in (low, high):
        spread = 1.959964 * np.sqrt(end * (1 - end) / trials)
        assert abs(end - rate) == pytest.approx(spread, abs=1e-6)


def test_summary_of_mixed_outcomes() -> None:
    episodes = [
        Episode("lift", i, "lift it", success, wrong, steps)
        for i, (success, wrong, steps) in enumerate([(True, False, 10), (False, True, 40)])
    ]
    summary = summarise(episodes)
    assert (summary.success, summary.wrong, summary.rate, summary.wrong_rate) == (1, 1, 0.5, 0.5)
    assert (summary.mean_steps, summary.mean_success_steps) == (25, 10)
    assert [e.outcome for e in episodes] == ["success", "wrong"]
    assert re.match("failed", replace(episodes[1], wrong=False).outcome)
