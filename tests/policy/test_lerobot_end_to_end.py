"""Whole LeRobot folders of π0 and π0.5: raw observations in, LeRobot 0.6.1's own actions out.

1e-4 of the actions' scale: two implementations in float32 differ by 2e-6 through the model, and
LeRobot normalises in float32. Zero padding in place of a camera, a missing line break or another
state in the prompt moves them by more than 1e-2.
"""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from pi0.policy import Policy

ORACLES = Path(__file__).parents[1] / "oracles"
CASES = sorted(ORACLES.glob("lerobot_e2e_*/case*.npz"))


@functools.cache
def make_policy(oracle: Path, folder: Path) -> Policy:
    """Its config.json names variants of the published size, which this model does not have."""
    shutil.copytree(oracle / "pretrained_model", folder)
    config = json.loads((folder / "config.json").read_text())
    del config["paligemma_variant"], config["action_expert_variant"]
    config |= json.loads((oracle / "config_heads.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    return Policy.from_checkpoint(folder, engine="reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lerobot")


@pytest.mark.parametrize("path", CASES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_actions_are_lerobots(folder: Path, path: Path) -> None:
    policy = make_policy(path.parent, folder / path.parent.name)
    case = np.load(path, allow_pickle=False)
    observation = {
        f"observation.images.{name.removeprefix('image_')}": case[name]
        for name in case.files
        if name.startswith("image_")
    } | {"observation.state": case["state"], "task": case["task"]}
    inputs, state = policy.pipeline.encode(observation)
    np.testing.assert_array_equal(inputs.tokens.numpy(), case["tokens"])
    np.testing.assert_array_equal(inputs.token_mask.numpy(), case["token_masks"])
    np.testing.assert_allclose(inputs.images.numpy(), case["images"], atol=2e-6)
    width = case["norm_state"].shape[-1]
    np.testing.assert_allclose(inputs.state[:, :width].numpy(), case["norm_state"], atol=1e-6)
    result = policy.infer(observation, noise=case["noise"])
    for name, expected in (
        ("model_actions", case["norm_actions"][0]),
        ("actions", case["actions"]),
    ):
        got = result[name][:, : expected.shape[-1]]
        assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    decoded = policy.pipeline.decode(case["norm_actions"][0], state)
    np.testing.assert_allclose(decoded, case["actions"], rtol=1e-5, atol=1e-6)
