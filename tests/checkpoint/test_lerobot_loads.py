"""LeRobot 0.6.1 loads the folders that are written here, says nothing, and gives our actions.

1e-4 of the actions' scale, as for other people's folders (tests/policy/test_lerobot_end_to_end.py).
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from jax_folder import synthesise_jax

import pi0
from pi0.checkpoint.convert import convert
from pi0.checkpoint.layouts import LAYOUTS
from pi0.checkpoint.load import open_checkpoint
from pi0.checkpoint.synth import synthesise
from pi0.config import PRESETS
from pi0.errors import EngineError
from pi0.peers.engine import LerobotEngine
from pi0.policy import Policy
from pi0.policy.export import export_files

WORKER = Path(__file__).with_name("lerobot_loads.py")
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
# What it says of every model, its own included; anything else, such as missing keys, would be a
# fault of the folder.
SAID = ("The PI0", "This implementation", "Original implementation", "Loading model from",
        "✓ Loaded state dict", "All keys loaded", "WARNING:root:Vision embedding key")  # fmt: skip


@pytest.fixture(scope="module")
def python() -> str:
    try:
        return LerobotEngine.python()
    except EngineError:
        pytest.skip("needs LeRobot in .venv-lerobot (make .venv-lerobot/installed)")


def random_inputs(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = {f"observation.images.{name}": rng.random((3, 48, 64), np.float32) for name in CAMERAS}
    return {
        **images,
        "observation.state": rng.uniform(-0.9, 0.9, 32).astype(np.float32),
        "task": np.array("pick up the cube"),
        "noise": rng.normal(size=(1, 50, 32)).astype(np.float32),
    }


def assert_lerobot_agrees(python: str, folder: Path, scratch: Path) -> None:
    """Runs a folder here and a copy of it in LeRobot."""
    theirs = shutil.copytree(folder, scratch)
    inputs = random_inputs(0)
    np.savez(theirs / "inputs.npz", **inputs)
    source = Path(pi0.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    subprocess.run([python, WORKER, theirs], check=True, env=environment)
    said = [line for line in (theirs / "lerobot.txt").read_text().splitlines() if line.strip()]
    assert [line for line in said if not line.strip().startswith(SAID)] == []
    assert any("All keys loaded" in line for line in said)
    noise = inputs.pop("noise")
    with Policy.from_checkpoint(folder, engine="reference") as policy:
        ours = policy.infer({**inputs, "task": str(inputs["task"])}, noise=noise)["actions"]
    expected = np.load(theirs / "lerobot.npz")["actions"][0]
    assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("preset", ["tiny", "pi05_tiny"])
def test_synthesised(python: str, tmp_path: Path, preset: str) -> None:
    folder = tmp_path / "ours"
    synthesise(folder, PRESETS[preset], LAYOUTS["lerobot"], 0, torch.float32)
    assert_lerobot_agrees(python, folder, tmp_path / "theirs")


@pytest.mark.parametrize("preset", ["tiny", "pi05_tiny"])
def test_converted(python: str, tmp_path: Path, preset: str) -> None:
    """From openpi's JAX form, to which LeRobot's processors have to be added."""
    source = tmp_path / "jax"
    same = synthesise_jax(source, PRESETS[preset], torch.float32)
    shutil.copytree(same / "assets", source / "assets")
    shutil.copy(same / "tokenizer.json", source)
    checkpoint = open_checkpoint(source)
    export = export_files(checkpoint, "lerobot", "float32")
    convert(checkpoint, tmp_path / "ours", "lerobot", export.files)
    assert_lerobot_agrees(python, tmp_path / "ours", tmp_path / "theirs")
