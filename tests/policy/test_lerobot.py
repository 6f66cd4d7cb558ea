"""Policies of LeRobot's folders: what their programs say is what a policy does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from lerobot_folder import CAMERAS, LerobotFolder
from safetensors.torch import load_file, save_file

from pi0.checkpoint.infer import to_config_json
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.errors import ObservationError, Pi0Error
from pi0.policy import Camera, Policy, PolicyOptions, Robot, prepare
from pi0.policy.lerobot import is_lerobot

NAMES = ["a", "b", "c", "d", "Gripper.pos"]
BUFFERS = {
    "normalize_inputs.buffer_observation_state.mean": torch.arange(6.0),
    "normalize_inputs.buffer_observation_state.std": torch.full((6,), 2.0),
    "unnormalize_outputs.buffer_action.mean": torch.ones(5),
    "unnormalize_outputs.buffer_action.std": torch.full((5,), 0.5),
}


@pytest.fixture
def folder(tmp_path: Path) -> LerobotFolder:
    """A folder with weights, whose processors are those of `LerobotFolder`."""
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    folder = LerobotFolder(tmp_path)
    folder.config = json.loads((tmp_path / "config.json").read_text()) | folder.config
    return folder


def test_everything_comes_from_its_files(folder: LerobotFolder) -> None:
    policy = Policy.from_checkpoint(folder.write(), steps=1)
    assert tuple(camera.key for camera in policy.pipeline.robot.cameras) == CAMERAS
    assert (policy.pipeline.resize, policy.pipeline.prompt.convention) == ("lerobot", "lerobot")
    observation = {CAMERAS[0]: np.zeros((48, 64, 3), np.uint8), "prompt": "go"}
    result = policy.infer({**observation, "observation.state": np.arange(6.0)})
    assert result["actions"].shape == (50, 5)


def test_statistics_of_images_are_applied(folder: LerobotFolder) -> None:
    folder.set_modes({"VISUAL": "MEAN_STD", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"})
    assert folder.statistics is not None
    for name, value in (("mean", [0.0, 0.5, 1.0]), ("std", [2.0, 1.0, 4.0])):
        folder.statistics[f"{CAMERAS[0]}.{name}"] = torch.tensor(value)[:, None, None]
    policy = Policy.from_checkpoint(folder.write())
    gray = np.full((28, 28, 3), 0.75, np.float32)
    observation = {CAMERAS[0]: gray, "observation.state": np.zeros(6), "task": "go"}
    inputs, _ = policy.pipeline.encode(observation)
    normalised = (0.75 - np.array([0.0, 0.5, 1.0])) / np.array([2.0, 1.0, 4.0])
    np.testing.assert_allclose(inputs.images[0, 0, :, 3, 3], normalised * 2 - 1, atol=1e-6)


@pytest.mark.parametrize("side", ["right", "left"])
def test_length_and_side_of_padding(folder: LerobotFolder, side: str) -> None:
    folder.set("tokenizer_processor", {"max_length": 72, "padding_side": side})
    with pytest.warns(UserWarning, match="expected 72 as LeRobot's tokenizer step says, which cou"):
        pipeline = Policy.from_checkpoint(folder.write()).pipeline
    image, state = np.zeros((48, 64, 3), np.uint8), np.zeros(6)
    inputs, _ = pipeline.encode({CAMERAS[0]: image, "observation.state": state, "task": "go"})
    mask = inputs.token_mask[0]
    assert (len(mask), mask.sum()) == (72, 4)
    assert (mask[:4] if side == "right" else mask[-4:]).all()


@pytest.mark.parametrize("declared", [True, False])
def test_statistics_among_the_weights(folder: LerobotFolder, declared: bool) -> None:
    """Of older releases, which had no processor files; also where config.json has no features."""
    path, weights = folder.write(), folder.path / "model.safetensors"
    for file in path.glob("policy_*"):
        file.unlink()
    if not declared:
        config = {k: v for k, v in folder.config.items() if not k.endswith("_features")}
        config.pop("normalization_mapping", None)
        (path / "config.json").write_text(json.dumps(config))
    save_file({**load_file(weights), **BUFFERS}, weights)
    robot = None if declared else Robot("arm", (Camera("top"),), (("state", 6),), 5)
    with pytest.warns(UserWarning, match="what LeRobot 0.6.1 builds"):
        pipeline = Policy.from_checkpoint(path, robot=robot).pipeline
    np.testing.assert_allclose(pipeline.state_stats.normalize(np.arange(6.0) + 2), 1, atol=1e-6)
    np.testing.assert_allclose(pipeline.action_stats.unnormalize(np.full(5, 2.0)), 2)
    assert pipeline.resize == "lerobot"


@pytest.mark.parametrize("by", ["processors", "config.json", "weights", "nothing"])
def test_whose_checkpoint_it_is(folder: LerobotFolder, by: str) -> None:
    path, weights = folder.write(), folder.path / "model.safetensors"
    if by != "processors":
        for file in path.glob("policy_*"):
            file.unlink()
    if by != "config.json":
        own = ("input_features", "output_features", "normalization_mapping")
        config = {key: value for key, value in folder.config.items() if key not in own}
        (path / "config.json").write_text(json.dumps(config))
    if by == "weights":
        save_file({**load_file(weights), **BUFFERS}, weights)
    assert is_lerobot(open_checkpoint(path)) == (by != "nothing")


def test_openpis_statistics_beside_those_among_the_weights(folder: LerobotFolder) -> None:
    """Of an older LeRobot, whose config.json has no features: its own count, which is said."""
    path, weights = folder.write(), folder.path / "model.safetensors"
    for file in path.glob("policy_*"):
        file.unlink()
    save_file({**load_file(weights), **BUFFERS}, weights)
    (path / "config.json").write_text(json.dumps(to_config_json(PRESETS["tiny"])))
    (path / "norm_stats.json").write_text("{}")
    found = prepare(open_checkpoint(path), PolicyOptions(robot="generic")).findings
    assert "two-origins" in {finding.code for finding in found}


def test_relative_actions(folder: LerobotFolder) -> None:
    folder.set_relative(exclude_joints=["gripper"], action_names=NAMES)
    assert Policy.from_checkpoint(folder.write()).pipeline.robot.delta == (1, 1, 1, 1, -1)


def test_a_robot_table_with_the_keys_before_the_renames(folder: LerobotFolder) -> None:
    """Or after them: both name the same pictures, in the same slots."""
    front, joints = "observation.images.front", "observation.joints"
    renames = {front: CAMERAS[0], joints: "observation.state"}
    folder.set("rename_observations_processor", {"rename_map": renames})
    path, pictures = folder.write(), np.random.default_rng(0).integers(0, 256, (2, 48, 64, 3))
    noise, actions = np.zeros((50, 32)), []
    for camera, state in ((front, joints), (CAMERAS[0], "observation.state")):
        robot = Robot("arm", (Camera(camera), Camera(CAMERAS[1])), ((state, 6),), 5)
        policy = Policy.from_checkpoint(path, robot=robot, steps=1)
        images = dict(zip((front, CAMERAS[1]), pictures.astype(np.uint8), strict=True))
        observation = {**images, joints: np.arange(6.0), "task": "go"}
        actions.append(policy.infer(observation, noise)["actions"])
    np.testing.assert_array_equal(*actions)


def test_a_camera_renamed_to_one_that_is_unknown(folder: LerobotFolder) -> None:
    """LeRobot does not see it, and would compute without it."""
    renames = {CAMERAS[0]: "observation.images.x"}
    folder.set("rename_observations_processor", {"rename_map": renames})
    policy = Policy.from_checkpoint(folder.write(), steps=1)
    image = np.zeros((28, 28, 3), np.uint8)
    observation = {"observation.state": np.zeros(6), "task": "go"} | dict.fromkeys(CAMERAS, image)
    found = rf"found also observation\.images\.x \(renamed from {CAMERAS[0]}\)\."
    with pytest.raises(ObservationError, match=found):
        policy.infer(observation)


def test_errors_stop_a_policy(folder: LerobotFolder) -> None:
    folder.after.append({"registry_name": "center_crop_processor"})
    with pytest.raises(Pi0Error, match="center_crop_processor"):
        Policy.from_checkpoint(folder.write())


def test_warnings_are_shown(folder: LerobotFolder) -> None:
    folder.config["input_features"]["observation.state"]["shape"] = [7]
    with pytest.warns(UserWarning, match="The statistics decide"):
        Policy.from_checkpoint(folder.write())


def test_a_robot_table_needs_no_cameras_of_the_folder(folder: LerobotFolder) -> None:
    folder.config["input_features"] = {}
    with pytest.raises(Pi0Error, match="--robot"):
        Policy.from_checkpoint(folder.write())
    assert Policy.from_checkpoint(folder.path, robot="generic").pipeline.robot.name == "generic"
