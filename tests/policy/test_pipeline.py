"""Both directions of the pipeline, against openpi's own transforms and against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from pi0.checkpoint.synth import byte_tokenizer
from pi0.config import PRESETS
from pi0.errors import ConfigError, ObservationError
from pi0.policy import ROBOTS, Camera, Pipeline, Robot
from pi0.policy.normalize import Normalizer, make_normalizer
from pi0.policy.tokenizer import PromptFormat, Tokenizer

ORACLE = np.load(Path(__file__).parents[1] / "oracles" / "openpi_robots.npz", allow_pickle=False)
CASES = sorted({tuple(name.split(".")[:3]) for name in ORACLE.files if ".stats." not in name})
MODES = ("mean_std", "quantiles")


def tokenizer() -> Tokenizer:
    backend = byte_tokenizer()
    return Tokenizer(lambda text: list(backend.encode(text).ids), 2, 260, Path("bytes"))


def pipeline(robot: Robot, state: Normalizer, actions: Normalizer, **changes: Any) -> Pipeline:
    made = Pipeline(
        config=PRESETS["tiny"].with_image_size(56),
        robot=robot,
        tokenizer=tokenizer(),
        resize="openpi",
        prompt=PromptFormat("openpi", 48),
        state_stats=state,
        action_stats=actions,
        target_stats=actions,
    )
    return replace(made, **changes)


def openpi(robot: str, mode: str) -> Pipeline:
    prefix = f"{robot}.stats."
    stats: dict[str, dict[str, np.ndarray]] = {"state": {}, "actions": {}}
    for name in ORACLE.files:
        if name.startswith(prefix):
            what, kind = name.removeprefix(prefix).split(".")
            stats[what][kind] = ORACLE[name]
    return pipeline(
        ROBOTS[robot],
        *(make_normalizer(what, mode, "openpi", stats[what]) for what in ("state", "actions")),
    )


def values(case: tuple[str, ...], prefix: str) -> dict[str, np.ndarray]:
    start = ".".join(case) + "." + prefix
    return {n.removeprefix(start): ORACLE[n] for n in ORACLE.files if n.startswith(start)}


@pytest.mark.parametrize("case", CASES, ids=".".join)
def test_as_openpi(case: tuple[str, str, str]) -> None:
    """1e-5: openpi keeps some arrays in float32. Images are equal bit for bit."""
    robot, mode, _ = case
    made = openpi(robot, mode)
    observation = {**values(case, "obs."), "prompt": "go"}
    inputs, state = made.encode(observation)
    np.testing.assert_allclose(inputs.state[0].numpy(), values(case, "state")[""], atol=1e-5)
    images = values(case, "image.")
    assert inputs.images.shape[1] == len(images)
    for image, expected in zip(inputs.images[0], images.values(), strict=True):
        pixels = ((image.permute(1, 2, 0) + 1) / 2 * 255).round().numpy()
        np.testing.assert_array_equal(pixels, expected)
        assert np.array_equal(image.permute(1, 2, 0), expected.astype(np.float32) / 255 * 2 - 1)
    actions = made.decode(values(case, "model_actions")[""], state)
    np.testing.assert_allclose(actions, values(case, "actions")[""], atol=1e-5)
    encoded = made.encode_actions(values(case, "raw_actions")[""], state)
    np.testing.assert_allclose(encoded, values(case, "encoded_actions")[""], atol=1e-5)


def widths(robot: Robot) -> tuple[int, int]:
    return robot.state_dim or 9, robot.action_dim or 9


@pytest.mark.parametrize("name", ROBOTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("convention", ["openpi", "lerobot"])
@settings(max_examples=20)
@given(data=st.data())
def test_decode_is_the_inverse_of_encode_actions(
    name: str, mode: str, convention: str, data: st.DataObject
) -> None:
    """1e-5: LeRobot's mean and standard deviation have a small constant in one direction only,
    1e-8 beside deviations of at least 0.1, and values are up to 200 deviations from the mean."""
    robot = ROBOTS[name]
    state_dim, action_dim = widths(robot)
    finite = st.floats(-10, 10)
    numbers = {
        what: {
            "mean": data.draw(arrays(np.float64, width, elements=finite)),
            "std": data.draw(arrays(np.float64, width, elements=st.floats(0.1, 10))),
        }
        for what, width in (("state", state_dim), ("actions", action_dim))
    }
    for table in numbers.values():
        table |= {"q01": table["mean"], "q99": table["mean"] + table["std"]}
    stats = [make_normalizer(what, mode, convention, numbers[what]) for what in numbers]
    made = pipeline(robot, *stats)
    batch = data.draw(st.sampled_from([(), (1,), (3,)]))
    state = data.draw(arrays(np.float64, (*batch, state_dim), elements=st.floats(0, 1)))
    actions = data.draw(arrays(np.float64, (*batch, 4, action_dim), elements=finite))
    given_actions = actions.copy()
    encoded = made.encode_actions(actions, state)
    assert encoded.shape == (*batch, 4, 32)
    assert (encoded[..., action_dim:] == 0).all()
    np.testing.assert_array_equal(actions, given_actions)
    np.testing.assert_allclose(made.decode(encoded, state), actions, rtol=1e-5, atol=1e-5)


def test_a_batch_is_its_rows() -> None:
    made = openpi("aloha", "mean_std")
    rng = np.random.default_rng(0)
    state, actions = rng.uniform(0, 1, (3, 14)), rng.normal(size=(3, 50, 14))
    together = made.encode_actions(actions, state)
    for i in range(3):
        np.testing.assert_array_equal(together[i], made.encode_actions(actions[i], state[i]))
        np.testing.assert_array_equal(
            made.decode(together, state)[i], made.decode(together[i], state[i])
        )


@pytest.mark.parametrize("shape", [(50, 13), (14,), (50, 15)])
def test_actions_of_another_width(shape: tuple[int, ...]) -> None:
    with pytest.raises(ObservationError, match="expected .* for robot aloha"):
        openpi("aloha", "mean_std").encode_actions(np.zeros(shape), np.zeros(14))


@pytest.mark.parametrize(
    ("actions", "state"),
    [((2, 50, 32), (2, 3)), ((2, 50, 32), (3, 14)), ((2, 50, 14), (2, 14)), ((50, 32), ())],
)
def test_decode_of_another_width(actions: tuple[int, ...], state: tuple[int, ...]) -> None:
    with pytest.raises(ObservationError, match="expected .* robot aloha, found shape"):
        openpi("aloha", "mean_std").decode(np.zeros(actions), np.zeros(state))


def test_functions_of_a_robot_get_a_copy() -> None:
    def in_place(state: np.ndarray) -> np.ndarray:
        state *= 2
        return state

    made = openpi("libero", "mean_std")
    robot = replace(made.robot, encode_state=in_place)
    given = {**values(("libero", "mean_std", "0"), "obs."), "prompt": "go"}
    _, state = replace(made, robot=robot).encode(given)
    np.testing.assert_array_equal(state, given["observation/state"])
    cut = replace(made, robot=replace(made.robot, encode_state=lambda state: state[..., :3]))
    with pytest.raises(ConfigError, match=r"encode_state: expected shape \[8\], .* found \[3\]"):
        cut.encode(given)


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda state: {}["joint"], "KeyError: 'joint'"),
        (lambda state: "joints", "ValueError: could not convert"),
        (lambda state: state + 1j, "TypeError: complex numbers"),
    ],
)
def test_functions_of_a_robot_that_fail(function: Any, found: str) -> None:
    made = openpi("libero", "mean_std")
    given = {**values(("libero", "mean_std", "0"), "obs."), "prompt": "go"}
    with pytest.raises(
        ConfigError, match=rf"encode_state: expected real numbers \[8\], .* {found}"
    ):
        replace(made, robot=replace(made.robot, encode_state=function)).encode(given)


def test_what_functions_of_a_robot_refuse() -> None:
    def refuse(state: np.ndarray) -> np.ndarray:
        raise ObservationError("state: expected an open gripper, found a closed one.")

    made = openpi("libero", "mean_std")
    given = {**values(("libero", "mean_std", "0"), "obs."), "prompt": "go"}
    with pytest.raises(ObservationError, match="^state: expected an open gripper"):
        replace(made, robot=replace(made.robot, encode_state=refuse)).encode(given)


def test_renamed_observations() -> None:
    robot = Robot("arm", (Camera("observation.images.top"),), (("observation.state", 6),), 6)
    unit = Normalizer("state", np.zeros(6), np.ones(6), np.ones(6))
    made = pipeline(
        robot, unit, unit, rename={"observation.images.front": "observation.images.top"}
    )
    image = np.full((8, 8, 3), 200, np.uint8)
    given = {"observation.state": np.zeros(6), "task": "go"}
    renamed, _ = made.encode({**given, "observation.images.front": image})
    plain, _ = made.encode({**given, "observation.images.top": image})
    assert (renamed.images == plain.images).all()
    with pytest.raises(ObservationError, match=r"one value for observation.images.top, found two"):
        made.encode({**given, "observation.images.front": image, "observation.images.top": image})


def test_observations_in_the_keys_from_before_the_renames() -> None:
    """Also where a camera's key is renamed itself."""
    keys = ("top", "wrist", "side")
    robot = Robot("arm", tuple(Camera(k, (), False) for k in keys), (("state", 6),), 6)
    unit = Normalizer("state", np.zeros(6), np.ones(6), np.ones(6))
    plain = pipeline(robot, unit, unit)
    images = {key: np.full((8, 8, 3), 50 * i, np.uint8) for i, key in enumerate(keys)}
    for rename in (
        {},
        {"front": "top", "top": "side"},
        {"joints": "state"},
        {"top": "side", "side": "top"},
    ):
        made = replace(plain, rename=rename)
        for few in (keys[:2], keys):
            given = {key: images[key] for key in few}
            inputs, _ = made.encode(made.observation(given, np.zeros(6), "go"))
            expected, _ = plain.encode(plain.observation(given, np.zeros(6), "go"))
            assert (inputs.images == expected.images).all()


@pytest.mark.parametrize("value", [1e20, 1e39, 1e300])
def test_a_state_with_which_the_model_overflows(value: float) -> None:
    """One sentence that names the state; not of damaged weights, nor a warning besides."""
    made = openpi("droid", "mean_std")
    given = {**values(("droid", "mean_std", "0"), "obs."), "prompt": "go"}
    given["observation/joint_position"] = np.full(7, value)
    with pytest.raises(ObservationError, match=r"^state: expected values less than 1e\+12 "):
        made.encode(given)


def test_a_state_far_from_the_statistics_is_one_short_warning() -> None:
    made = openpi("droid", "mean_std")
    given = {**values(("droid", "mean_std", "0"), "obs."), "prompt": "go"}
    given["observation/joint_position"] = np.full(7, 1e6)
    with pytest.warns(UserWarning, match=r"state\[0\] = 1e\+06, .* and 3 more: ") as caught:
        made.encode(given)
    assert len(caught) == 1
    assert len(str(caught[0].message)) < 300
