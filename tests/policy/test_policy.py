"""The pipeline around an engine: both directions, threads, action queue, what can be wrong."""

from __future__ import annotations

import json
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeEngine
from test_pipeline import tokenizer
from torch import Tensor

from pi0.checkpoint.load import open_checkpoint
from pi0.config import PRESETS
from pi0.engines.base import make_engine
from pi0.errors import ConfigError, EngineError, LimitError, ObservationError, Pi0Error
from pi0.policy import ROBOTS, ActionLimits, Pipeline, Policy, Robot
from pi0.policy import policy as policy_module
from pi0.policy.normalize import make_normalizer
from pi0.policy.tokenizer import PromptFormat

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
MEAN, STD = np.arange(14.0), np.arange(1.0, 15.0)


def pipeline(robot: Robot) -> Pipeline:
    stats = {"mean": MEAN, "std": STD}
    state, actions = (
        make_normalizer(what, "mean_std", "openpi", stats) for what in ("state", "actions")
    )
    return Pipeline(
        config=PRESETS["tiny"],
        robot=robot,
        tokenizer=tokenizer(),
        resize="openpi",
        prompt=PromptFormat("openpi", 48),
        state_stats=state,
        action_stats=actions,
        target_stats=actions,
    )


def policy(robot: Robot, answer: torch.Tensor, **options: Any) -> Policy:
    return Policy(pipeline(robot), FakeEngine(answer), **options)


ANSWER = torch.linspace(-1, 1, 50 * 32).view(1, 50, 32)


def observation(robot: str, **changes: Any) -> dict[str, Any]:
    table = ROBOTS[robot]
    images = {camera.key: IMAGE for camera in table.cameras}
    length = sum(n or 14 for _, n in table.state)
    made = table.observation(images, np.linspace(0.1, 0.9, length), "go")
    made.update(changes)
    return {key: value for key, value in made.items() if value is not None}


@pytest.mark.parametrize("name", ROBOTS)
def test_state_and_actions(name: str) -> None:
    """Against the order of openpi's transforms, written out."""
    robot = ROBOTS[name]
    made = policy(robot, ANSWER)
    result = made.infer(observation(name))
    state = np.concatenate([np.atleast_1d(observation(name)[key]) for key, _ in robot.state])
    encoded = robot.encode_state(state) if robot.encode_state else state
    n = len(state)

    (inputs,) = made.engine.seen
    np.testing.assert_allclose(
        inputs.state[0, :n].numpy(), (encoded - MEAN[:n]) / (STD[:n] + 1e-6), rtol=1e-6
    )
    assert (inputs.state[0, n:] == 0).all()
    assert inputs.image_mask.tolist() == [[True] * len(robot.cameras)]

    actions = ANSWER[0].double().numpy()[:, :14] * (STD + 1e-6) + MEAN
    relative = robot.relative(14)
    actions[:, relative] += encoded[relative[:n].nonzero()[0]]
    if robot.action_dim:
        actions = actions[:, : robot.action_dim]
    if robot.decode_actions:
        actions = robot.decode_actions(actions)
    np.testing.assert_allclose(result["actions"], actions, atol=2e-5)
    assert result["actions"].dtype == np.float32
    np.testing.assert_allclose(result["state"], state, rtol=1e-6)
    np.testing.assert_allclose(result["model_actions"], ANSWER[0].numpy(), atol=1e-6)
    timing = result["policy_timing"]
    parts = ("preprocess_ms", "infer_ms", "postprocess_ms")
    assert timing["total_ms"] == pytest.approx(sum(timing[part] for part in parts))


def test_absent_camera_is_left_out() -> None:
    made = policy(ROBOTS["generic"], ANSWER)
    made.infer({"images": {"wrist": IMAGE}, "state": np.zeros(14), "prompt": "go"})
    assert made.engine.seen[0].images.shape == (1, 1, 3, 28, 28)


@pytest.mark.parametrize(
    ("robot", "changes", "message"),
    [
        ("aloha", {"images/cam_high": None}, "camera images/cam_high: expected an image"),
        ("aloha", {"images/cam_hihg": IMAGE}, "found also images/cam_hihg"),
        ("droid", {"observation/image": IMAGE}, "found also observation/image"),
        ("libero", {"observation/state": np.zeros(7)}, r"expected 8 values .* found shape \[7\]"),
        ("libero", {"observation/state": None}, "expected 'observation/state', found"),
        (
            "libero",
            {"observation/state": np.full(8, np.nan)},
            "finite values, found nan at index 0",
        ),
        ("generic", {"state": [np.inf] * 14}, "finite values, found inf at index 0"),
        ("generic", {"state": np.zeros(15)}, r"expected 14 values .* found shape \[15\]"),
        ("generic", {"state": np.zeros(0)}, r"expected 14 values .* found shape \[0\]"),
        ("generic", {"state": np.zeros((2, 2))}, r"found shape \[2, 2\]"),
        ("generic", {"prompt": ""}, "prompt: expected a sentence"),
        ("generic", {"prompt": None}, "sentence under prompt or task, .*, found none"),
        ("generic", {"prompt": "x" * 100}, "at most 48 tokens, found 102"),
        (
            "generic",
            {"images/base": np.zeros((3, 3), np.uint8)},
            r"image images/base: expected shape",
        ),
        (
            "generic",
            {f"images/{name}": None for name in ("base", "wrist", "right_wrist")},
            "at least one of the cameras images/base",
        ),
    ],
)
def test_what_an_observation_can_lack(robot: str, changes: dict, message: str) -> None:
    with pytest.raises(ObservationError, match=message):
        policy(ROBOTS[robot], ANSWER).infer(observation(robot, **changes))


def test_known_camera_that_is_not_read() -> None:
    policy(ROBOTS["aloha"], ANSWER).infer(observation("aloha", **{"images/cam_low": IMAGE}))


def test_noise_is_the_seeds(tiny_path: Path) -> None:
    def run(seed: int, calls: int = 1) -> np.ndarray:
        made = Policy.from_checkpoint(tiny_path, robot="generic", seed=seed, steps=2)
        for _ in range(calls):
            actions = made.infer(given)["actions"]
        return actions

    given = {"images": {"base": IMAGE}, "state": np.zeros(8), "prompt": "go"}
    np.testing.assert_array_equal(run(0), run(0))
    np.testing.assert_array_equal(run(0, calls=2), run(0, calls=2))
    assert not np.array_equal(run(0), run(1))
    assert not np.array_equal(run(0), run(0, calls=2))


def test_noise_as_an_argument(tiny_path: Path) -> None:
    made = Policy.from_checkpoint(tiny_path, robot="generic", steps=2)
    given = {"images": {"base": IMAGE}, "state": np.zeros(8), "prompt": "go"}
    noise = np.ones((50, 32), np.float32)
    first, second = (made.infer(given, noise=noise)["actions"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (50, 32)
    others = noise[None], noise.astype(np.float64), torch.from_numpy(noise).requires_grad_()
    read_only = np.frombuffer(noise.tobytes(), np.float32).reshape(noise.shape)
    for other in (*others, noise.astype(">f4"), noise[::-1], read_only):
        np.testing.assert_array_equal(made.infer(given, noise=other)["actions"], first)
    with pytest.raises(ObservationError, match=r"noise: expected float32 \[50, 32\]"):
        made.infer(given, noise=noise[:49])
    with pytest.raises(ObservationError, match=r"noise: expected values up to 1e\+12, .* 1e\+30"):
        made.infer(given, noise=noise * 1e30)
    assert np.isfinite(made.infer(given, noise=noise * 9e11)["actions"]).all()
    masked = np.ma.masked_array(noise, noise > 0)
    nested = torch.nested.nested_tensor([torch.zeros(50, 32)], layout=torch.jagged)
    meta, sparse = torch.empty(50, 32, device="meta"), torch.zeros(50, 32).to_sparse()
    for none in (meta, sparse, nested, masked, noise.tobytes()):
        with pytest.raises(ObservationError, match="noise: expected an array of numbers, found a"):
            made.infer(given, noise=none)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"robot": "r2d2"}, Pi0Error, "robot: expected one of generic, .* found 'r2d2'"),
        ({"engine": "warp"}, EngineError, "engine: expected one of reference"),
        ({"engine": "reference", "device": "tpu"}, EngineError, "device: expected cpu or cuda"),
        ({"engine": "cpu:int8", "dtype": "float32"}, ConfigError, "dtype: expected int8"),
        ({"real_time": "exact"}, ConfigError, r"real_time: expected RealTimeChunking\(\), found"),
        ({"engine": 5}, ConfigError, "engine: expected a text, found 5"),
        ({"device": 2.5}, ConfigError, "device: expected a text, found 2.5"),
        ({"tokenizer": b"x"}, ConfigError, "tokenizer: expected a text, found b'x'"),
        ({"norm_stats": {}}, ConfigError, "norm_stats: expected a text, found {}"),
        ({"norm_stats": ""}, ConfigError, "norm_stats: expected a text, found ''"),
        ({"tokenizer": ""}, ConfigError, "tokenizer: expected a text, found ''"),
        ({"preprocessing": ["openpi"]}, ConfigError, "preprocessing: expected a text, found"),
        ({"steps": 2.5}, ConfigError, "steps: expected a whole number from 1 .* found 2.5"),
        ({"seed": 2**64}, ConfigError, "seed: expected a whole number from 0"),
        ({"n_action_steps": 0}, ConfigError, "n_action_steps: expected .* found 0"),
        ({"n_action_steps": 51}, ConfigError, "n_action_steps: expected .* from 1 to 50, found 51"),
        ({"on_limit": "ignore"}, ConfigError, "on_limit: expected one of error, clamp, warn"),
        ({"preprocessing": "ours"}, Pi0Error, "preprocessing: expected openpi or lerobot"),
        ({"dtype": "float16"}, Pi0Error, "float16: π0's activations"),
        ({"norm_mode": "z"}, Pi0Error, "norm_mode: expected one of mean_std, quantiles, min_max"),
        (
            {"norm_stats": "none", "norm_mode": "mean_std"},
            ConfigError,
            r"norm_mode \(--norm-mode\): expected none beside .*--norm-stats none.* found mean_std",
        ),
        ({"norm_mode": "min_max"}, Pi0Error, "expected min and max for mode min_max, found no min"),
        ({"resize": "stretch"}, Pi0Error, "resize: expected openpi or lerobot"),
        ({"tokenizer": "nowhere"}, Pi0Error, "tokenizer nowhere: expected a file"),
        ({"norm_stats": "nowhere"}, Pi0Error, "statistics nowhere: expected"),
    ],
)
def test_bad_options(tiny_path: Path, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Policy.from_checkpoint(tiny_path, **{"robot": "generic", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda(tiny_path: Path) -> None:
    with pytest.raises(EngineError, match="device cuda: expected a CUDA device"):
        Policy.from_checkpoint(tiny_path, robot="generic", engine="reference@cuda")


def test_no_statistics(tiny_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "ckpt")
    shutil.rmtree(folder / "assets")
    with pytest.raises(Pi0Error, match="statistics: expected one"):
        Policy.from_checkpoint(folder, robot="generic", preprocessing="openpi")
    made = Policy.from_checkpoint(
        folder, robot="generic", preprocessing="openpi", norm_stats="none", steps=1
    )
    result = made.infer({"images": {"base": IMAGE}, "state": np.zeros(8), "prompt": "go"})
    assert result["actions"].shape == (50, 32)


def test_nan_is_never_an_action() -> None:
    answer = ANSWER.clone()
    answer[0, 3, 4] = float("nan")
    with pytest.raises(EngineError, match="actions: expected finite values, found NaN"):
        policy(ROBOTS["generic"], answer).infer(observation("generic"))


GIVEN = {"images": {"base": IMAGE}, "state": np.zeros(14), "prompt": "go"}


def test_select_action_and_reset() -> None:
    made = policy(ROBOTS["generic"], ANSWER, n_action_steps=3)
    chunk = made.infer(GIVEN)["actions"]
    made.engine.seen.clear()
    taken = [made.select_action(GIVEN) for _ in range(7)]
    np.testing.assert_array_equal(taken, chunk[[0, 1, 2, 0, 1, 2, 0]])
    assert taken[0].dtype == np.float32
    assert len(made.engine.seen) == 3
    made.reset()
    np.testing.assert_array_equal(made.select_action(GIVEN), chunk[0])
    assert len(made.engine.seen) == 4


def test_default_prompt() -> None:
    made = Policy(replace(pipeline(ROBOTS["generic"]), default_prompt="wait"), FakeEngine(ANSWER))
    given = {key: value for key, value in GIVEN.items() if key != "prompt"}
    made.infer(given)
    made.infer({**given, "prompt": "wait"})
    first, second = made.engine.seen
    assert torch.equal(first.tokens, second.tokens)


LIMITED = replace(
    ROBOTS["generic"],
    name="limited",
    action_dim=14,
    limits=ActionLimits((None,) * 14, (5.0,) * 14, (None,) * 14, (None,) * 14),
)


def test_limits(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(
        LimitError, match="action 2: expected at most 5, found .* and 10 more. No action"
    ):
        policy(LIMITED, ANSWER * 9).infer(GIVEN)
    for on_limit, most in (("clamp", 5), ("warn", 1000)):
        caplog.clear()
        result = policy(LIMITED, ANSWER * 9, on_limit=on_limit).infer(GIVEN)
        assert 5 <= result["actions"].max() <= most
        assert result["limits"]["on_limit"] == on_limit
        assert {v["kind"] for v in result["limits"]["violations"]} == {"high"}
        assert "robot limited: action 0: expected at most 5" in caplog.text
    assert json.dumps(result["limits"])
    low = replace(
        LIMITED, limits=ActionLimits((-1e3,) * 14, (1e3,) * 14, (None,) * 14, (None,) * 14)
    )
    assert policy(low, ANSWER).infer(GIVEN)["limits"]["violations"] == []


def test_steps_are_limited_between_chunks() -> None:
    limits = ActionLimits((None,) * 14, (None,) * 14, (0.05,) * 14, (None,) * 14)
    answer = torch.linspace(-1, 1, 50 * 32).view(50, 32).flip(0)[None] * 1e-3
    made = policy(replace(LIMITED, limits=limits), answer, on_limit="clamp", n_action_steps=3)
    taken = np.array([made.select_action(GIVEN) for _ in range(9)])
    assert np.abs(np.diff(taken, axis=0)).max() <= 0.05 + 1e-5
    made.reset()


def test_actions_that_are_not_finite_in_the_robots_units() -> None:
    robot = replace(
        ROBOTS["generic"], decode_actions=lambda x: x * np.nan, encode_actions=lambda x: x
    )
    with pytest.raises(EngineError, match="expected finite values in the robot's units"):
        policy(robot, ANSWER).infer(GIVEN)


def test_an_answer_of_another_shape() -> None:
    class Short(FakeEngine):
        def _sample(self, inputs, noise, steps, on_step):
            return noise[:, :10, :7]

    with pytest.raises(EngineError, match=r"expected actions of shape \[1, 50, 32\], found"):
        Policy(pipeline(ROBOTS["generic"]), Short(ANSWER)).infer(GIVEN)


@pytest.mark.parametrize("sampled", [True, False])
@pytest.mark.parametrize(
    ("odd", "found"),
    [
        (lambda x: x[:, :1], r"\[1, 1, 32\] of torch.float32"),
        (lambda x: x[0], r"\[50, 32\] of torch.float32"),
        (lambda x: x.sum(), r"\[\] of torch.float32"),
        (Tensor.long, r"\[1, 50, 32\] of torch.int64"),
        (Tensor.numpy, r"\[1, 50, 32\] of ndarray"),
        (lambda _: None, r"\[\] of NoneType"),
    ],
)
def test_an_engine_that_returns_something_else(odd: Any, found: str, sampled: bool) -> None:
    """Velocities of another shape would be broadcast, and whole numbers are no actions."""

    class Odd(FakeEngine):
        def _sample(self, inputs, noise, steps, on_step):
            return odd(noise) if sampled else super()._sample(inputs, noise, steps, on_step)

        def velocity(self, x_t, t, cache, tap=None):
            return odd(x_t)

    what = "actions" if sampled else "velocities"
    made = Policy(pipeline(ROBOTS["generic"]), Odd(ANSWER))
    with pytest.raises(EngineError, match=rf"{what} of shape \[1, 50, 32\], found {found}"):
        made.infer(GIVEN)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_engine_that_returns_another_precision(dtype: torch.dtype) -> None:
    class Odd(FakeEngine):
        def _sample(self, inputs, noise, steps, on_step):
            return noise.to(dtype).requires_grad_()

    result = Policy(pipeline(ROBOTS["generic"]), Odd(ANSWER)).infer(GIVEN)
    assert result["model_actions"].dtype == np.float32


def test_no_limits_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    policy_module._without_limits.clear()
    for _ in range(2):
        policy(ROBOTS["droid"], ANSWER)
    assert caplog.text.count("robot droid states no limits") == 1
    caplog.clear()
    policy(LIMITED, ANSWER)
    assert caplog.text == ""


def test_metadata_is_plain(tiny_path: Path) -> None:
    with pytest.warns(UserWarning, match="generic is assumed"):
        made = Policy.from_checkpoint(tiny_path, engine="reference:bfloat16", steps=2)
    metadata = made.metadata
    assert json.loads(json.dumps(metadata)) == metadata
    assert metadata["engine"]["name"] == "reference"
    assert metadata["engine"]["precision"] == "bfloat16"
    assert metadata["robot"]["name"] == "generic"
    assert [finding["code"] for finding in metadata["findings"]] == ["robot-assumed"]
    assert (metadata["steps"], metadata["n_action_steps"], metadata["horizon"]) == (2, 50, 50)


def test_an_engine_that_is_made_already(tiny_path: Path) -> None:
    engine = make_engine("reference", open_checkpoint(tiny_path))
    made = Policy.from_checkpoint(tiny_path, robot="generic", engine=engine, steps=1)
    assert made.engine is engine
    other = make_engine("reference", open_checkpoint(tiny_path), image_size=56)
    with pytest.raises(ConfigError, match="engine: expected one made for this checkpoint"):
        Policy.from_checkpoint(tiny_path, robot="generic", engine=other)
    for option, value in (("dtype", "bf16"), ("device", "cuda")):
        with pytest.raises(ConfigError, match=f"{option}: expected .* engine reference was made"):
            Policy.from_checkpoint(tiny_path, robot="generic", engine=engine, **{option: value})
    same = {"dtype": "fp32", "device": "cpu"}
    assert (
        Policy.from_checkpoint(tiny_path, robot="generic", engine=engine, **same).engine is engine
    )


def test_the_fastest_exact_engine_by_default(
    tiny_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="pi0"):
        made = Policy.from_checkpoint(tiny_path, robot="generic")
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert made.metadata["engine"]["name"] == expected
    assert made.metadata["engine"]["precision"] == "float32"
    assert f"engine {expected}:float32" in caplog.text


def test_a_closed_policy(tiny_path: Path) -> None:
    given = {**GIVEN, "state": np.zeros(8)}
    with Policy.from_checkpoint(tiny_path, robot="generic", steps=1) as made:
        made.infer(given)
        made.select_action(given)
    for ask in (made.infer, made.select_action):
        with pytest.raises(EngineError, match="expected an open engine, found it closed"):
            ask(given)


@pytest.mark.parametrize("engine", ["reference", "cpu", "cpu:int8"])
def test_threads_get_the_serial_answers(tiny_path: Path, engine: str) -> None:
    """Eight threads, each with its own state, noise and one of two pictures: bit for bit."""
    made = Policy.from_checkpoint(tiny_path, robot="generic", engine=engine, steps=2)
    rng = np.random.default_rng(0)
    pictures = [IMAGE, IMAGE[::-1].copy()]
    calls = [
        (
            {"images": {"base": pictures[i % 2]}, "state": rng.normal(size=8), "prompt": "go"},
            rng.normal(size=(50, 32)),
        )
        for i in range(40)
    ]
    serial = [made.infer(given, noise=noise)["actions"] for given, noise in calls]
    for i, actions in enumerate(serial):
        assert all(not np.array_equal(actions, other) for other in serial[:i])
    barrier = threading.Barrier(8)

    def work(thread: int) -> list[np.ndarray]:
        barrier.wait()
        return [made.infer(given, noise=noise)["actions"] for given, noise in calls[thread::8]]

    with ThreadPoolExecutor(8) as pool:
        for thread, answers in enumerate(pool.map(work, range(8))):
            np.testing.assert_array_equal(answers, serial[thread::8])


def test_threads_draw_different_noise(tiny_path: Path) -> None:
    made = Policy.from_checkpoint(tiny_path, robot="generic", steps=1)
    with ThreadPoolExecutor(4) as pool:
        drawn = list(pool.map(lambda _: made.draw_noise(), range(16)))
    again = Policy.from_checkpoint(tiny_path, robot="generic", steps=1)
    alone = [again.draw_noise() for _ in range(16)]
    assert sorted(float(x[0, 0, 0]) for x in drawn) == sorted(float(x[0, 0, 0]) for x in alone)
