"""The pipeline around an engine: both directions, robots, what an observation can lack."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import FakeEngine

from pi0.checkpoint.synth import byte_tokenizer
from pi0.errors import EngineError, ObservationError, Pi0Error
from pi0.policy import ROBOTS, Policy, Robot
from pi0.policy.normalize import make_normalizer
from pi0.policy.policy import Conventions, lookup
from pi0.policy.tokenizer import Tokenizer

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
MEAN, STD = np.arange(14.0), np.arange(1.0, 15.0)


def words() -> Tokenizer:
    backend = byte_tokenizer()
    return Tokenizer(lambda text: list(backend.encode(text).ids), 2, Path("bytes"))


def policy(robot: Robot, answer: torch.Tensor) -> Policy:
    stats = {"mean": MEAN, "std": STD}
    return Policy(
        FakeEngine(answer),
        robot,
        words(),
        Conventions("openpi", "openpi"),
        make_normalizer("state", "mean_std", "openpi", stats),
        make_normalizer("actions", "mean_std", "openpi", stats),
    )


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
    relative = np.zeros(14, bool)
    start = 0
    for run in robot.delta:
        relative[start : start + abs(run)] = run > 0
        start += abs(run)
    actions[:, relative] += encoded[relative[:n].nonzero()[0]]
    if robot.action_dim:
        actions = actions[:, : robot.action_dim]
    if robot.decode_actions:
        actions = robot.decode_actions(actions)
    np.testing.assert_allclose(result["actions"], actions, atol=2e-5)
    assert result["actions"].dtype == np.float32
    np.testing.assert_allclose(result["state"], state, rtol=1e-6)
    timing = result["timing"]
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
        ("generic", {"state": np.array([0, np.inf])}, "finite values, found inf at index 1"),
        ("generic", {"state": np.zeros(15)}, r"expected 1 to 14 values .* found shape \[15\]"),
        ("generic", {"state": np.zeros(0)}, r"expected 1 to 14 values .* found shape \[0\]"),
        ("generic", {"state": np.zeros((2, 2))}, r"found shape \[2, 2\]"),
        ("generic", {"prompt": ""}, "prompt: expected a sentence"),
        ("generic", {"prompt": None}, "prompt: expected a sentence"),
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


def test_lookup() -> None:
    assert lookup({"a/b": 1, "a": {"b": 2}}, "a/b") == 1
    assert lookup({"a": {"b": {"c": 3}}}, "a/b/c") == 3
    assert lookup({"a": 1}, "a/b") is None


def test_noise_is_the_seeds(tiny_path: Path) -> None:
    def run(seed: int, calls: int = 1) -> np.ndarray:
        made = Policy.from_checkpoint(tiny_path, seed=seed, steps=2)
        for _ in range(calls):
            actions = made.infer(given)["actions"]
        return actions

    given = {"images": {"base": IMAGE}, "state": np.zeros(8), "prompt": "go"}
    np.testing.assert_array_equal(run(0), run(0))
    np.testing.assert_array_equal(run(0, calls=2), run(0, calls=2))
    assert not np.array_equal(run(0), run(1))
    assert not np.array_equal(run(0), run(0, calls=2))


def test_noise_as_an_argument(tiny_path: Path) -> None:
    made = Policy.from_checkpoint(tiny_path, steps=2)
    given = {"images": {"base": IMAGE}, "state": np.zeros(8), "prompt": "go"}
    noise = np.ones((50, 32), np.float32)
    first, second = (made.infer(given, noise=noise)["actions"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert first.shape == (50, 32)
    with pytest.raises(ObservationError, match=r"noise: expected float32 \[1, 50, 32\]"):
        made.infer(given, noise=noise[:49])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"robot": "r2d2"}, Pi0Error, "robot: expected one of generic, .* found 'r2d2'"),
        ({"engine": "warp"}, EngineError, "engine: expected one of reference"),
        ({"device": "tpu"}, EngineError, "device: expected cpu or cuda"),
        ({"dtype": "float16"}, Pi0Error, "float16: π0's activations"),
        ({"norm_mode": "z"}, Pi0Error, "norm_mode: expected one of mean_std, quantiles, min_max"),
        ({"norm_mode": "min_max"}, Pi0Error, "expected min and max for mode min_max, found no min"),
        ({"resize": "stretch"}, Pi0Error, "resize: expected openpi or lerobot"),
        ({"tokenizer": "nowhere"}, Pi0Error, "tokenizer nowhere: expected a file"),
        ({"norm_stats": "nowhere"}, Pi0Error, "statistics nowhere: expected"),
    ],
)
def test_bad_options(tiny_path: Path, options: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Policy.from_checkpoint(tiny_path, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_no_cuda(tiny_path: Path) -> None:
    with pytest.raises(EngineError, match="device cuda: expected a CUDA device"):
        Policy.from_checkpoint(tiny_path, device="cuda")


def test_no_statistics(tiny_path: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_path, tmp_path / "ckpt")
    shutil.rmtree(folder / "assets")
    with pytest.raises(Pi0Error, match="statistics: expected one"):
        Policy.from_checkpoint(folder)
    made = Policy.from_checkpoint(folder, norm_stats="none", steps=1)
    result = made.infer({"images": {"base": IMAGE}, "state": np.zeros(8), "prompt": "go"})
    assert result["actions"].shape == (50, 32)


def test_statistics_narrower_than_the_robot(tiny_path: Path, tmp_path: Path) -> None:
    path = tmp_path / "norm_stats.json"
    narrow = {"mean": [0.0] * 7, "std": [1.0] * 7}
    path.write_text(json.dumps({"norm_stats": {"state": narrow, "actions": narrow}}))
    made = Policy.from_checkpoint(tiny_path, norm_stats=path, robot="libero")
    with pytest.raises(ObservationError, match="at most 7 values, .* found 8"):
        made.infer(observation("libero"))


def test_nan_is_never_an_action() -> None:
    answer = ANSWER.clone()
    answer[0, 3, 4] = float("nan")
    with pytest.raises(EngineError, match="actions: expected finite values, found NaN"):
        policy(ROBOTS["generic"], answer).infer(observation("generic"))


def test_quantiles_if_asked(tiny_path: Path) -> None:
    """The synthetic statistics: mean 0, std 1, quantiles -1 and 1."""
    x = np.full(32, 0.5)
    for mode, scale in (("mean_std", 1 + 1e-6), ("quantiles", 1 + 5e-7)):
        made = Policy.from_checkpoint(tiny_path, norm_mode=mode)
        np.testing.assert_allclose(made.state_stats.scale, scale, rtol=1e-12)
        np.testing.assert_allclose(made.state_stats.normalize(x), 0.5, atol=1e-6)
