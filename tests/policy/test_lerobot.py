"""Folders as LeRobot 0.6.1 writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.errors import Pi0Error
from pi0.policy import Policy

STATS = {
    "observation.state.mean": torch.full((6,), 2.0),
    "observation.state.std": torch.full((6,), 4.0),
    "action.mean": torch.full((5,), 1.0),
    "action.std": torch.full((5,), 3.0),
}
PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
STATE_FILE = "policy_preprocessor_step_5_normalizer_processor.safetensors"


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def processor(registry_name: str, state_file: str, mode: str = "MEAN_STD") -> dict[str, Any]:
    return {
        "registry_name": registry_name,
        "config": {
            "norm_map": {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode},
            "features": {
                "observation.state": {"type": "STATE", "shape": [6]},
                "action": {"type": "ACTION", "shape": [5]},
            },
        },
        "state_file": state_file,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    synthesise(tmp_path, PRESETS["tiny"], LAYOUTS["lerobot"], 0, torch.float32)
    config = json.loads((tmp_path / "config.json").read_text())
    config["input_features"] = {
        "observation.images.top": {"type": "VISUAL", "shape": [3, 480, 640]},
        "observation.images.wrist": {"type": "VISUAL", "shape": [3, 480, 640]},
        "observation.images.empty_camera_0": {"type": "VISUAL", "shape": [3, 224, 224]},
        "observation.state": {"type": "STATE", "shape": [6]},
    }
    config["output_features"] = {"action": {"type": "ACTION", "shape": [5]}}
    write(tmp_path / "config.json", config)
    save_file(STATS, tmp_path / STATE_FILE)
    save_file(STATS, tmp_path / "post.safetensors")
    relative = {"registry_name": "relative_actions_processor", "config": {"enabled": False}}
    write(tmp_path / PRE, {"steps": [relative, processor("normalizer_processor", STATE_FILE)]})
    write(tmp_path / POST, {"steps": [processor("unnormalizer_processor", "post.safetensors")]})
    return tmp_path


def test_everything_comes_from_its_files(folder: Path) -> None:
    policy = Policy.from_checkpoint(folder, steps=1)
    assert [camera.key for camera in policy.robot.cameras] == [
        "observation.images.top",
        "observation.images.wrist",
    ]
    assert vars(policy.conventions) == {"resize": "lerobot", "prompt": "lerobot"}
    state = np.arange(6.0)
    np.testing.assert_allclose(policy.state_stats.normalize(state), (state - 2) / (4 + 1e-8))
    np.testing.assert_allclose(policy.action_stats.unnormalize(np.ones(5)), np.full(5, 4.0))
    image = np.zeros((48, 64, 3), np.uint8)
    result = policy.infer(
        {"observation.images.top": image, "observation.state": state, "prompt": "go"}
    )
    assert result["actions"].shape == (50, 5)


def test_relative_actions(folder: Path) -> None:
    pre = json.loads((folder / PRE).read_text())
    config = pre["steps"][0]["config"]
    config |= {"enabled": True, "exclude_joints": ["gripper"]}
    config["action_names"] = ["a", "b", "c", "d", "gripper.pos"]
    write(folder / PRE, pre)
    assert Policy.from_checkpoint(folder).robot.delta == (1, 1, 1, 1, -1)
    config["action_names"] = None
    write(folder / PRE, pre)
    with pytest.raises(Pi0Error, match="names of 5 actions for relative actions, found None"):
        Policy.from_checkpoint(folder)


def test_identity_and_unknown_modes(folder: Path) -> None:
    step = processor("normalizer_processor", "", "IDENTITY")
    write(folder / PRE, {"steps": [step]})
    policy = Policy.from_checkpoint(folder)
    assert policy.state_stats.normalize(np.arange(6.0)).tolist() == list(range(6))
    write(folder / PRE, {"steps": [processor("normalizer_processor", STATE_FILE, "MAGIC")]})
    with pytest.raises(Pi0Error, match="norm_map STATE to be one of .* found MAGIC"):
        Policy.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (STATE_FILE, "expected the statistics file of normalizer_processor, found .* missing"),
        (POST, "expected policy_postprocessor.json"),
    ],
)
def test_missing_files(folder: Path, file: str, message: str) -> None:
    (folder / file).unlink()
    with pytest.raises(Pi0Error, match=message):
        Policy.from_checkpoint(folder)


def test_statistics_for_one_key_only(folder: Path) -> None:
    save_file({"action.mean": torch.ones(5)}, folder / STATE_FILE)
    with pytest.raises(Pi0Error, match="statistics of state: expected mean and std"):
        Policy.from_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_features": {}}, "expected the feature action with a shape"),
        ({"output_features": None}, "expected the feature action with a shape"),
        ({"input_features": []}, "expected the feature observation.state"),
        (
            {"input_features": {"observation.state": {"shape": [6]}}},
            "expected input_features with cameras",
        ),
        (
            {"input_features": {"observation.state": {"shape": [6, 1]}}},
            "expected the feature observation.state",
        ),
    ],
)
def test_odd_features(folder: Path, change: dict, message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | change)
    with pytest.raises(Pi0Error, match=message):
        Policy.from_checkpoint(folder)


@pytest.mark.parametrize(
    "steps", [[], ["normalizer_processor"], [{"registry_name": "normalizer_processor"}], None]
)
def test_odd_processors(folder: Path, steps: object) -> None:
    write(folder / PRE, {"steps": steps})
    with pytest.raises(Pi0Error, match="policy_preprocessor.json: expected"):
        Policy.from_checkpoint(folder)
